"""What every distillation loss is: what its class says of itself, its checks, and the way its gradient is found."""
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import out_of_range
from .targets import Labels, read_target

# What `DistillationLoss.closed_form` returns: the result, and the gradient in two factors.
ClosedForm = tuple[dict[str, Tensor], Tensor, Tensor]

# How the papers' symbols are introduced, in Markdown with inline TeX.
LOGITS = r'\\(z_s\\) and \\(z_t\\) the logits of student and teacher, \\(p\\) their softmax'
STUDENT = r'\\(z_s\\) the logits of the student, \\(p\\) their softmax, \\(y\\) the true class'
OTHER_CLASSES = r'\\(y\\) the true class, \\(q\\) the softmax over the other classes'


class Paper(NamedTuple):
    """A loss as its paper states it: what a model card says of it.

    Attributes:
        title: Name of the loss.
        formula: The distillation term `D` in TeX.
        symbols: What stands in the formula, in Markdown with inline TeX.
        citations: BibTeX entries.
    """
    title: str
    formula: str
    symbols: str
    citations: tuple[str, ...]


def knob(
        default: float | bool,
        help: str,
        note: str = '',
        citation: str = '',
        **bounds: float,
) -> Any:
    """Declare a hyper-parameter: `beta: float = knob(8.0, 'weight of the other classes', at_least=0)`.

    It becomes an argument of the constructor and an attribute; the command line has a flag for it (`--kd-beta`).

    Args:
        default: The paper's value; its type is the knob's. A bool is a switch, False unless given.
        help: What it is, for `--help` and the model card: no capital, no full stop.
        note: Of a switch: what a model card says where it is on.
        citation: Of a switch: the BibTeX entry to cite where it is on.
        **bounds: Of a number: `above`, `at_least`, `below`, `at_most`.
    """
    metadata = {'help': help, 'note': note, 'citation': citation, 'bounds': bounds}
    return dataclasses.field(default=default, metadata=metadata)


def temperature_knob(default: float) -> Any:
    """Declare `temperature`, which several losses have."""
    return knob(default, 'T, which divides the logits before the softmax', above=0)


def logit_std_knob() -> Any:
    """Declare `logit_std`, the logit standardisation of Sun et al. 2024 (arXiv 2403.01427)."""
    return knob(
        False,
        'standardise the logits of each row before the temperature (Sun et al. 2024)',
        note=(
            'The logits of student and teacher are standardized first:\n\n'
            r'$$z \leftarrow \frac{z - \operatorname{mean}(z)}{\operatorname{std}(z)}$$'
        ),
        citation="""@inproceedings{sun2024logit,
  author = {Shangquan Sun and Wenqi Ren and Jingzhi Li and Rui Wang and Xiaochun Cao},
  title = {Logit Standardization in Knowledge Distillation},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  note = {arXiv:2403.01427},
  year = {2024}
}""",
    )


@dataclasses.dataclass(eq=False, repr=False)
class DistillationLoss(nn.Module):
    """Base of the distillation losses: a subclass, in a file of its own and in `KD_LOSSES`, says all there is to say.

    A subclass becomes a dataclass: its knobs, annotated and declared by `knob`, are the arguments of its constructor.
    It must say its `paper` and its `formula`. It may say a `closed_form` too, which computes the gradient beside the
    value in a few passes over memory, and keeps that gradient alone for backward. Training runs the closed form. The
    formula runs under autograd where there is no closed form, where the student needs no gradient, inside `torch.func`
    transforms (`grad`, `vmap`, `jvp`, `hessian`, ...), and with `double_backward`.

    Args:
        double_backward: Whether backward must be differentiable itself, as second-order optimizers need it (timm's
            `adahessian`). The closed form refuses that with an error.

    Attributes:
        paper: The loss as its paper states it.
        paper_with_teacher: The same where a teacher makes it another loss.
        needs_teacher: Whether the loss cannot do without teacher logits.
        accepts_teacher: Whether it can use them.
        knobs_without_teacher: Names of knobs that mean nothing where there is a teacher.
        component_names: Keys of the forward's result beside `kd_loss`.
        default_task_weight: Weight of the task loss in the paper's total.
        default_distill_weight: Weight of this loss in the paper's total.
        default_warmup: Share of a run's epochs over which the paper fades this loss in, 0 for none.

    Raises:
        ValueError: A knob outside of its range.
    """
    paper: ClassVar[Paper]
    paper_with_teacher: ClassVar[Paper | None] = None
    needs_teacher: ClassVar[bool] = True
    accepts_teacher: ClassVar[bool] = True
    knobs_without_teacher: ClassVar[tuple[str, ...]] = ()
    component_names: ClassVar[tuple[str, ...]] = ()
    default_task_weight: ClassVar[float] = 1.0
    default_distill_weight: ClassVar[float] = 1.0
    default_warmup: ClassVar[float] = 0.0

    double_backward: bool = dataclasses.field(default=False, kw_only=True)

    closed_form: ClassVar[Callable[..., ClosedForm] | None] = None
    """Compute what `formula` does, and the gradient; runs without autograd. Optional.

    Args: As `formula`.

    Returns:
        What `formula` returns; `gradient` `[B, C]` and `scale` `[B, 1]`, whose product is `d kd_loss / d student`.
        They stay apart because backward multiplies by the incoming gradient anyway.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(eq=False, repr=False)(cls)

    def __post_init__(self):
        super().__init__()
        for field in self.knobs():
            value = getattr(self, field.name)
            expected = out_of_range(value, **field.metadata['bounds'])
            if expected:
                raise ValueError(f'{field.name} must be {expected}, got {value}.')
            if isinstance(field.default, float):
                setattr(self, field.name, float(value))

    @classmethod
    def knobs(cls) -> list[dataclasses.Field]:
        """Return the declared knobs: `name`, `default`, and in `metadata` what else `knob` was told."""
        return [field for field in dataclasses.fields(cls) if 'help' in field.metadata]

    @classmethod
    def hyper_parameters(cls) -> dict[str, float | bool]:
        """Return names and default values of the knobs."""
        return {field.name: field.default for field in cls.knobs()}

    @classmethod
    def stated(cls, with_teacher: bool) -> Paper:
        """Return the paper of a run with or without a teacher."""
        return cls.paper_with_teacher or cls.paper if with_teacher else cls.paper

    @classmethod
    def default_warmup_epochs(cls, num_epochs: int) -> int:
        """Return the paper's warm-up for a run of `num_epochs`, in whole epochs: at least 1 where there is one."""
        return max(1, round(cls.default_warmup * num_epochs)) if cls.default_warmup else 0

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={getattr(self, name)}' for name in self.hyper_parameters())

    def formula(self, student: Tensor, teacher: Tensor | None, labels: Labels) -> dict[str, Tensor]:
        """Compute the loss in plain differentiable operations.

        Args:
            student: Logits, `[B, C]`, float32 or wider.
            teacher: Logits, the same; -inf for masked classes. None without a teacher.
            labels: The target, read.

        Returns:
            0-dim tensors: `kd_loss` and the components.
        """
        raise NotImplementedError

    def forward(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor | None,
            target: Tensor,
            smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
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
        device_type = student_logits.device.type
        in_transform = torch._C._are_functorch_transforms_active()  # as autograd.Function asks; no public name
        may_look = device_type == 'cpu' and not in_transform and not torch.compiler.is_compiling()
        no_gradient = not (student_logits.requires_grad and torch.is_grad_enabled())
        autocast = torch.amp.is_autocast_available(device_type)  # not on the meta device
        with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
            student, teacher = _widen(student_logits, teacher_logits)
            labels = read_target(target, student, smoothing, check=may_look)
            if may_look and teacher is not None and getattr(self, 'logit_std', False) and torch.isneginf(teacher).any():
                raise ValueError('logit_std cannot standardise teacher logits with masked (-inf) classes.')
            if self.closed_form is None or self.double_backward or in_transform or no_gradient:
                result = self.formula(student, teacher, labels)
            else:
                with torch.no_grad():
                    result, gradient, scale = self.closed_form(student.detach(), teacher, labels)
                result['kd_loss'] = _WithGradient.apply(student, result['kd_loss'], gradient, scale)
        return {name: value if name == 'kd_loss' else value.detach() for name, value in result.items()}

    def _check_logits(self, student: Tensor, teacher: Tensor | None) -> None:
        name = type(self).__name__
        if student.ndim != 2 or not student.is_floating_point():
            raise ValueError(
                f'student logits must be floating point [B, C], got {list(student.shape)} {student.dtype}.')
        if student.shape[1] < 2:
            raise ValueError(f'{name} needs at least 2 classes, the student logits have {student.shape[1]}.')
        if teacher is None:
            if self.needs_teacher:
                raise ValueError(f'{name} needs teacher logits, got None.')
        elif not self.accepts_teacher:
            raise ValueError(f'{name} has no teacher: pass None as its logits.')
        elif teacher.shape != student.shape or not teacher.is_floating_point():
            raise ValueError(
                f'teacher logits must be floating point {list(student.shape)} as the student\'s, '
                f'got {list(teacher.shape)} {teacher.dtype}.'
            )


def _widen(student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
                'no double backward through the closed form of a distillation loss: create it with '
                'double_backward=True to use its plain formula (create_graph=True, second-order optimizers such as '
                'adahessian).'
            )
        gradient, scale = ctx.saved_tensors
        return gradient * (scale * grad_output), None, None, None
