"""Teacher-free KD (Yuan et al. 2020, "Revisit Knowledge Distillation: a Teacher-free Framework", arXiv 1909.11723)."""
import torch

from .base import check_positive
from .kd import KDLoss
from .targets import Labels


class TFKDLoss(KDLoss):
    """Without a teacher Tf-KD_reg, with one (the student's own pretrained copy) Tf-KD_self, which is `kd`.

    Tf-KD_reg distils a designed teacher that gives the target probability a and the others `(1 - a) / (C - 1)`,
    softened as the official code does it, by a softmax of these *probabilities* v: `u = softmax(v / T)`,
    `D = mean_b KL(u || p(z_s))`, the student not softened. Under Mixup `v = lam v_a + (1 - lam) v_b`. No components.

    Args:
        temperature: T. Default 20, the official ImageNet script's.
        correct_prob: a, in (0, 1]. Not used with a teacher.
    """
    needs_teacher = False
    default_task_weight = 0.9
    default_distill_weight = 0.1

    def __init__(self, temperature: float = 20.0, correct_prob: float = 0.99):
        super().__init__(temperature)
        self.correct_prob = check_positive('correct_prob', correct_prob)
        if correct_prob > 1:
            raise ValueError(f'correct_prob must be in (0, 1], got {correct_prob}')

    def formula(self, student: torch.Tensor, teacher: torch.Tensor | None, labels: Labels) -> dict[str, torch.Tensor]:
        if teacher is not None:
            return super().formula(student, teacher, labels)
        return {'kd_loss': self._kl_of_virtual_teacher(student.log_softmax(1), labels)}

    def closed_form(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor | None,
            labels: Labels,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        if teacher is not None:
            return super().closed_form(student, teacher, labels)
        log_probs = student.log_softmax(1)
        result = {'kd_loss': self._kl_of_virtual_teacher(log_probs, labels)}
        other, above, _ = self._virtual_teacher(log_probs, labels)
        gradient = log_probs.exp_().sub_(other).scatter_add_(1, labels.index, -above)
        return result, gradient, torch.full_like(other, 1 / len(student))

    def _virtual_teacher(self, logits: torch.Tensor, labels: Labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """u as what it has everywhere, `[B, 1]`, and above that at the labels, `[B, K]`; and v / T above its floor."""
        num_classes = logits.shape[1]
        floor = (1 - self.correct_prob) / (num_classes - 1)
        height = labels.weight * ((self.correct_prob - floor) / self.temperature)
        odds = height.expm1()
        other = 1 / (num_classes + odds.sum(1, keepdim=True))
        return other, other * odds, height

    def _kl_of_virtual_teacher(self, log_probs: torch.Tensor, labels: Labels) -> torch.Tensor:
        """`mean_b KL(u || p)` from one sum over all classes: u is flat but for the labels."""
        other, above, height = self._virtual_teacher(log_probs, labels)
        negative_entropy = other.log() + ((other + above) * height).sum(1, keepdim=True)
        cross = other * log_probs.sum(1, keepdim=True)
        cross = cross + (above * log_probs.gather(1, labels.index)).sum(1, keepdim=True)
        return (negative_entropy - cross).sum() / len(log_probs)
