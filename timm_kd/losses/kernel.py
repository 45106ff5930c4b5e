"""The numerics the losses share: softmax, the split into labels and rest, standardisation.

Everything here is per row of `[B, C]` logits in float32 or wider, and row quantities keep their dimension: `[B, 1]`.
Upper half: plain formulas, differentiable any number of times. Lower half: the same in as few passes over memory as
eager kernels allow; a function whose name ends in an underscore, and `split`, write into their first argument.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .targets import Labels

# A logit whose probability is 0. Finite, so that 0 * it is 0 and a row of nothing else is not NaN.
NEGLIGIBLE = -1e30


def soften_teacher(teacher: Tensor, temperature: float) -> Tensor:
    """Return `teacher / temperature` in a new buffer, with masked (-inf) classes made negligible."""
    return teacher.clamp(min=NEGLIGIBLE * temperature).mul_(1 / temperature)


def prepare(student: Tensor, teacher: Tensor, labels: Labels, logit_std: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of student and teacher, standardised with `logit_std`, and the scale of each row, `[B, 1]`.

    The scale makes a sum over rows the mean: 1 / B, and 0 where the teacher lacks (-inf) a class of the row.
    """
    known = teacher.gather(1, labels.index) != -math.inf
    if known.shape[1] > 1:
        known = known.all(1, keepdim=True)
    scale = known.to(teacher.dtype) / len(teacher)
    if logit_std:
        return standardize(student), standardize(teacher), scale
    return student, teacher, scale


def standardize(logits: Tensor) -> Tensor:
    """Standardise each row: `(z - mean) / (1e-7 + std)`, unbiased std (Sun et al. 2024, arXiv 2403.01427)."""
    centered = logits - logits.mean(1, keepdim=True)
    return centered / (1e-7 + _std(centered))


def _std(centered: Tensor) -> Tensor:
    # torch.std takes ten times as long on the CPU, and its gradient is no better at 0.
    return torch.linalg.vector_norm(centered, dim=1, keepdim=True) / math.sqrt(centered.shape[1] - 1)


def log_split(logits: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the partition {rest, label, ...} and, within the rest, of its classes.

    The rest is every class that is no label of its row. Its share is a logsumexp over those classes alone, never 1
    minus something.

    Returns:
        `[B, 1 + K]` (the rest first; a label that is not present is negligible) and `[B, C]` (negligible at labels).
    """
    rest = logits.scatter(1, labels.index, NEGLIGIBLE)
    parts = _log_parts(rest.logsumexp(1, keepdim=True), logits.gather(1, labels.index), labels)
    return parts, rest.log_softmax(1)


def _log_parts(rest: Tensor, at_labels: Tensor, labels: Labels) -> Tensor:
    return torch.cat([rest, labels.where_present(at_labels, NEGLIGIBLE)], dim=1).log_softmax(1)


def has_rest(log_parts: Tensor) -> Tensor:
    """Return, `[B, 1]`, 1 for rows with a class outside their labels, 0 where there is none or all are masked."""
    return (log_parts[:, :1] > NEGLIGIBLE / 2).to(log_parts.dtype)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return `KL(p || q)` of each row from log-probabilities, `[B, 1]`."""
    return (log_p.exp() * (log_p - log_q)).sum(1, keepdim=True)


class Softmax(NamedTuple):
    """The softmax of each row, and what its logsumexp is made of: `top - log(peak)`.

    Attributes:
        probs: `[B, C]`.
        top: The largest logit, `[B, 1]`.
        peak: Its probability, `[B, 1]`: one over the sum of exponentials of `logits - top`.
    """
    probs: Tensor
    top: Tensor
    peak: Tensor

    def logsumexp(self) -> Tensor:
        return self.top - self.peak.log()


def softmax(logits: Tensor) -> Softmax:
    """Return the softmax of each row with its normaliser; `logits` is left as it is."""
    probs = logits.softmax(1)
    return Softmax(probs, logits.amax(1, keepdim=True), probs.amax(1, keepdim=True))


class Split(NamedTuple):
    """Each row split into its labels and the rest.

    Attributes:
        rest: The softmax over the classes that are no label; probabilities are 0 at the labels.
        log_parts: Log-probabilities of the partition {rest, label, ...}, `[B, 1 + K]`, as `log_split` gives them.
    """
    rest: Softmax
    log_parts: Tensor


def split(logits: Tensor, labels: Labels) -> Split:
    """Return each row split; `logits` is consumed, a negligible value written at its labels."""
    at_labels = logits.gather(1, labels.index)
    rest = softmax(logits.scatter_(1, labels.index, NEGLIGIBLE))
    return Split(rest, _log_parts(rest.logsumexp(), at_labels, labels))


def teacher_cross_(logits: Tensor, teacher: Softmax, student_logits: Tensor, scale: float) -> Tensor:
    """Return `sum_i p_i (logits_i - scale * student_logits_i)`, `[B, 1]`; consumes `logits`, the teacher's."""
    return logits.sub_(student_logits, alpha=scale).mul_(teacher.probs).sum(1, keepdim=True)


def kl_from_cross(cross: Tensor, teacher: Softmax, student: Softmax) -> Tensor:
    """Return `KL(teacher || student)` of each row from `teacher_cross_`, `[B, 1]`.

    The two logsumexps are never rounded on their own: at a high temperature both are near log(C), and the divergence
    is smaller than their last digits.
    """
    return cross - (teacher.top - student.top) - (student.peak / teacher.peak).log()


def standardize_backward_(gradient: Tensor, logits: Tensor) -> Tensor:
    """Pull `d / d standardize(logits)` back to `d / d logits`, in place: through the mean and the deviation."""
    centered = logits - logits.mean(1, keepdim=True)
    std = _std(centered)
    unit = centered.div_(1e-7 + std)
    along = (gradient * unit).sum(1, keepdim=True)
    along = torch.where(std > 0, along / ((logits.shape[1] - 1) * std), 0)
    gradient.sub_(gradient.mean(1, keepdim=True)).div_(1e-7 + std)
    return gradient.addcmul_(unit, along, value=-1)
