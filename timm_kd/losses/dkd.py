"""Decoupled knowledge distillation (Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679)."""
import torch

from .base import DistillationLoss, check_positive, check_weight
from .kernel import (
    has_rest,
    kl_divergence,
    kl_from_cross,
    log_split,
    row_scale,
    soften_teacher,
    split,
    standardize,
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

    Args:
        temperature: T. Default 4, the paper's.
        alpha: Weight of the target part, TCKD.
        beta: Weight of the non-target part, NCKD. Default 8, the paper's on CIFAR-100.
        logit_std: Standardise both rows of logits before the temperature (Sun et al. 2024, arXiv 2403.01427).
    """
    component_names = ('tckd', 'nckd')
    default_warmup = 1 / 12  # 20 epochs of 240 in the authors' CIFAR-100 setting, where T 4 and beta 8 come from

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0, logit_std: bool = False):
        super().__init__()
        self.temperature = check_positive('temperature', temperature)
        self.alpha = check_weight('alpha', alpha)
        self.beta = check_weight('beta', beta)
        self.logit_std = logit_std

    def formula(self, student: torch.Tensor, teacher: torch.Tensor, labels: Labels) -> dict[str, torch.Tensor]:
        scale = row_scale(teacher, labels)
        if self.logit_std:
            student, teacher = standardize(student), standardize(teacher)
        parts_teacher, rest_teacher = log_split(soften_teacher(teacher, self.temperature), labels)
        parts_student, rest_student = log_split(student / self.temperature, labels)
        return self._combine(
            scale * kl_divergence(parts_teacher, parts_student),
            scale * has_rest(parts_teacher) * kl_divergence(rest_teacher, rest_student),
        )

    def closed_form(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            labels: Labels,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        raw, scale = student, row_scale(teacher, labels)
        if self.logit_std:
            student, teacher = standardize(student), standardize(teacher)
        softened = soften_teacher(teacher, self.temperature)
        teacher_split = split(softened, labels)
        cross = teacher_cross_(softened, teacher_split.rest, student, 1 / self.temperature)
        del softened  # its memory serves the student's
        student_split = split(student * (1 / self.temperature), labels)
        any_rest = teacher_split.has_rest()
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

    def _combine(self, target_rows: torch.Tensor, rest_rows: torch.Tensor) -> dict[str, torch.Tensor]:
        tckd = self.temperature ** 2 * target_rows.sum()
        nckd = self.temperature ** 2 * rest_rows.sum()
        return {'kd_loss': self.alpha * tckd + self.beta * nckd, 'tckd': tckd, 'nckd': nckd}
