"""Normalised knowledge distillation (Yang et al. 2022, arXiv 2208.10139; ICCV 2023, arXiv 2303.13005)."""
import torch

from .base import DistillationLoss, check_positive, check_weight
from .kernel import (
    Split,
    has_rest,
    log_split,
    row_scale,
    soften_teacher,
    softmax,
    split,
    standardize,
    standardize_backward_,
)
from .targets import Labels


class NKDLoss(DistillationLoss):
    """Two cross-entropies with the teacher: on the target, and among the other classes.

    With t the target (under Mixup the heavier label) and q the softmax over the other classes at temperature T:
    `D = -mean_b(p_t(z_t) log p_t(z_s)) - gamma T^2 mean_b sum_{i != t} q_i(z_t / T) log q_i(z_s / T)`.
    The first, the soft term, has no temperature.

    Components: `soft` and `distributed`, the latter with its T^2, such that `kd_loss = soft + gamma * distributed`.

    Args:
        temperature: T. Default 1, the official class's.
        gamma: Weight of the distributed term. Default 1.5, the official class's.
        logit_std: Standardise both rows of logits of the distributed term before the temperature (Sun et al. 2024,
            arXiv 2403.01427); the soft term keeps the raw ones.
    """
    component_names = ('soft', 'distributed')

    def __init__(self, temperature: float = 1.0, gamma: float = 1.5, logit_std: bool = False):
        super().__init__()
        self.temperature = check_positive('temperature', temperature)
        self.gamma = check_weight('gamma', gamma)
        self.logit_std = logit_std

    def formula(self, student: torch.Tensor, teacher: torch.Tensor, labels: Labels) -> dict[str, torch.Tensor]:
        labels = labels.heaviest()
        scale = row_scale(teacher, labels)
        p_target = soften_teacher(teacher, 1.0).log_softmax(1).gather(1, labels.index).exp()
        soft = -p_target * student.log_softmax(1).gather(1, labels.index)
        if self.logit_std:
            student, teacher = standardize(student), standardize(teacher)
        parts_teacher, rest_teacher = log_split(soften_teacher(teacher, self.temperature), labels)
        _, rest_student = log_split(student / self.temperature, labels)
        distributed = -(rest_teacher.exp() * rest_student).sum(1, keepdim=True)
        return self._combine(scale * soft, scale * has_rest(parts_teacher) * distributed)

    def closed_form(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            labels: Labels,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        labels = labels.heaviest()
        scale = row_scale(teacher, labels)
        # At temperature 1 the distributed term's softmaxes give the soft term too.
        rows = self._rows_of_one_softmax if self.temperature == 1.0 and not self.logit_std else self._rows
        soft, distributed, gradient = rows(student, teacher, labels)
        return self._combine(scale * soft, scale * distributed), gradient, scale

    def _rows_of_one_softmax(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            labels: Labels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        distributed, student_split, teacher_split = _distribute(student, teacher, labels, 1.0)
        p_target = teacher_split.log_parts[:, 1:].exp()
        # p_student = q_student * share of the rest; at the target p - 1 is minus that share.
        pull = p_target * student_split.log_parts[:, :1].exp()
        gamma = self.gamma * teacher_split.has_rest()
        gradient = student_split.rest.probs.mul_(gamma + pull)
        gradient.addcmul_(teacher_split.rest.probs, gamma, value=-1).scatter_add_(1, labels.index, -pull)
        return -p_target * student_split.log_parts[:, 1:], distributed, gradient

    def _rows(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            labels: Labels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scaled = (standardize(student), standardize(teacher)) if self.logit_std else (student, teacher)
        distributed, student_split, teacher_split = _distribute(*scaled, labels, self.temperature)
        gamma = self.gamma * self.temperature * teacher_split.has_rest()
        gradient = student_split.rest.probs.sub_(teacher_split.rest.probs).mul_(gamma)
        del scaled, teacher_split  # their memory serves the softmax of the soft term
        if self.logit_std:
            gradient = standardize_backward_(gradient, student)
        log_p_teacher, _ = _log_target(soften_teacher(teacher, 1.0), labels)
        log_p_student, p_student = _log_target(student, labels)
        p_target = log_p_teacher.exp()
        gradient.addcmul_(p_student, p_target).scatter_add_(1, labels.index, -p_target)
        return -p_target * log_p_student, distributed, gradient

    def _combine(self, soft_rows: torch.Tensor, distributed_rows: torch.Tensor) -> dict[str, torch.Tensor]:
        soft = soft_rows.sum()
        distributed = self.temperature ** 2 * distributed_rows.sum()
        return {'kd_loss': soft + self.gamma * distributed, 'soft': soft, 'distributed': distributed}


def _distribute(
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: Labels,
        temperature: float,
) -> tuple[torch.Tensor, Split, Split]:
    """Cross-entropy of teacher and student among the classes that are no label, `[B, 1]`, and both splits."""
    teacher_split = split(soften_teacher(teacher, temperature), labels)
    softened = student * (1 / temperature)
    student_split = split(softened, labels)
    cross = softened.mul_(teacher_split.rest.probs).sum(1, keepdim=True)
    return teacher_split.has_rest() * (student_split.rest.logsumexp() - cross), student_split, teacher_split


def _log_target(logits: torch.Tensor, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the label, `[B, 1]`, and the probabilities of all classes, `[B, C]`."""
    everything = softmax(logits)
    return logits.gather(1, labels.index) - everything.logsumexp(), everything.probs
