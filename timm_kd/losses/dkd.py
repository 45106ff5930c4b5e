"""Decoupled knowledge distillation (Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679)."""
from torch import Tensor

from .base import LOGITS, OTHER_CLASSES, ClosedForm, DistillationLoss, Paper, knob, logit_std_knob, temperature_knob
from .kernel import (
    has_rest,
    kl_divergence,
    kl_from_cross,
    log_split,
    prepare,
    soften_teacher,
    split,
    standardize_backward_,
    teacher_cross_,
)
from .targets import Labels


class DKDLoss(DistillationLoss):
    """The divergence between teacher and student, split into that on the target and that among the other classes.

    With everything at temperature T, b the partition {labels, rest} and q the softmax over the rest:
    `D = T^2 mean_b(alpha KL(b_t || b_s) + beta KL(q_t || q_s))`. Under Mixup the partition is `[p_a, p_b, rest]`, and
    the rest excludes both labels (the authors' answer in megvii-research/mdistiller issue 13); with nothing left over,
    as for two classes, the second term is 0.

    Components: `tckd` and `nckd`, each with its T^2, such that `kd_loss = alpha * tckd + beta * nckd`.

    The defaults are the authors' CIFAR-100 setting: T 4, beta 8 and a warm-up of 20 of 240 epochs belong together.
    """
    paper = Paper(
        title='Decoupled knowledge distillation (DKD)',
        formula=r'D = T^2\,\operatorname{mean}\Big(\alpha\,\mathrm{KL}\big(b(z_t/T)\,\|\,b(z_s/T)\big)'
        r' + \beta\,\mathrm{KL}\big(q(z_t/T)\,\|\,q(z_s/T)\big)\Big),\quad b = [p_y,\,1 - p_y]',
        symbols=f'{LOGITS}, {OTHER_CLASSES}',
        citations=("""@inproceedings{zhao2022decoupled,
  author = {Borui Zhao and Quan Cui and Renjie Song and Yiyu Qiu and Jiajun Liang},
  title = {Decoupled Knowledge Distillation},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  note = {arXiv:2203.08679},
  year = {2022}
}""",),
    )
    component_names = ('tckd', 'nckd')
    default_warmup = 1 / 12

    temperature: float = temperature_knob(4.0)
    alpha: float = knob(1.0, 'weight of the target class against the rest', at_least=0)
    beta: float = knob(8.0, 'weight of the other classes', at_least=0)
    logit_std: bool = logit_std_knob()

    def formula(self, student: Tensor, teacher: Tensor, labels: Labels) -> dict[str, Tensor]:
        student, teacher, scale = prepare(student, teacher, labels, self.logit_std)
        parts_teacher, rest_teacher = log_split(soften_teacher(teacher, self.temperature), labels)
        parts_student, rest_student = log_split(student / self.temperature, labels)
        return self._combine(
            scale * kl_divergence(parts_teacher, parts_student),
            scale * has_rest(parts_teacher) * kl_divergence(rest_teacher, rest_student),
        )

    def closed_form(self, student: Tensor, teacher: Tensor, labels: Labels) -> ClosedForm:
        raw = student
        student, teacher, scale = prepare(student, teacher, labels, self.logit_std)
        softened = soften_teacher(teacher, self.temperature)
        teacher_split = split(softened, labels)
        cross = teacher_cross_(softened, teacher_split.rest, student, 1 / self.temperature)
        del softened  # the student's softened logits take its memory
        student_split = split(student * (1 / self.temperature), labels)
        any_rest = has_rest(teacher_split.log_parts)
        result = self._combine(
            scale * kl_divergence(teacher_split.log_parts, student_split.log_parts),
            scale * any_rest * kl_from_cross(cross, teacher_split.rest, student_split.rest),
        )
        # p_student = q_student * share of the rest; over the partition, d KL(b_t || b_s) = b_s - b_t.
        shift = self.alpha * (student_split.log_parts.exp() - teacher_split.log_parts.exp())
        beta = self.beta * any_rest
        gradient = student_split.rest.probs.mul_(shift[:, :1] + beta)
        gradient.addcmul_(teacher_split.rest.probs, beta, value=-1).scatter_add_(1, labels.index, shift[:, 1:])
        if self.logit_std:
            gradient = standardize_backward_(gradient, raw)
        return result, gradient, self.temperature * scale

    def _combine(self, target_rows: Tensor, rest_rows: Tensor) -> dict[str, Tensor]:
        tckd = self.temperature ** 2 * target_rows.sum()
        nckd = self.temperature ** 2 * rest_rows.sum()
        return {'kd_loss': self.alpha * tckd + self.beta * nckd, 'tckd': tckd, 'nckd': nckd}
