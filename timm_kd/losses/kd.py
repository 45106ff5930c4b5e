"""Knowledge distillation (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531)."""
import torch

from .base import DistillationLoss, check_positive
from .kernel import (
    kl_divergence,
    kl_from_cross,
    row_scale,
    soften_teacher,
    softmax,
    standardize,
    standardize_backward_,
    teacher_cross_,
)
from .targets import Labels


class KDLoss(DistillationLoss):
    """The softened teacher's divergence from the softened student: `D = T^2 mean_b KL(p(z_t / T) || p(z_s / T))`.

    The target is only looked at for classes the teacher masks. No components.

    Args:
        temperature: T. Default 4, as timm's script.
        logit_std: Standardise both rows of logits before the temperature (Sun et al. 2024, arXiv 2403.01427).
    """

    def __init__(self, temperature: float = 4.0, logit_std: bool = False):
        super().__init__()
        self.temperature = check_positive('temperature', temperature)
        self.logit_std = logit_std

    def formula(self, student: torch.Tensor, teacher: torch.Tensor, labels: Labels) -> dict[str, torch.Tensor]:
        scale = row_scale(teacher, labels)
        if self.logit_std:
            student, teacher = standardize(student), standardize(teacher)
        rows = kl_divergence(
            soften_teacher(teacher, self.temperature).log_softmax(1),
            (student / self.temperature).log_softmax(1),
        )
        return {'kd_loss': self.temperature ** 2 * (scale * rows).sum()}

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
        p_teacher = softmax(softened)
        cross = teacher_cross_(softened, p_teacher, student, 1 / self.temperature)
        del softened  # its memory serves the student's
        p_student = softmax(student * (1 / self.temperature))
        rows = kl_from_cross(cross, p_teacher, p_student)
        gradient = p_student.probs.sub_(p_teacher.probs)
        if self.logit_std:
            gradient = standardize_backward_(gradient, raw)
        result = {'kd_loss': self.temperature ** 2 * (scale * rows).sum()}
        return result, gradient, self.temperature * scale
