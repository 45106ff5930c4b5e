"""args -> the cached teacher of a run: its key, its folder, and whether the live teacher is needed at all."""
import argparse
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.utils.data import DataLoader

from ..build import create_run_teacher
from ..cli import KDSettings
from ..data import DataConfig, TrainData, augmentation_settings
from ..errors import UsageError
from ..teacher import Teacher, TeacherEnsemble
from .cached_teacher import CachedTeacher
from .fingerprint import fingerprint_dataset, fingerprint_teacher, hash_file
from .key import Key, claim_key, read_key
from .layout import RowLayout
from .store import ARGS_FILE, KEY_FILE, TEACHER_FILE, CacheFolder

_logger = logging.getLogger(__name__)

_FORMAT = 1


def open_cached_teacher(
        args: argparse.Namespace,
        args_text: str,
        kd: KDSettings,
        data_config: DataConfig,
        data: TrainData,
        eval_loader: DataLoader | None,
        device: torch.device,
        dtype: torch.dtype | None,
        epochs: Sequence[int] | None = None,
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
        device: Device of the run.
        dtype: Dtype of the images; None for float32.
        epochs: Epochs that the run will read; None: all of the schedule.
        live: Load the live teacher in any case.

    Raises:
        UsageError: The cache was filled for another run's data or teacher, is damaged, or does not fit the disk.
    """
    check_supported(args)
    by_position = data.mixup_active or bool(args.resplit and args.reprob)
    batch_sampler = data.loader.batch_sampler
    global_batch_size = args.batch_size * args.world_size
    num_rows = len(data.loader) * global_batch_size if by_position else len(data.dataset)
    layout = RowLayout(args.num_classes, args.teacher_cache_dtype, args.teacher_cache_topk)
    key = cache_key(args, kd, data_config, data, device, dtype, by_position, num_rows)

    if args.distributed and args.rank != 0:
        torch.distributed.barrier()  # rank 0 makes the folder, or clears it
    rebuild = args.teacher_cache_rebuild and args.rank == 0
    folder = CacheFolder(args.teacher_cache, key, num_rows, layout.row_bytes, rebuild)
    if args.distributed and args.rank == 0:
        torch.distributed.barrier()
    teacher = CachedTeacher(folder, layout, batch_sampler, by_position, device)
    if eval_loader is not None and not args.no_teacher_eval:
        teacher.validation_key = json.dumps(_validation_key(args, data_config, eval_loader))
        teacher.validation_loader = eval_loader

    epochs = range(count_epochs(args, len(data.loader))) if epochs is None else epochs
    if data.mixup_active:
        _check_mixup_off(args, epochs)
    # Which epochs are distinct is the sampler's to say.
    epochs = sorted({epoch % args.teacher_cache_epochs for epoch in epochs}) if args.teacher_cache_epochs else epochs
    complete = folder.covers(epochs, teacher.epoch_rows)
    answers_all = complete and teacher.knows_validation() and (folder.path / TEACHER_FILE).exists()
    if not live and _on_all_ranks(answers_all, args.distributed):
        described = json.loads((folder.path / TEACHER_FILE).read_text())
        teacher.members = [SimpleNamespace(**member) for member in described['members']]
        _logger.info(f'Teacher cache {folder.path}: all rows are there, no teacher is loaded.')
        return teacher
    if not complete:
        folder.check_space(epochs)
    _load_live(teacher, create_run_teacher(args, kd, data_config, device), args.rank == 0, args_text)
    return teacher


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


def count_epochs(args: argparse.Namespace, num_batches: int) -> int:
    """Return the epochs that timm's schedule makes of the flags."""
    updates_per_epoch = -(-num_batches // max(1, args.grad_accum_steps))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        _, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError, TypeError) as error:
        raise UsageError(f'--sched {args.sched}: {error}') from error
    return num_epochs if args.stop_epoch is None else min(num_epochs, args.stop_epoch)


def cache_key(
        args: argparse.Namespace,
        kd: KDSettings,
        data_config: DataConfig,
        data: TrainData,
        device: torch.device,
        dtype: torch.dtype | None,
        by_position: bool,
        num_rows: int,
) -> Key:
    """Collect everything that decides the pixels a row stands for, or the logits of those pixels."""
    augmentation = augmentation_settings(args, data_config)
    on_device = args.reprob > 0 and not args.no_aug and not args.no_prefetcher
    key = {
        'format': _FORMAT,
        'versions': {name: version(name).split('+')[0] for name in ('timm', 'torchvision', 'pillow')},
        'seed': args.seed,
        'dataset': fingerprint_dataset(data.dataset),
        'images': {
            'input_size': data_config['input_size'],
            'mean': data_config['mean'],
            'std': data_config['std'],
            'mode': args.input_img_mode,
            'dtype': str(dtype or torch.float32).removeprefix('torch.'),
            'prefetcher': not args.no_prefetcher,
            **augmentation,
        },
        'erasing_device': device.type if on_device and args.remode != 'const' else None,
        'teacher': _teacher_key(args, kd),
        'rows': {
            'by': 'position' if by_position else 'sample',
            'count': num_rows,
            'classes': args.num_classes,
            'dtype': args.teacher_cache_dtype,
            'topk': args.teacher_cache_topk,
        },
    }
    if by_position:
        key['batches'] = {'batch_size': args.batch_size, 'world_size': args.world_size}
    if data.mixup_active:
        names = 'mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch'
        key['mixing'] = {name: getattr(args, name) for name in names}
    return key


def _teacher_key(args: argparse.Namespace, kd: KDSettings) -> Key:
    specs = [kd.teacher] if isinstance(kd.teacher, str) else list(kd.teacher)
    class_map = args.teacher_class_map
    try:
        members = [fingerprint_teacher(spec) for spec in specs]
    except UsageError:
        # A complete cache stands in for a teacher that is no longer there.
        described = Path(args.teacher_cache, TEACHER_FILE)
        if not described.exists() or [m['source'] for m in json.loads(described.read_text())['members']] != specs:
            raise
        members = read_key(Path(args.teacher_cache, KEY_FILE))['teacher']['members']
        _logger.warning(f'--teacher {" ".join(specs)} is not there: trusting the logits in {args.teacher_cache}.')
    return {
        'members': members,
        'model': args.teacher_model,
        'kwargs': args.teacher_kwargs,
        'ema': args.teacher_ema,
        'img_size': args.teacher_img_size,
        'dtype': kd.teacher_dtype,
        'autocast': args.amp_dtype if kd.teacher_dtype == 'amp' else None,
        'class_map': hash_file(class_map) if class_map and os.path.isfile(class_map) else class_map,
        'class_map_missing': args.teacher_class_map_missing,
    }


def _validation_key(args: argparse.Namespace, data_config: DataConfig, eval_loader: DataLoader) -> Key:
    return {
        'dataset': fingerprint_dataset(eval_loader.dataset),
        'images': {name: data_config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        'crop_mode': data_config['crop_mode'],
        'mode': args.input_img_mode,
        'prefetcher': not args.no_prefetcher,
    }


def _on_all_ranks(answer: bool, distributed: bool) -> bool:
    """Agree: a rank that loads the teacher waits for the others to do so."""
    if not distributed:
        return answer
    answers = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, answer)
    return all(answers)


def _load_live(teacher: CachedTeacher, live: Teacher | TeacherEnsemble, primary: bool, args_text: str) -> None:
    """Give the cache its live teacher, which must be the one that filled it."""
    teacher.teacher = live
    teacher.members = live.members
    folder = teacher.folder
    if not (primary and folder.writable):
        return
    described = {
        'teacher': live.fingerprint(),
        'members': [
            {'source': member.source, 'model_name': member.model_name, 'num_params': member.num_params}
            for member in live.members
        ],
    }
    claim_key(folder.path / TEACHER_FILE, described)
    if not (folder.path / ARGS_FILE).exists():
        (folder.path / ARGS_FILE).write_text(args_text)
