"""What every distillation loss is: checks, precision, and the choice between formula and closed form."""
import inspect
import math
from typing import Any

import torch
import torch.nn as nn

from .targets import Labels, read_target


class DistillationLoss(nn.Module):
    """Base of the distillation losses.

    A subclass says the same thing twice. `formula` is the paper's, in plain differentiable operations. `closed_form`
    computes the gradient beside the value, in a few passes over memory, and keeps that gradient alone for backward.
    The closed form is what training runs. The formula runs where the student needs no gradient, inside `torch.func`
    transforms (`grad`, `vmap`, `jvp`, `hessian`, ...), and where `double_backward` is set: second-order optimizers
    (timm's `adahessian`) differentiate the gradient, which the closed form refuses with an error.

    The constructor's parameters are the loss's hyper-parameters, no more.

    Attributes:
        double_backward: Whether backward must be differentiable itself. False; set it before the forward.
        needs_teacher: Whether the loss cannot do without teacher logits.
        accepts_teacher: Whether it can use them.
        component_names: Keys of the forward's result beside `kd_loss`.
        default_task_weight: Weight of the task loss in the paper's total.
        default_distill_weight: Weight of this loss in the paper's total.
        default_warmup: Share of a run's epochs over which the paper fades this loss in, 0 for none.
    """
    needs_teacher: bool = True
    accepts_teacher: bool = True
    component_names: tuple[str, ...] = ()
    default_task_weight: float = 1.0
    default_distill_weight: float = 1.0
    default_warmup: float = 0.0

    def __init__(self):
        super().__init__()
        self.double_backward = False

    @classmethod
    def hyper_parameters(cls) -> dict[str, Any]:
        """Names and default values of the hyper-parameters: what the constructor takes."""
        return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}

    @classmethod
    def default_warmup_epochs(cls, num_epochs: int) -> int:
        """Return the paper's warm-up for a run of `num_epochs`, in whole epochs: at least 1 where there is one."""
        return max(1, round(cls.default_warmup * num_epochs)) if cls.default_warmup else 0

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={getattr(self, name)}' for name in self.hyper_parameters())

    def formula(self, student: torch.Tensor, teacher: torch.Tensor | None, labels: Labels) -> dict[str, torch.Tensor]:
        """The loss in plain operations.

        Args:
            student: Logits, `[B, C]`, float32 or wider.
            teacher: Logits, the same; -inf for masked classes. None without a teacher.
            labels: The target, read.

        Returns:
            0-dim tensors: `kd_loss` and the components.
        """
        raise NotImplementedError

    def closed_form(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor | None,
            labels: Labels,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """The same values, with the gradient; runs without autograd.

        Returns:
            What `formula` returns; `gradient` `[B, C]` and `scale` `[B, 1]`, whose product is `d kd_loss / d student`
            (apart, because the product with the incoming gradient follows anyway).
        """
        raise NotImplementedError

    def forward(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor | None,
            target: torch.Tensor,
            smoothing: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Compute the distillation term of a batch.

        Args:
            student_logits: `[B, C]`, any floating dtype; half precisions are widened to float32, under autocast too.
            teacher_logits: `[B, C]`, never differentiated; None where there is no teacher. Classes the teacher does
                not know are -inf; a row of such a class has no distillation term, the mean stays over all B rows.
            target: `[B]` class indices, or `[B, C]` as timm's Mixup makes them.
            smoothing: The label smoothing folded into a dense target.

        Returns:
            0-dim tensors: `kd_loss`, with gradient, and the loss's components, detached. NaN logits give NaN.

        Raises:
            ValueError: Shapes that do not fit, fewer than 2 classes, a teacher missing or not wanted, a bad target. A
                class index out of range is found here on the CPU, by the device's own assertion on others: reading
                it back would stall each step. Compiled code leaves it to the kernels as well.
        """
        self._check_logits(student_logits, teacher_logits)
        in_transform = torch._C._are_functorch_transforms_active()  # what autograd.Function asks too; no public name
        may_look = student_logits.device.type == 'cpu' and not in_transform and not torch.compiler.is_compiling()
        with torch.autocast(student_logits.device.type, enabled=False):
            student, teacher = _widen(student_logits, teacher_logits)
            labels = read_target(target, student, smoothing, check=may_look)
            if may_look:
                self._check_values(teacher)
            if self.double_backward or in_transform or not (student.requires_grad and torch.is_grad_enabled()):
                result = self.formula(student, teacher, labels)
            else:
                with torch.no_grad():
                    result, gradient, scale = self.closed_form(student.detach(), teacher, labels)
                result['kd_loss'] = _WithGradient.apply(student, result['kd_loss'], gradient, scale)
        return {name: value if name == 'kd_loss' else value.detach() for name, value in result.items()}

    def _check_logits(self, student: torch.Tensor, teacher: torch.Tensor | None) -> None:
        name = type(self).__name__
        if student.ndim != 2 or not student.is_floating_point():
            raise ValueError(f'student logits must be floating point [B, C], got {list(student.shape)} {student.dtype}')
        if student.shape[1] < 2:
            raise ValueError(f'{name} needs at least 2 classes, the student logits have {student.shape[1]}')
        if teacher is None:
            if self.needs_teacher:
                raise ValueError(f'{name} needs teacher logits, got None')
        elif not self.accepts_teacher:
            raise ValueError(f'{name} has no teacher: pass None as its logits')
        elif teacher.shape != student.shape or not teacher.is_floating_point():
            raise ValueError(
                f'teacher logits must be floating point {list(student.shape)} as the student\'s, '
                f'got {list(teacher.shape)} {teacher.dtype}'
            )

    def _check_values(self, teacher: torch.Tensor | None) -> None:
        if teacher is not None and getattr(self, 'logit_std', False) and bool(torch.isneginf(teacher).any()):
            raise ValueError('logit_std cannot standardise teacher logits with masked (-inf) classes')


def _widen(student: torch.Tensor, teacher: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    if teacher is None:
        return student.to(dtype), None
    dtype = torch.promote_types(dtype, teacher.dtype)
    return student.to(dtype), teacher.detach().to(dtype)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known already. It is scaled in its own wide dtype; autograd casts afterwards."""

    @staticmethod
    def forward(ctx, student, value, gradient, scale):
        ctx.save_for_backward(gradient, scale)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError(
                'no double backward through the closed form of a distillation loss: set `kd_loss.double_backward = '
                'True` to use its plain formula (create_graph=True, second-order optimizers such as adahessian)'
            )
        gradient, scale = ctx.saved_tensors
        return gradient * (scale * grad_output), None, None, None


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is a positive, finite number; raise ValueError otherwise."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f'{name} must be a positive number, got {value}')
    return float(value)


def check_weight(name: str, value: float) -> float:
    """Return `value` if it is a finite number >= 0; raise ValueError otherwise."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f'{name} must be a number >= 0, got {value}')
    return float(value)
