"""One epoch of training, one pass of validation."""
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator, TrainingTask, evaluation_sample_limit
from timm.utils import AverageMeter, dispatch_clip_grad
from torch import nn

from .meters import StepTotals, TeacherEvaluator

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSettings:
    """How a batch is brought to the model and its gradient to the optimizer.

    Args:
        device: Where the model is.
        dtype: Dtype of the model and its images; None for float32.
        autocast: Makes the context that forwards run in.
        prefetched: Whether the loader delivers to the device (timm's `PrefetchLoader`).
        channels_last: Memory format of the images.
        grad_accum_steps: Batches per optimizer update; the last update of an epoch may have fewer.
        clip_grad: Gradient clipping value; None for none.
        clip_mode: 'norm', 'value' or 'agc'.
        synchronize: Wait for the device after each update (`--synchronize-step`).
        batch_loss_scale: 'none', 'sqrt' or 'linear': how the loss that goes into backward grows with the batch size.
        reference_batch_size: The batch size whose loss scale is 1.
        uneven_ranks: How many processes train, where their batches differ in size (NaFlex); else 1.
    """
    device: torch.device
    dtype: torch.dtype | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext
    prefetched: bool = True
    channels_last: bool = False
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    synchronize: bool = False
    batch_loss_scale: str = 'none'
    reference_batch_size: float = 1.0
    uneven_ranks: int = 1

    def prepare(
            self,
            input: torch.Tensor | dict[str, torch.Tensor],
            target: torch.Tensor,
            mixup_fn: Callable | None = None,
    ) -> tuple[torch.Tensor | dict[str, torch.Tensor], torch.Tensor]:
        """Bring a batch of a loader to the device, mix it, and put its images into the model's memory format.

        The dict of patches that a NaFlex loader makes is on the device and mixed already.
        """
        if not self.prefetched:
            input, target = input.to(device=self.device, dtype=self.dtype), target.to(device=self.device)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input, target

    def loss_scale(self, batch_size: int) -> float:
        """Return the factor that the loss of a batch of this size gets for backward."""
        if self.batch_loss_scale == 'none':
            return 1.0
        ratio = batch_size / self.reference_batch_size
        return ratio if self.batch_loss_scale == 'linear' else ratio ** 0.5

    def share(self, batch_size: int) -> torch.Tensor:
        """Return this process's number of images over the mean of all processes, each of which must call this.

        DDP averages gradients over processes. Times this factor, it averages them over images.
        """
        total = torch.full((), float(batch_size), device=self.device)
        torch.distributed.all_reduce(total)
        return self.uneven_ranks * batch_size / total


@dataclass
class Progress:
    """Where an epoch stands after an update; what logs and recovery checkpoints need."""
    epoch: int
    update_idx: int
    updates_per_epoch: int
    batch_idx: int
    input: torch.Tensor | dict[str, torch.Tensor]
    step_time: AverageMeter
    data_time: AverageMeter
    samples: int


def train_one_epoch(
        task: TrainingTask,
        loader: torch.utils.data.DataLoader,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        settings: StepSettings,
        totals: StepTotals,
        *,
        loss_scaler: Callable | None = None,
        lr_scheduler: Scheduler | None = None,
        mixup_fn: Callable | None = None,
        first_batch: int = 0,
        on_update: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train for an epoch, step for step as timm's script does.

    Nothing in a step waits for the device: losses are summed there in float64 and read when `on_update` asks.

    Args:
        task: The task; `task(input, target)` returns a dict with `loss` and further scalars to average.
        loader: Training loader; an epoch has `len(loader)` batches.
        optimizer: The optimizer.
        epoch: Number of the epoch, from 0.
        settings: How batches and gradients are handled.
        totals: Takes the sums of all scalars that the task returns.
        loss_scaler: timm's `NativeScaler` under float16 AMP.
        lr_scheduler: Stepped after each update.
        mixup_fn: timm's `Mixup`, for loaders without prefetcher.
        first_batch: Batches of this epoch that are already done (and that the loader leaves out).
        on_update: Called after each update.
    """
    num_batches, accum_steps = len(loader), settings.grad_accum_steps
    last_accum_steps = num_batches % accum_steps or accum_steps
    updates_per_epoch = -(-num_batches // accum_steps)
    create_graph = getattr(optimizer, 'is_second_order', False)
    num_updates = epoch * updates_per_epoch + first_batch // accum_steps
    step_time, data_time = AverageMeter(), AverageMeter()
    task.train()
    optimizer.zero_grad()
    samples, data_seconds, update_start = 0, 0.0, time.time()
    for batch_idx, (input, target), seconds in _timed(loader, first_batch):
        data_seconds += seconds
        input, target = settings.prepare(input, target, mixup_fn)
        need_update = (batch_idx + 1) % accum_steps == 0 or batch_idx + 1 == num_batches
        divisor = last_accum_steps if batch_idx >= num_batches - last_accum_steps else accum_steps
        with nullcontext() if need_update else task.no_sync():
            with settings.autocast():
                result = task(input, target)
                loss = result['loss'] / divisor if divisor > 1 else result['loss']
                scale = settings.loss_scale(len(target))
                scaled_loss = loss * scale if scale != 1 else loss
                if settings.uneven_ranks > 1:
                    scaled_loss = scaled_loss * settings.share(len(target))
            _backward(scaled_loss, task, optimizer, settings, loss_scaler, create_graph, need_update)
        totals.update(result, loss, divisor, batch_idx, len(target))
        samples += len(target)
        if not need_update:
            continue
        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if settings.synchronize and settings.device.type == 'cuda':
            torch.cuda.synchronize()
        now = time.time()
        step_time.update(now - update_start)
        data_time.update(data_seconds)
        on_update(Progress(
            epoch, batch_idx // accum_steps, updates_per_epoch, batch_idx, input, step_time, data_time, samples,
        ))
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates)
        samples, data_seconds, update_start = 0, 0.0, now
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()


def _timed(loader: torch.utils.data.DataLoader, first_batch: int) -> Iterator[tuple[int, tuple, float]]:
    """Enumerate the batches with the seconds that each was waited for."""
    start = time.time()
    for batch_idx, batch in enumerate(loader, start=first_batch):
        yield batch_idx, batch, time.time() - start
        start = time.time()


def _backward(
        loss: torch.Tensor,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        settings: StepSettings,
        loss_scaler: Callable | None,
        create_graph: bool,
        need_update: bool,
) -> None:
    def parameters():
        return task.get_clip_parameters(exclude_head='agc' in settings.clip_mode)

    if loss_scaler is not None:
        loss_scaler(
            loss,
            optimizer,
            clip_grad=settings.clip_grad,
            clip_mode=settings.clip_mode,
            parameters=parameters(),
            create_graph=create_graph,
            need_update=need_update,
        )
        return
    loss.backward(create_graph=create_graph)
    if need_update:
        if settings.clip_grad is not None:
            dispatch_clip_grad(parameters(), value=settings.clip_grad, mode=settings.clip_mode)
        optimizer.step()


@torch.no_grad()
def validate(
        model: nn.Module,
        loader: torch.utils.data.DataLoader,
        evaluator: ClassificationEvaluator | TeacherEvaluator,
        settings: StepSettings,
        *,
        tta: int = 0,
        distributed: bool = False,
        on_batch: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda batch_idx, output, target: None,
) -> OrderedDict[str, float] | list[OrderedDict[str, float]]:
    """Evaluate a model on a loader: the student, its EMA or a teacher.

    Args:
        model: Maps images to logits `[B, ...]`, such as the evaluator takes.
        loader: Validation loader.
        evaluator: What accumulates the metrics: timm's, or one of `meters`.
        settings: How batches are handled.
        tta: Copies of each sample that stand side by side in a batch, whose logits are averaged.
        distributed: Sum the counts over all ranks.
        on_batch: Called with the index, the logits and the target of each batch.

    Returns:
        What the evaluator computes; timm's gives `loss`, `top1` and `top5`, the latter two in percent.
    """
    model.eval()
    for batch_idx, (input, target) in enumerate(loader):
        input, target = settings.prepare(input, target)
        with settings.autocast():
            output = model(input)
        if isinstance(output, (tuple, list)):
            output = output[0]
        if tta > 1:
            output, target = output.unfold(0, tta, tta).mean(dim=-1), target[0:target.size(0):tta]
        evaluator.update(output, target)
        on_batch(batch_idx, output, target)
    return evaluator.compute(distributed=distributed)


class _SideBySide(nn.Module):
    """Maps images to the logits of all members of a teacher, `[B, members, C]`."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([member(images) for member in self.members], dim=1)


def evaluate_teacher(
        members: Sequence[nn.Module],
        loader: torch.utils.data.DataLoader,
        settings: StepSettings,
        *,
        tta: int = 0,
        distributed: bool = False,
) -> tuple[list[OrderedDict[str, float]], torch.Tensor]:
    """Evaluate the members of a teacher in one pass, as `validate` does the student.

    Returns:
        Metrics of each member, and the classes `[N]` that they predict together, in the order of the loader; with the
        student's `tta`, they are for the same rows as the student's.
    """
    evaluator = TeacherEvaluator(len(members), settings.device, max_samples=evaluation_sample_limit(loader))
    metrics = validate(_SideBySide(members), loader, evaluator, settings, tta=tta, distributed=distributed)
    for member, result in zip(members, metrics, strict=True):
        top1, chance = result['top1'], 100 / member.num_classes
        _logger.info(
            f'Teacher {member.describe()}: top-1 {top1:.2f} %, top-5 {result["top5"]:.2f} % on the validation set')
        if top1 <= chance:
            _logger.warning(
                f"teacher '{member.source}' is no better than chance (top-1 {top1:.2f} %, chance {chance:.2f} %): its "
                'classes are usually in another order than the data set has them (`class_map` says in which).')
    return metrics, evaluator.predictions()
