"""Fill a cache with the teacher alone: no student step, no loss."""
import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.task import ClassificationTask
from timm.utils import random_seed
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..build import count_epochs, model_dtype, step_settings
from ..cli import parse_args, resolve_kd
from ..data import TrainData
from ..engine import StepSettings, evaluate_teacher
from ..errors import UsageError
from ..process import Process, preserved_random_state, setup_process
from ..setup import create_data
from ..student import create_student
from .cached_teacher import CachedTeacher
from .setup import open_cached_teacher

_logger = logging.getLogger(__name__)


@dataclass
class TeacherRun:
    """The data side of a training run and its cached teacher, without the student."""

    args: argparse.Namespace
    process: Process
    data: TrainData
    steps: StepSettings
    teacher: CachedTeacher
    eval_loader: DataLoader | None

    @property
    def num_batches(self) -> int:
        return len(self.data.loader)

    def images(self, epoch: int, first_batch: int = 0) -> Iterable[torch.Tensor]:
        """Yield the batches of images of an epoch, as the student of a training run gets them."""
        self.data.set_epoch(epoch, first_batch)
        off_epoch = self.args.mixup_off_epoch
        self.data.set_mixup(not off_epoch or epoch < off_epoch)
        for input, target in self.data.loader:
            input, target = self.steps.place(input, target)
            if self.data.mixup_fn is not None:
                input, target = self.data.mixup_fn(input, target)
            yield self.steps.arrange(input)


def open_run(
        argv: list[str],
        epochs: Sequence[int] | None = None,
        live: bool = False,
) -> tuple[TeacherRun, Sequence[int]]:
    """Build what a training run with these flags would show its teacher.

    Args:
        argv: The training flags.
        epochs: Epochs to be read; None: all of the schedule.
        live: Load the teacher even where all rows of these epochs are present.

    Returns:
        The run, and its epochs.

    Raises:
        UsageError: The flags make no run with a cache, or one of fewer epochs; or the cache does not fit them or the
            disk.
    """
    args, args_text = parse_args(argv)
    kd = resolve_kd(args)
    if not args.teacher_cache or kd is None or kd.teacher is None:
        raise UsageError('the flags of a training run are needed, --teacher SPEC and --teacher-cache DIR among them.')
    if live:
        args.teacher_cache_rebuild = False  # looking changes nothing
    process = setup_process(args.device, args.device_modules)
    dtype = model_dtype(args)
    random_seed(args.seed, process.rank)
    # The student tells what its images are like, and is let go.
    _, data_config = create_student(args, replace(process, device=torch.device('cpu')), None)
    data, eval_loader = create_data(args, data_config, process, dtype)
    scheduled = range(count_epochs(args, len(data.loader)))
    epochs = scheduled if epochs is None else epochs
    if max(epochs) not in scheduled and not live:
        raise UsageError(
            f'--epochs-range {min(epochs)} {max(epochs) + 1}: the flags schedule {len(scheduled)} epochs, raise '
            '--epochs.'
        )
    teacher = open_cached_teacher(args, args_text, kd, data_config, data, eval_loader, process, dtype, epochs, live)
    steps = step_settings(args, process.device, dtype, data.reference_batch_size)
    return TeacherRun(args, process, data, steps, teacher, eval_loader), epochs


@torch.no_grad()
def fill(argv: list[str], epochs_range: tuple[int, int] | None = None) -> None:
    """Compute and store the logits of epochs, going on where an earlier fill stopped.

    Args:
        argv: The training flags.
        epochs_range: First epoch and the one after the last; None: all of the schedule.

    Raises:
        UsageError: As `open_run`; or the range is empty.
    """
    if epochs_range is not None and not 0 <= epochs_range[0] < epochs_range[1]:
        raise UsageError(f'--epochs-range {epochs_range[0]} {epochs_range[1]}: holds no epoch; the first is 0.')
    run, epochs = open_run(argv, None if epochs_range is None else range(*epochs_range))
    teacher, primary = run.teacher, run.process.primary
    teacher.must_store = True
    if teacher.teacher is None:
        return
    if run.args.torchcompile:
        teacher.compile(backend=run.args.torchcompile, mode=run.args.torchcompile_mode)
    if teacher.validation_key is not None:
        teacher.validation(lambda: _evaluate(run))
    if run.args.teacher_cache_epochs:
        epochs = sorted({epoch % run.args.teacher_cache_epochs for epoch in epochs})
    starts = {epoch: _first_absent(run, epoch) for epoch in epochs}
    batches = sum(run.num_batches - start for start in starts.values())
    images_per_batch = run.args.batch_size * run.process.world_size
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Bar and log lines share a terminal; a file gets the lines alone.
        visible = primary and sys.stderr.isatty()
        if visible:
            stack.enter_context(logging_redirect_tqdm())
        bar = stack.enter_context(tqdm(
            total=batches * images_per_batch, unit=' images', unit_scale=True, dynamic_ncols=True, disable=not visible,
        ))
        for epoch, start in starts.items():
            for batch, images in enumerate(run.images(epoch, start) if start < run.num_batches else (), start=start):
                if teacher.stored(batch) is None:
                    with run.steps.autocast():
                        teacher(images)
                bar.update(images_per_batch)
            teacher.flush()
            _logger.info(f'Teacher cache: epoch {epoch} is stored.')
    teacher.close()
    seconds = time.perf_counter() - started
    _logger.info(
        f'Teacher cache: {len(starts)} epochs, {batches * images_per_batch} images in {seconds:.1f} s '
        f'({batches * images_per_batch / max(seconds, 1e-9):.1f} images/s)'
    )


def _first_absent(run: TeacherRun, epoch: int) -> int:
    """Return the first batch of an epoch that has an absent row; the number of batches where there is none."""
    rows = run.teacher.epoch_rows(epoch)
    if not run.teacher.folder.epoch_path(epoch).exists():
        return 0
    file = run.teacher.folder.open_epoch(epoch)
    absent = np.flatnonzero(~file.has(rows))
    file.close()
    return int(absent[0]) // run.args.batch_size if len(absent) else run.num_batches


def _evaluate(run: TeacherRun) -> tuple[list[dict[str, float]], torch.Tensor]:
    # The evaluator of any classification task counts the same; its model is not asked.
    task = ClassificationTask(torch.nn.Identity(), device=run.steps.device, verbose=False)
    task.teacher = run.teacher
    with preserved_random_state():
        return evaluate_teacher(task, run.eval_loader, run.steps, run.process.distributed)
