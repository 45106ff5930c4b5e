"""What a run says while it goes: timm's log lines, a progress bar, TensorBoard and Weights & Biases."""
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torchvision
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from timm.utils import AverageMeter, setup_default_logging
from tqdm import tqdm  # comes with huggingface_hub
from tqdm.contrib.logging import logging_redirect_tqdm

from ..engine import Progress
from ..meters import StepTotals

_logger = logging.getLogger('train')


def setup_logging(speak: Callable[[str], str] = str) -> None:
    """Log to the console as timm's script does; other processes than the primary report errors alone.

    Args:
        speak: Puts a message into the words of the command line.
    """
    if not logging.root.handlers:
        setup_default_logging()

        def in_its_words(record: logging.LogRecord) -> bool:
            if record.name.startswith('timm_kd'):  # to others, `model` may be another argument
                record.msg, record.args = speak(record.getMessage()), ()
            return True

        logging.root.handlers[0].addFilter(in_its_words)
    logging.root.setLevel(logging.ERROR if int(os.environ.get('RANK', 0)) else logging.INFO)


@contextmanager
def progress_bar(total: int, primary: bool, **options: Any) -> Iterator[tqdm]:
    """Show a progress bar below the log lines, where stderr is a terminal; elsewhere, and on other ranks, none."""
    visible = primary and sys.stderr is not None and sys.stderr.isatty()
    known_width = visible and os.get_terminal_size(sys.stderr.fileno()).columns > 0  # 0 in some containers
    size = {'dynamic_ncols': True} if known_width else {'ncols': 80, 'nrows': 24}
    with (
        logging_redirect_tqdm() if visible else nullcontext(),
        tqdm(total=total, disable=not visible, **size, **options) as bar,
    ):
        yield bar


class RunLog:
    """Reports of one run; says nothing on other ranks than the primary.

    Args:
        output_dir: The run's folder; None on other ranks.
        log_interval: Updates, or batches of a validation pass, from one line to the next.
        world_size: Number of ranks whose losses are averaged.
        save_images: Save the batch of each line as a picture.
        tensorboard: Write TensorBoard events.
        wandb_options: Keywords of `wandb.init`; None for no Weights & Biases.
    """

    def __init__(
            self,
            output_dir: str | None,
            log_interval: int = 50,
            world_size: int = 1,
            save_images: bool = False,
            tensorboard: bool = False,
            wandb_options: dict[str, Any] | None = None,
    ):
        self.output_dir = output_dir
        self.log_interval = log_interval
        self.world_size = world_size
        self.save_images = save_images
        self.primary = output_dir is not None
        self._stack = ExitStack()
        self._bar = None
        self._tensorboard = None
        if self.primary and tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an extra, which the flags were checked for
            self._tensorboard = SummaryWriter(output_dir)
        self._wandb = _wandb_run(wandb_options) if self.primary and wandb_options is not None else None

    def start(self, total_updates: int) -> None:
        """Open the progress bar."""
        self._bar = self._stack.enter_context(progress_bar(total_updates, self.primary, unit='step'))

    def close(self) -> None:
        """Close the bar and the writers."""
        self._stack.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def is_due(self, progress: Progress) -> bool:
        """Tell whether an update is one that is logged, on any rank: reading the losses is collective."""
        return progress.update_idx % self.log_interval == 0 or progress.update_idx == progress.updates_per_epoch - 1

    def step(self, progress: Progress) -> None:
        """Count an update on the bar."""
        self._bar.set_description(f'epoch {progress.epoch}', refresh=False)
        self._bar.update()

    def train(self, progress: Progress, totals: StepTotals, lr: float) -> None:
        """Log an update in timm's format, components of the loss behind it; waits for the device."""
        now, average = totals.latest(self.world_size), totals.averages(self.world_size)
        if not self.primary:
            return
        samples = progress.samples * self.world_size
        step_time, data_time = progress.step_time, progress.data_time
        components = ''.join(f'  {name}: {now[name]:#.3g} ({average[name]:#.3g})' for name in totals.names[1:])
        _logger.info(
            f'Train: {progress.epoch} [{progress.update_idx:>4d}/{progress.updates_per_epoch} '
            f'({100. * (progress.update_idx + 1) / progress.updates_per_epoch:>3.0f}%)]  '
            f'Loss: {now["loss"]:#.3g} ({average["loss"]:#.3g})  '
            f'Time: {step_time.val:.3f}s, {samples / step_time.val:>7.2f}/s  '
            f'({step_time.avg:.3f}s, {samples / step_time.avg:>7.2f}/s)  '
            f'LR: {lr:.3e}  Data: {data_time.val:.3f} ({data_time.avg:.3f}){components}')
        if self.save_images:
            path = os.path.join(self.output_dir, f'train-batch-{progress.batch_idx}.jpg')
            torchvision.utils.save_image(progress.input, path, padding=0, normalize=True)

    def validation(
            self,
            evaluator: ClassificationEvaluator,
            last_idx: int,
            name: str = 'Test',
    ) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
        """Return a callback that logs a validation pass in timm's format: the batch's figures and the running ones."""
        batch_time = AverageMeter()
        start = time.time()

        def on_batch(batch_idx: int, output: torch.Tensor, target: torch.Tensor) -> None:
            nonlocal start
            batch_time.update(time.time() - start)
            start = time.time()
            if self.primary and (batch_idx == last_idx or batch_idx % self.log_interval == 0):
                of_batch = (MultiLabelClassificationEvaluator if target.ndim > 1 else ClassificationEvaluator)(
                    output.device)
                of_batch.update(output, target)
                now, average = of_batch.summary(), evaluator.summary()
                _logger.info(
                    f'{name}: [{batch_idx:>4d}/{last_idx}]  Time: {batch_time.val:.3f} ({batch_time.avg:.3f})  '
                    f'Loss: {now["loss"]:>7.3f} ({average["loss"]:>6.3f})'
                    + ''.join(f'  Acc@{k}: {now[f"top{k}"]:>7.3f} ({average[f"top{k}"]:>7.3f})'
                              for k in (1, 5) if f'top{k}' in now))
        return on_batch

    def epoch(self, row: dict[str, Any]) -> None:
        """Send a row of summary.csv to TensorBoard and Weights & Biases."""
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != 'epoch':
                    self._tensorboard.add_scalar(name.replace('_', '/', 1), value, row['epoch'])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(row)


def _wandb_run(options: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:  # timm's script goes on without it, too
        _logger.warning('--log-wandb: wandb is not installed, nothing is logged to it; pip install timm-kd[wandb].')
        return None
    return wandb.init(**options)
