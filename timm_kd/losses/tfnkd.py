"""Teacher-free NKD (Yang et al. 2022, arXiv 2208.10139; ICCV 2023, arXiv 2303.13005)."""
import torch
from torch import Tensor

from .base import STUDENT, ClosedForm, DistillationLoss, Paper
from .nkd import RETHINKING
from .targets import Labels


class TFNKDLoss(DistillationLoss):
    """The student's own confidence as soft label: `D = -mean_b(w log p_t(z_s))`, `w = p_t + 1 - mean_b p_t`, detached.

    Under Mixup the sum over both labels, `w_k = p_k + lam_k - mean p_k`; rows without a label k are out of its term and
    of its mean. The mean is over the rows of this process. No knob, no components, no teacher.
    """
    paper = Paper(
        title='Teacher-free NKD (tf-NKD)',
        formula=r'D = -\operatorname{mean}\,w\log p_y(z_s),\quad w = p_y(z_s) + 1 - \operatorname{mean}\,p_y(z_s)',
        symbols=STUDENT,
        citations=(RETHINKING,),
    )
    needs_teacher = False
    accepts_teacher = False

    def formula(self, student: Tensor, teacher: None, labels: Labels) -> dict[str, Tensor]:
        log_p = student.log_softmax(1).gather(1, labels.index)
        return {'kd_loss': _distill(log_p, _soft_labels(log_p.detach(), labels))}

    def closed_form(self, student: Tensor, teacher: None, labels: Labels) -> ClosedForm:
        log_probs = student.log_softmax(1)
        log_p = log_probs.gather(1, labels.index)
        weight = _soft_labels(log_p, labels)
        gradient = log_probs.exp_().mul_(weight.sum(1, keepdim=True)).scatter_add_(1, labels.index, -weight)
        scale = torch.full_like(weight[:, :1], 1 / len(student))
        return {'kd_loss': _distill(log_p, weight)}, gradient, scale


def _soft_labels(log_p: Tensor, labels: Labels) -> Tensor:
    p = labels.where_present(log_p.exp(), 0.0)
    rows = labels.where_present(torch.ones_like(p), 0.0).sum(0)
    mean = p.sum(0) / rows  # 0 / 0 for a second label that no row has: `where_present` then takes it for none
    return labels.where_present(p + labels.weight - mean, 0.0)


def _distill(log_p: Tensor, weight: Tensor) -> Tensor:
    return (weight * log_p).sum() / -len(log_p)
