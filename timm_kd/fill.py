"""The teacher alone over the training data: its logits stored ahead of training, or compared with those stored."""
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .cli import parse_args, resolve_kd
from .errors import UsageError, shortened
from .files import open_regular
from .process import setup_process
from .run.log import progress_bar
from .setup import Setup, count_epochs, evaluate_run_teacher, open_teacher, set_up
from .teacher_cache import CachedTeacher
from .teacher_cache.folder import ARGS_FILE, epoch_files, epoch_path, read_precision, read_rows

_logger = logging.getLogger(__name__)

# The only flags that `verify` takes from a cache's args.yaml: those that decide images and logits. By others, whoever
# wrote that file could run code, write files or download: device_modules, dataset_trust_remote_code, dataset_download,
# the student's weights, output, wandb and hub flags, and the keyword arguments of models (timm has `checkpoint_path`
# and `cache_dir` among them). A cache that was filled with --teacher-kwargs or --model-kwargs needs them on the command
# line too; the refusal of its key says so.
_TRUSTED_FLAGS = (
    'data', 'data_dir', 'dataset', 'train_split', 'train_num_samples', 'class_map', 'input_key', 'target_key',
    'input_img_mode', 'epoch_repeats', 'seed', 'batch_size', 'no_prefetcher', 'model', 'num_classes', 'img_size',
    'in_chans', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'model_dtype', 'channels_last', 'no_aug',
    'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob',
    'gaussian_blur_prob', 'aa', 'train_interpolation', 'reprob', 'remode', 'recount', 'resplit', 'mixup', 'cutmix',
    'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch', 'crops_per_image',
    'teacher', 'kd_model_name', 'teacher_model', 'teacher_ema', 'teacher_img_size', 'teacher_dtype',
    'teacher_class_map', 'teacher_class_map_missing', 'amp', 'amp_dtype', 'teacher_cache_dtype', 'teacher_cache_topk',
)

# Another batch size or device orders sums differently: a few units of bfloat16's last place (2^-8).
_TOLERANCE = 0.02


@dataclass(frozen=True)
class TeacherRun:
    """What a training run would show its teacher in some epochs, and that teacher."""
    setup: Setup
    teacher: CachedTeacher
    epochs: Sequence[int]

    @property
    def num_batches(self) -> int:
        return len(self.setup.data.loader)

    def images(self, epoch: int, first_batch: int = 0) -> Iterator[torch.Tensor]:
        """Yield the batches of images of an epoch, as the student of a training run gets them."""
        data, steps = self.setup.data, self.setup.steps
        data.set_epoch(epoch, first_batch)
        for input, target in data.loader:
            yield steps.prepare(input, target, data.mixup_fn)[0]

    def rows(self, epoch: int) -> np.ndarray:
        """Return the numbers of the rows that this rank reads in an epoch, `[N]`."""
        return self.teacher.folder.epoch_rows(self.setup.data.loader.batch_sampler, epoch)


def open_run(argv: list[str], epochs: Sequence[int] | None = None, live: bool = False) -> TeacherRun:
    """Build what a training run with these flags would show its teacher.

    Args:
        argv: The training flags.
        epochs: Epochs to be read; None: all of the schedule.
        live: Load the teacher even where all rows of these epochs are present.

    Raises:
        UsageError: The flags make no run with a cache, or one of fewer epochs; or the cache does not fit them or the
            disk.
    """
    args, args_text = parse_args(argv)
    kd = resolve_kd(args)
    if not args.teacher_cache or kd is None or kd.teacher is None:
        raise UsageError('the flags of a training run are needed, --teacher SPEC and --teacher-cache DIR among them.')
    setup = set_up(args, args_text, setup_process(args.device, args.device_modules), trains=False)
    scheduled = range(count_epochs(setup))
    epochs = scheduled if epochs is None else epochs
    if max(epochs) not in scheduled and not live:
        raise UsageError(
            f'--epochs-range {min(epochs)} {max(epochs) + 1}: the flags schedule {len(scheduled)} epochs, raise '
            '--epochs.'
        )
    return TeacherRun(setup, open_teacher(setup, epochs, live), epochs)


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
    run = open_run(argv, None if epochs_range is None else range(*epochs_range))
    with run.teacher:
        if run.teacher.teacher is not None:  # else all rows are there
            _fill(run)


def _fill(run: TeacherRun) -> None:
    args = run.setup.args
    if args.torchcompile:
        run.teacher.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if run.teacher.validation_key is not None:
        evaluate_run_teacher(run.setup, run.teacher)
    starts = {epoch: _first_absent(run, epoch) for epoch in run.setup.data.loader.batch_sampler.distinct(run.epochs)}
    images_per_batch = args.batch_size * run.setup.process.world_size
    num_images = images_per_batch * sum(run.num_batches - start for start in starts.values())
    started = time.perf_counter()
    with progress_bar(num_images, run.setup.process.primary, unit=' images', unit_scale=True) as bar:
        for epoch, start in starts.items():
            for images in run.images(epoch, start) if start < run.num_batches else ():
                with run.setup.steps.autocast():
                    run.teacher(images)
                bar.update(images_per_batch)
            _logger.info(f'Teacher cache: epoch {epoch} is stored.')
    seconds = time.perf_counter() - started
    _logger.info(
        f'Teacher cache: {len(starts)} epochs, {num_images} images in {seconds:.1f} s '
        f'({num_images / max(seconds, 1e-9):.1f} images/s)'
    )


def _first_absent(run: TeacherRun, epoch: int) -> int:
    """Return the first batch of an epoch that has an absent row; the number of batches where there is none."""
    if not run.teacher.folder.has_epoch(epoch):
        return 0
    with closing(run.teacher.folder.open_epoch(epoch)) as file:
        absent = np.flatnonzero(~file.has(run.rows(epoch)))
    return int(absent[0]) // run.setup.args.batch_size if len(absent) else run.num_batches


def verify(folder: str | Path, further: list[str], batches_per_epoch: int = 2) -> bool:
    """Compute a sample of the stored rows again and compare; checksums are checked for all rows.

    Args:
        folder: The cache; the flags it was filled with lie in it.
        further: Flags that override those.
        batches_per_epoch: Batches to compute again of each stored epoch.

    Returns:
        Whether all rows hold: the checksums, and the logits within 2 % of the row's largest.

    Raises:
        UsageError: The folder is no cache, or data or teacher are not what it was filled with.
    """
    folder = Path(folder)
    read_rows(folder)
    epochs = list(epoch_files(folder))
    if not epochs:
        _logger.info(f'{folder} holds no rows yet.')
        return True
    with tempfile.TemporaryDirectory() as home:
        config = Path(home, ARGS_FILE)
        config.write_text(yaml.safe_dump(_trusted_flags(folder)))
        # The loader reads ahead of the one batch that is compared: without workers, not far.
        argv = ['--config', str(config), '--teacher-cache', str(folder), '--val-split', '', '--workers', '0', *further]
        run = open_run(argv, epochs, live=True)
    with run.teacher:
        return all([_verify_epoch(run, epoch, batches_per_epoch) for epoch in epochs])


def _trusted_flags(folder: Path) -> dict[str, Any]:
    """Read the flags of a cache that decide images and logits, with the precision in which its teacher answered."""
    path = folder / ARGS_FILE
    try:
        with open(open_regular(path, os.O_RDONLY), encoding='utf-8') as file:
            flags = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f'{path} cannot be read ({shortened(error)}): give the flags after the folder.') from error
    if not isinstance(flags, dict):
        raise UsageError(f'{path} holds no flags: give the flags after the folder.')
    flags = {name: value for name, value in flags.items() if name in _TRUSTED_FLAGS}
    precision = read_precision(folder)
    if flags.get('teacher_dtype', 'auto') == 'auto' and precision:
        flags['teacher_dtype'] = precision  # on this machine `auto` may be another
    return flags


@torch.no_grad()
def _verify_epoch(run: TeacherRun, epoch: int, num_batches: int) -> bool:
    folder = run.teacher.folder
    file = folder.open_epoch(epoch)
    damaged = len(file.drop_damaged())  # the next run with the teacher computes them again
    present = file.has(run.rows(epoch)).reshape(run.num_batches, -1).all(axis=1)
    file.close()
    complete = np.flatnonzero(present)
    sample = np.random.default_rng(epoch).choice(complete, min(num_batches, len(complete)), replace=False)
    worst = max((_difference(run, epoch, batch) for batch in sorted(sample.tolist())), default=0.0)
    if worst > _TOLERANCE:
        verdict = f'DIFFERS, delete {epoch_path(folder.path, epoch)} to have it computed again'
    elif damaged:
        verdict = 'DAMAGED'
    else:
        verdict = 'holds' if len(sample) else 'nothing to compare'
    _logger.info(
        f'epoch {epoch}: {damaged} damaged rows; {len(sample)} of {len(complete)} batches computed again, largest '
        f'difference {worst:.2e} of the largest logit: {verdict}'
    )
    return not damaged and worst <= _TOLERANCE


def _difference(run: TeacherRun, epoch: int, batch: int) -> float:
    """Return by how much a batch computed again differs, in parts of a row's largest logit."""
    teacher = run.teacher
    images = next(run.images(epoch, batch))
    stored = teacher(images)
    with run.setup.steps.autocast():
        computed = teacher.layout.unpack(teacher.layout.pack(teacher.teacher(images)))
    known = stored.isfinite()
    if (known != computed.isfinite()).any():
        return float('inf')
    scale = stored.where(known, 0).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    return ((stored - computed).abs() / scale).where(known, 0.0).max().item()
