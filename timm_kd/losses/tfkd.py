"""Teacher-free KD (Yuan et al. 2020, "Revisit Knowledge Distillation: a Teacher-free Framework", arXiv 1909.11723)."""
from typing import ClassVar

import torch
from torch import Tensor

from .base import STUDENT, ClosedForm, Paper, knob, temperature_knob
from .kd import KDLoss
from .targets import Labels

_CITATION = """@inproceedings{yuan2020revisiting,
  author = {Li Yuan and Francis EH Tay and Guilin Li and Tao Wang and Jiashi Feng},
  title = {Revisiting Knowledge Distillation via Label Smoothing Regularization},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  note = {arXiv:1909.11723},
  year = {2020}
}"""


class TFKDLoss(KDLoss):
    """Without a teacher Tf-KD_reg, with one (the student's own pretrained copy) Tf-KD_self, which is `kd`.

    Tf-KD_reg distils a designed teacher that gives the target probability a and the others `(1 - a) / (C - 1)`,
    softened as the official code does it, by a softmax of these *probabilities* v: `u = softmax(v / T)`,
    `D = mean_b KL(u || p(z_s))`, the student not softened. Under Mixup `v = lam v_a + (1 - lam) v_b`. No components.

    T and the weights are those of the official ImageNet script.
    """
    paper = Paper(
        title='Teacher-free KD by regularization (Tf-KD reg)',
        formula=r'D = \operatorname{mean}\,\mathrm{KL}\big(\mathrm{softmax}(v/T)\,\|\,p(z_s)\big),\quad '
        r'v_y = a,\quad v_i = \frac{1 - a}{C - 1}\ (i \ne y)',
        symbols=STUDENT + r', \\(C\\) the number of classes',
        citations=(_CITATION,),
    )
    paper_with_teacher = KDLoss.paper._replace(
        title='Teacher-free KD by self-training (Tf-KD self)', citations=(_CITATION,))
    needs_teacher = False
    knobs_without_teacher = ('correct_prob',)
    default_task_weight = 0.9
    default_distill_weight = 0.1

    temperature: float = temperature_knob(20.0)
    logit_std: ClassVar[bool] = False  # a knob of `kd` alone
    correct_prob: float = knob(0.99, 'a, what the virtual teacher gives the true class', above=0, at_most=1)

    def formula(self, student: Tensor, teacher: Tensor | None, labels: Labels) -> dict[str, Tensor]:
        if teacher is not None:
            return super().formula(student, teacher, labels)
        return {'kd_loss': self._kl_of_virtual_teacher(student.log_softmax(1), labels)}

    def closed_form(self, student: Tensor, teacher: Tensor | None, labels: Labels) -> ClosedForm:
        if teacher is not None:
            return super().closed_form(student, teacher, labels)
        log_probs = student.log_softmax(1)
        result = {'kd_loss': self._kl_of_virtual_teacher(log_probs, labels)}
        other, above, _ = self._virtual_teacher(log_probs, labels)
        gradient = log_probs.exp_().sub_(other).scatter_add_(1, labels.index, -above)
        return result, gradient, torch.full_like(other, 1 / len(student))

    def _virtual_teacher(self, logits: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
        """Return u where there is no label, `[B, 1]`, and how far u and v / T exceed it at the labels, `[B, K]`."""
        num_classes = logits.shape[1]
        floor = (1 - self.correct_prob) / (num_classes - 1)
        height = labels.weight * ((self.correct_prob - floor) / self.temperature)
        odds = height.expm1()
        other = 1 / (num_classes + odds.sum(1, keepdim=True))
        return other, other * odds, height

    def _kl_of_virtual_teacher(self, log_probs: Tensor, labels: Labels) -> Tensor:
        """Return `mean_b KL(u || p)` from one sum over all classes: u is the same for all but the labels."""
        other, above, height = self._virtual_teacher(log_probs, labels)
        negative_entropy = other.log() + ((other + above) * height).sum(1, keepdim=True)
        cross = other * log_probs.sum(1, keepdim=True)
        cross = cross + (above * log_probs.gather(1, labels.index)).sum(1, keepdim=True)
        return (negative_entropy - cross).sum() / len(log_probs)
