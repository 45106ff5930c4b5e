"""Normalised knowledge distillation (Yang et al. 2022, arXiv 2208.10139; ICCV 2023, arXiv 2303.13005)."""
from torch import Tensor

from .base import LOGITS, OTHER_CLASSES, ClosedForm, DistillationLoss, Paper, knob, logit_std_knob, temperature_knob
from .kernel import Split, has_rest, log_split, prepare, soften_teacher, softmax, split, standardize_backward_
from .targets import Labels

RETHINKING = """@article{yang2022rethinking,
  author = {Zhendong Yang and Zhe Li and Yuan Gong and Tianke Zhang and Shanshan Lao and Chun Yuan and Yu Li},
  title = {Rethinking Knowledge Distillation via Cross-Entropy},
  journal = {arXiv preprint arXiv:2208.10139},
  year = {2022}
}"""


class NKDLoss(DistillationLoss):
    """Two cross-entropies with the teacher: on the target, and among the other classes.

    With t the target (under Mixup the heavier label) and q the softmax over the other classes at temperature T:
    `D = -mean_b(p_t(z_t) log p_t(z_s)) - gamma T^2 mean_b sum_{i != t} q_i(z_t / T) log q_i(z_s / T)`.
    The first, the soft term, has no temperature, and with `logit_std` it keeps the raw logits.

    Components: `soft` and `distributed`, the latter with its T^2, such that `kd_loss = soft + gamma * distributed`.

    The defaults are those of the official class.
    """
    paper = Paper(
        title='Normalized knowledge distillation (NKD)',
        formula=r'D = -\operatorname{mean}\,p_y(z_t)\log p_y(z_s)\;-\;'
        r'\gamma\,T^2\,\operatorname{mean}\sum_{i \ne y} q_i(z_t/T)\log q_i(z_s/T)',
        symbols=f'{LOGITS}, {OTHER_CLASSES}',
        citations=(RETHINKING, """@inproceedings{yang2023knowledge,
  author = {Zhendong Yang and Ailing Zeng and Zhe Li and Tianke Zhang and Chun Yuan and Yu Li},
  title = {From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  note = {arXiv:2303.13005},
  year = {2023}
}"""),
    )
    component_names = ('soft', 'distributed')

    temperature: float = temperature_knob(1.0)
    gamma: float = knob(1.5, 'weight of the other classes', at_least=0)
    logit_std: bool = logit_std_knob()

    def formula(self, student: Tensor, teacher: Tensor, labels: Labels) -> dict[str, Tensor]:
        labels = labels.heaviest()
        p_target = soften_teacher(teacher, 1.0).log_softmax(1).gather(1, labels.index).exp()
        soft = -p_target * student.log_softmax(1).gather(1, labels.index)
        student, teacher, scale = prepare(student, teacher, labels, self.logit_std)
        parts_teacher, rest_teacher = log_split(soften_teacher(teacher, self.temperature), labels)
        _, rest_student = log_split(student / self.temperature, labels)
        distributed = -(rest_teacher.exp() * rest_student).sum(1, keepdim=True)
        return self._combine(scale * soft, scale * has_rest(parts_teacher) * distributed)

    def closed_form(self, student: Tensor, teacher: Tensor, labels: Labels) -> ClosedForm:
        labels = labels.heaviest()
        *prepared, scale = prepare(student, teacher, labels, self.logit_std)
        distributed, student_split, teacher_split = _distribute(*prepared, labels, self.temperature)
        del prepared  # standardised copies: the softmax of the soft term takes their memory
        gamma = self.gamma * self.temperature * has_rest(teacher_split.log_parts)
        gradient = student_split.rest.probs
        if self.temperature == 1.0 and not self.logit_std:
            # The softmaxes of the distributed term give the soft term too: p_student = q_student * share of the rest,
            # and at the target p - 1 is minus that share.
            log_p_student = student_split.log_parts[:, 1:]
            p_target = teacher_split.log_parts[:, 1:].exp()
            pull = p_target * student_split.log_parts[:, :1].exp()
            gradient.mul_(gamma + pull).addcmul_(teacher_split.rest.probs, gamma, value=-1)
        else:
            gradient.sub_(teacher_split.rest.probs).mul_(gamma)
            del teacher_split  # the same softmax takes its memory
            if self.logit_std:
                gradient = standardize_backward_(gradient, student)
            log_p_teacher, _ = _log_target(soften_teacher(teacher, 1.0), labels)
            log_p_student, p_student = _log_target(student, labels)
            pull = p_target = log_p_teacher.exp()
            gradient.addcmul_(p_student, p_target)
        gradient.scatter_add_(1, labels.index, -pull)
        return self._combine(scale * (-p_target * log_p_student), scale * distributed), gradient, scale

    def _combine(self, soft_rows: Tensor, distributed_rows: Tensor) -> dict[str, Tensor]:
        soft = soft_rows.sum()
        distributed = self.temperature ** 2 * distributed_rows.sum()
        return {'kd_loss': soft + self.gamma * distributed, 'soft': soft, 'distributed': distributed}


def _distribute(
        student: Tensor,
        teacher: Tensor,
        labels: Labels,
        temperature: float,
) -> tuple[Tensor, Split, Split]:
    """Return the cross-entropy among the classes that are no label, `[B, 1]`, and both splits, the student's first."""
    teacher_split = split(soften_teacher(teacher, temperature), labels)
    softened = student * (1 / temperature)
    student_split = split(softened, labels)
    cross = softened.mul_(teacher_split.rest.probs).sum(1, keepdim=True)
    rows = has_rest(teacher_split.log_parts) * (student_split.rest.logsumexp() - cross)
    return rows, student_split, teacher_split


def _log_target(logits: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the label, `[B, 1]`, and the probabilities of all classes, `[B, C]`."""
    everything = softmax(logits)
    return logits.gather(1, labels.index) - everything.logsumexp(), everything.probs
