"""args -> the cached teacher of a run: its folder, and whether the live teacher is needed at all."""
import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader

from ..build import create_run_teacher
from ..cli import KDSettings
from ..data import DataConfig, TrainData
from ..errors import UsageError
from ..process import Process
from .cached_teacher import CachedTeacher
from .folder import CacheFolder, read_members
from .layout import RowLayout
from .run_key import cache_key, rows_of, validation_key

_logger = logging.getLogger(__name__)

_PATHS = 'data', 'data_dir', 'class_map', 'teacher', 'teacher_class_map', 'pretrained_path', 'initial_checkpoint'


def open_cached_teacher(
        args: argparse.Namespace,
        args_text: str,
        kd: KDSettings,
        data_config: DataConfig,
        data: TrainData,
        eval_loader: DataLoader | None,
        process: Process,
        dtype: torch.dtype | None,
        epochs: Sequence[int],
        live: bool = False,
) -> CachedTeacher:
    """Open `--teacher-cache`, and load the live teacher if this run needs a row that is absent.

    Args:
        args: The run's flags.
        args_text: The same as YAML, kept in the folder for `verify`.
        kd: The distillation.
        data_config: timm's data config of the images.
        data: The training data, with a replayable loader.
        eval_loader: Validation loader, or None.
        process: The process that trains.
        dtype: Dtype of the images; None for float32.
        epochs: Epochs that the run will read.
        live: Load the live teacher in any case, to compare with what is stored.

    Raises:
        UsageError: The cache was filled for another run's data or teacher, is damaged, or does not fit the disk.
    """
    check_supported(args)
    if data.mixup_active:
        _check_mixup_off(args, epochs)
    rows = rows_of(args, data, process.world_size)
    layout = RowLayout(args.num_classes, args.teacher_cache_dtype, args.teacher_cache_topk)
    key = cache_key(args, kd, data_config, data, rows, process, dtype)
    # Whether rows have to be thrown away depends on what the teacher says of itself, too.
    early = live or args.teacher_cache_rebuild
    teacher = create_run_teacher(args, kd, data_config, process) if early else None
    with process.primary_first():  # rank 0 makes the folder, or clears it
        folder = CacheFolder(
            args.teacher_cache,
            key,
            rows.count,
            layout.row_bytes,
            rebuild=args.teacher_cache_rebuild and process.primary,
            teacher=teacher.fingerprint() if teacher is not None and process.primary else None,
        )
    cached = CachedTeacher(folder, layout, data.loader.batch_sampler, rows.by_position, process.device, teacher)
    if eval_loader is not None and not args.no_teacher_eval:
        cached.validation_key = validation_key(args, data_config, eval_loader)
        cached.validation_loader = eval_loader
    if live:
        return cached

    # Which epochs are distinct is the sampler's to say.
    epochs = sorted({epoch % args.teacher_cache_epochs for epoch in epochs}) if args.teacher_cache_epochs else epochs
    complete = folder.covers(epochs, cached.epoch_rows)
    members = read_members(folder.path)
    if all(process.gather(complete and cached.knows_validation() and members is not None)):
        cached.teacher = None
        cached.members = [SimpleNamespace(**member) for member in members]
        _logger.info(f'Teacher cache {folder.path}: all rows are there, the teacher is not needed.')
        return cached
    if not complete:
        folder.check_space(epochs)
    if teacher is None:
        teacher = create_run_teacher(args, kd, data_config, process)
        if process.primary:
            folder.claim_teacher(teacher.fingerprint())
        process.barrier()
    cached.teacher, cached.members = teacher, teacher.members
    if process.primary:
        names = 'source', 'model_name', 'num_params'
        folder.describe(
            [{name: getattr(member, name) for name in names} for member in teacher.members],
            _from_anywhere(args_text),
        )
    return cached


def check_supported(args: argparse.Namespace) -> None:
    """Refuse what stored logits cannot follow.

    Raises:
        UsageError: Naming the flags.
    """
    cache = f'--teacher-cache {args.teacher_cache}'
    if os.name != 'posix':
        raise UsageError(f'{cache}: needs the file locks of Linux or macOS, leave it out.')
    if args.teacher_cache_topk and args.teacher_cache_topk >= args.num_classes:
        raise UsageError(
            f'--teacher-cache-topk {args.teacher_cache_topk}: there are {args.num_classes} classes, leave it out or '
            'take fewer.'
        )
    if args.teacher_cache_topk and args.teacher_class_map_missing == 'mask':
        raise UsageError(
            f'--teacher-cache-topk {args.teacher_cache_topk}: spreads the rest over all classes, the masked ones '
            'included: leave out this or --teacher-class-map-missing mask.'
        )


def _check_mixup_off(args: argparse.Namespace, epochs: Sequence[int]) -> None:
    distinct, off = args.teacher_cache_epochs, args.mixup_off_epoch
    if distinct and off and distinct <= max(epochs, default=0):
        raise UsageError(
            f'--teacher-cache-epochs {distinct}: the epochs after --mixup-off-epoch {off} have other images than the '
            'stored ones, leave out one of the two.'
        )


def _from_anywhere(args_text: str) -> str:
    """Return flags that mean the same in another working directory, and throw nothing away."""
    flags = yaml.safe_load(args_text)
    flags.pop('teacher_cache_rebuild', None)
    flags.update({name: _absolute(flags[name]) for name in _PATHS if flags.get(name)})
    return yaml.safe_dump(flags)


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    prefix = 'local-dir:' if value.startswith('local-dir:') else ''
    path = Path(value.removeprefix(prefix)).expanduser()
    return prefix + str(path.resolve()) if path.exists() else value
