"""What is counted during an epoch, on the device and without waiting for it."""
from collections import OrderedDict
from functools import wraps
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from timm.utils import reduce_tensor

from .errors import CommandError, ExitCode
from .teacher import TeacherEnsemble


class NonFiniteLoss(CommandError, ArithmeticError):
    """The loss or the gradients became NaN or infinite."""
    exit_code = ExitCode.NON_FINITE

    def __init__(self, epoch: int, batch_idx: int, what: str):
        super().__init__(
            f'epoch {epoch}, batch {batch_idx}: {what}. Nothing was saved after it: lower `lr`, set `clip_grad`, or '
            'use bfloat16.'
        )


class StepTotals:
    """Sample-weighted sums of the scalars that a task returns, and the first batch in which each was not finite.

    The sums are what timm's `AverageMeter` computes on the host: float64, in the order of the batches. A batch whose
    scalars are not all finite is left out of them: without a loss scaler it ends the run, with one its step is skipped.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.names: tuple[str, ...] = ()
        self.count = torch.zeros((), dtype=self.dtype, device=device)
        self.sums = self.last = self.first_bad = self.bad_in_a_row = None

    def _start(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), dtype=self.dtype, device=self.device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.int64, device=self.device)
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.num_bad = torch.zeros((), dtype=torch.int64, device=self.device)

    def update(
            self,
            result: dict[str, torch.Tensor],
            loss: torch.Tensor,
            divisor: int,
            batch_idx: int,
            samples: int,
    ) -> None:
        """Add a batch: its `loss`, which accumulation divided by `divisor`, and the other scalars of `result`."""
        names = ('loss', *(name for name in result if name not in ('loss', 'output')))
        if not self.names:
            self._start(names)
        values = torch.stack([loss.detach().float(), *(result[name].detach().float() for name in names[1:])])
        bad = ~values.isfinite()
        any_bad = bad.any()
        self.first_bad = torch.where(bad & (self.first_bad < 0), batch_idx, self.first_bad)
        self.bad_in_a_row = (self.bad_in_a_row + 1) * any_bad
        self.num_bad += any_bad
        self.last = values.to(self.dtype)
        if divisor > 1:
            self.last[0] *= divisor
        self.sums += torch.where(any_bad, 0.0, self.last * samples)
        self.count += samples * ~any_bad

    def averages(self, world_size: int = 1) -> dict[str, float]:
        """Return the mean of each scalar over the samples so far, averaged over the ranks."""
        return self._read(self.sums / self.count, world_size)

    def latest(self, world_size: int = 1) -> dict[str, float]:
        """Return each scalar of the last batch, averaged over the ranks."""
        return self._read(self.last, world_size)

    def _read(self, values: torch.Tensor, world_size: int) -> dict[str, float]:
        if world_size > 1:
            values = reduce_tensor(values, world_size)
        return dict(zip(self.names, values.tolist(), strict=True))

    def check_finite(self, epoch: int, allowed_in_a_row: int = 0, distributed: bool = False) -> None:
        """Wait for the device and raise if a loss was not finite.

        Args:
            epoch: For the message.
            allowed_in_a_row: Batches in a row that may be bad, because a loss scaler skips them.
            distributed: Whether to raise in all processes where it was not finite in one; all must call it.

        Raises:
            NonFiniteLoss: Naming the epoch, the first bad batch and the component that failed first.
        """
        never = torch.iinfo(torch.int64).max
        first_bad = self.first_bad.where(self.first_bad >= 0, never)
        flags = torch.cat([first_bad, -self.bad_in_a_row[None]])
        if distributed:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
        *first_bad, bad_in_a_row = flags.tolist()
        bad = {name: batch for name, batch in zip(self.names, first_bad, strict=True) if batch < never}
        if not bad or (allowed_in_a_row and -bad_in_a_row < allowed_in_a_row):
            return
        # Parts come after their sum: the last name with the smallest batch index is the most specific one.
        component = min(reversed(bad), key=bad.get)
        raise NonFiniteLoss(epoch, bad[component], f'{component} is not finite')

    def state_dict(self) -> dict:
        """Return the running sums for a recovery checkpoint."""
        return {'names': list(self.names), 'sums': self.sums.tolist(), 'count': self.count.item()}

    def load_state_dict(self, state: dict) -> None:
        """Take up the sums of an interrupted epoch."""
        self._start(tuple(state['names']))
        self.sums += torch.tensor(state['sums'], dtype=self.dtype, device=self.device)
        self.count.fill_(state['count'])


class SkippedSteps:
    """Counts optimizer steps in a row that a loss scaler skipped, without waiting for the device.

    The `step` of the optimizer is wrapped. torch's scaler does not call it when it finds a gradient that is not finite.
    The `step` of a fused optimizer is always called: the scaler sets the attribute `found_inf` of the optimizer first,
    and both its kernel and this count read that on the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        device = optimizer.param_groups[0]['params'][0].device
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._most_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = True
        step = optimizer.step

        # No hook: an optimizer that wraps another (timm's Lookahead) does not call hooks.
        @wraps(step)
        def counted_step(*args: Any, **kwargs: Any) -> Any:
            found_inf = getattr(optimizer, 'found_inf', None)
            self._skipped = False if found_inf is None else (found_inf > 0).squeeze()
            return step(*args, **kwargs)

        optimizer.step = counted_step

    def count_update(self) -> None:
        """Count the update just made."""
        self._in_a_row = (self._in_a_row + 1) * self._skipped
        self._most_in_a_row = torch.maximum(self._most_in_a_row, self._in_a_row)
        self._skipped = True

    def most_in_a_row(self) -> int:
        """Return the longest run of skipped updates so far; waits for the device."""
        return int(self._most_in_a_row)


class AgreementEvaluator(ClassificationEvaluator):
    """timm's evaluator, which also tells how often a model predicts what the teacher predicted.

    `expected` are the classes `[N]` that the teacher predicted for the rows that this evaluator will see, in order.
    """

    def __init__(self, expected: torch.Tensor, device: torch.device, *, max_samples: int | None = None):
        super().__init__(device, max_samples=max_samples)
        self.expected = expected

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self.agreed = torch.zeros((), dtype=torch.int64, device=self.device)

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Count a batch of logits `[B, C]` and classes `[B]`."""
        first = self.num_samples
        super().update(output, target)
        expected = self.expected[first:self.num_samples]
        self.agreed += (output[:len(expected)].argmax(dim=-1) == expected).sum()

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Return timm's metrics and `agreement`, in percent, over all ranks."""
        metrics = super().compute(distributed=distributed)
        counts = torch.stack([self.agreed, self.counts[0]])
        if distributed:
            torch.distributed.all_reduce(counts)
        agreed, count = counts.tolist()
        metrics['agreement'] = 100 * agreed / max(count, 1)
        return metrics


class TeacherEvaluator:
    """Evaluates the members of a teacher side by side, and keeps the classes that they predict together."""

    def __init__(self, num_members: int, device: torch.device, *, max_samples: int | None = None):
        self._members = [ClassificationEvaluator(device, max_samples=max_samples) for _ in range(num_members)]
        self._predictions: list[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Count a batch: logits of all members `[B, members, C]` and classes `[B]`."""
        logits = output.unbind(dim=1)
        for evaluator, each in zip(self._members, logits, strict=True):
            evaluator.update(each, target)
        together = logits[0] if len(logits) == 1 else TeacherEnsemble.combine(logits)
        self._predictions.append(together.argmax(dim=-1))

    def compute(self, distributed: bool = False) -> list[OrderedDict[str, float]]:
        """Return timm's metrics of each member, over all ranks."""
        return [evaluator.compute(distributed=distributed) for evaluator in self._members]

    def predictions(self) -> torch.Tensor:
        """Return the predicted classes, `[N]` int64, in the order of this rank's rows."""
        return torch.cat(self._predictions)
