"""KDTask: student, teacher and loss as a task of timm; and a `Teacher` for the distillation tasks that timm has."""
import logging
from collections.abc import Callable

import torch
from timm.task import ClassificationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

from .teacher import Teacher, TeacherEnsemble

_logger = logging.getLogger(__name__)


class KDTask(ClassificationTask):
    """Trains a student on its task loss and a distillation term.

    `loss = task_loss_weight * task_loss + distill_loss_weight * ramp * kd_loss`, with
    `ramp = min(epoch / warmup_epochs, 1)` over 1-based epochs (Zhao et al. 2022 ramp DKD so).

    Everything that timm does with a task (DDP, EMA, compile, checkpoints) sees the student alone: the teacher is no
    submodule, so it is in no state dict, no parameter list and no gradient bucket, and only follows `.to(device)`.

    Args:
        student: Model that maps images to logits `[B, C]`.
        kd_loss: A loss of `timm_kd.losses`.
        teacher: A `Teacher`, or any module from the student's images to logits `[B, C]`, which is frozen; or None.
        criterion: Task loss on `(logits, target)`; cross-entropy when None.
        smoothing: Label smoothing folded into dense targets `[B, C]` by timm's Mixup, which the loss undoes.
        task_loss_weight: Weight of the task loss.
        distill_loss_weight: Weight of the distillation term.
        warmup_epochs: Epochs over which the distillation term is ramped up; 0 for none.
        device: Device of the task's buffers.
        dtype: Dtype of the task's buffers.
        verbose: Log the composition of the loss.

    Raises:
        ValueError: If the loss needs a teacher and there is none, or takes none and there is one.
    """

    def __init__(
            self,
            student: nn.Module,
            kd_loss: nn.Module,
            teacher: nn.Module | None = None,
            criterion: nn.Module | Callable | None = None,
            smoothing: float = 0.0,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 1.0,
            warmup_epochs: float = 0,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        super().__init__(student, criterion, device=device, dtype=dtype, verbose=False)
        loss_name = type(kd_loss).__name__
        if kd_loss.needs_teacher and teacher is None:
            raise ValueError(f'{loss_name} needs a teacher: KDTask(..., teacher=Teacher(...)).')
        if teacher is not None and not kd_loss.accepts_teacher:
            raise ValueError(f'{loss_name} is teacher-free: KDTask(..., teacher=None).')
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
        self.kd_loss = kd_loss
        # In a tuple: nn.Module would register the teacher itself and carry it into state dicts and parameters.
        self._teacher = (teacher,)
        self.smoothing = smoothing
        self.task_loss_weight = task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.warmup_epochs = warmup_epochs
        # A buffer, not a float: a compiled step would be traced again for each new value.
        self.register_buffer('ramp', torch.ones((), device=self.device), persistent=False)
        if verbose:
            _logger.info(
                f'KDTask: {loss_name}({kd_loss.extra_repr()}), task weight {task_loss_weight:g}, '
                f'distillation weight {distill_loss_weight:g}, warm-up {warmup_epochs:g} epochs')

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, or None."""
        return self._teacher[0]

    def _apply(self, fn: Callable, *args, **kwargs) -> 'KDTask':
        super()._apply(fn, *args, **kwargs)
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(device=self.device)  # not to the dtype: the teacher has a precision of its own
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the ramp of the distillation term for the epoch under way, counted from 1."""
        self.ramp.fill_(min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0)

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs) -> nn.Module:
        """Compile the student and the teacher; return the student as validation and checkpoints see it."""
        if hasattr(self.teacher, 'compile'):
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return super().compile(backend=backend, mode=mode, **compile_kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the training loss of a batch.

        Args:
            input: Images `[B, in_chans, H, W]`, normalised for the student.
            target: Class indices `[B]`, or dense targets `[B, C]` as timm's Mixup makes them.

        Returns:
            `loss` for backward, `output` the student's logits, `task_loss`, `kd_loss` and the parts of the latter.
        """
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(input)
        parts = self.kd_loss(output, teacher_logits, target, smoothing=self.smoothing)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * self.ramp * parts['kd_loss']
        return {'loss': loss, 'output': output, 'task_loss': task_loss, **parts}


class TaskTeacher(DistillationTeacher):
    """A teacher of this project where timm's `FeatureDistillationTask` and `TokenDistillationTask` take one.

    It adapts the images itself (normalisation, size, channels), so it takes them as the student gets them.

    Args:
        teacher: The teacher; several only where logits are asked for.
        dtype: Dtype of its answers, that of the student; None for float32.
    """

    def __init__(self, teacher: Teacher | TeacherEnsemble, dtype: torch.dtype | None = None):
        nn.Module.__init__(self)  # timm's own loads a model, or wraps one that knows its normalisation
        self.teacher = teacher
        self.model = teacher.members[0].model  # where timm looks up the width of the features
        self.answer_dtype = dtype or torch.float32

    def normalize_input(self, input: torch.Tensor, *student_normalization: torch.Tensor) -> torch.Tensor:
        """Return the images as they are."""
        return input

    def compile(self, backend: str = 'inductor', mode: str | None = None, **options) -> 'TaskTeacher':
        """Compile what the teacher is asked for; `compile_model` and `compile_features` of timm's tasks say which."""
        options = {name: value for name, value in options.items() if not name.startswith('compile_')}
        self.teacher.compile(backend=backend, mode=mode, **options)
        return self

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Return logits `[B, C]`, or pooled features `[B, D]`, of images `[B, in_chans, H, W]`."""
        return (self.teacher.features if return_features else self.teacher)(input).to(self.answer_dtype)
