"""args -> the key of a run: everything that decides the pixels a row stands for, or the logits of those pixels."""
import argparse
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..cli import KDSettings
from ..data import DataConfig, TrainData
from ..errors import UsageError
from ..process import Process
from ..setup import augmentation_settings, image_mode
from .fingerprint import fingerprint_dataset, fingerprint_teacher, hash_file
from .folder import KEY_FILE, read_members
from .key import Key, read_key

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What a row of a cache is.

    Args:
        by_position: Numbered by position in the epoch, because rows mix or share draws; else by sample index.
        count: Rows of an epoch.
    """
    by_position: bool
    count: int


def rows_of(args: argparse.Namespace, data: TrainData, world_size: int) -> Rows:
    """Tell how the rows of a run are numbered."""
    by_position = data.mixup_active or bool(args.resplit and args.reprob)
    return Rows(by_position, len(data.loader) * args.batch_size * world_size if by_position else len(data.dataset))


def cache_key(
        args: argparse.Namespace,
        kd: KDSettings,
        data_config: DataConfig,
        data: TrainData,
        rows: Rows,
        process: Process,
        dtype: torch.dtype | None,
) -> Key:
    """Collect everything that decides the pixels a row stands for, or the logits of those pixels."""
    on_device = args.reprob > 0 and not args.no_aug and not args.no_prefetcher
    key = {
        'versions': {name: version(name).split('+')[0] for name in ('timm', 'torchvision', 'pillow')},
        'seed': args.seed,
        'dataset': fingerprint_dataset(data.dataset),
        'images': {
            'input_size': data_config['input_size'],
            'mean': data_config['mean'],
            'std': data_config['std'],
            'mode': image_mode(args, data_config['input_size'][0]),
            'dtype': str(dtype or torch.float32).removeprefix('torch.'),
            'prefetcher': not args.no_prefetcher,
            **_augmentation(args, data_config),
        },
        'erasing_device': process.device.type if on_device and args.remode != 'const' else None,
        'teacher': _teacher_key(args, kd),
        'rows': {
            'by': 'position' if rows.by_position else 'sample',
            'count': rows.count,
            'classes': args.num_classes,
            'dtype': args.teacher_cache_dtype,
            'topk': args.teacher_cache_topk,
        },
    }
    if rows.by_position:
        key['batches'] = {'batch_size': args.batch_size, 'world_size': process.world_size}
    if data.mixup_active:
        names = ['mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_mode', 'mixup_off_epoch']
        if args.mixup and (args.cutmix or args.cutmix_minmax):
            names.append('mixup_switch_prob')
        key['mixing'] = {name: getattr(args, name) for name in names}
    return key


def validation_key(args: argparse.Namespace, data_config: DataConfig, eval_loader: DataLoader) -> str:
    """Collect what the teacher's validation depends on beside the teacher, as JSON."""
    return json.dumps({
        'dataset': fingerprint_dataset(eval_loader.dataset),
        'images': {name: data_config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        'crop_mode': data_config['crop_mode'],
        'mode': image_mode(args, data_config['input_size'][0]),
        'prefetcher': not args.no_prefetcher,
    })


def _augmentation(args: argparse.Namespace, data_config: DataConfig) -> Key:
    """Return the settings that act: a flag that another one switches off makes no other images."""
    settings = augmentation_settings(args, data_config)
    if args.no_aug:
        return {name: settings[name] for name in ('no_aug', 'interpolation')}
    settings['train_crop_mode'] = settings['train_crop_mode'] or 'rrc'  # timm's default
    return {name: value for name, value in settings.items() if args.reprob or not name.startswith('re_')}


def _teacher_key(args: argparse.Namespace, kd: KDSettings) -> Key:
    specs = [kd.teacher] if isinstance(kd.teacher, str) else list(kd.teacher)
    class_map = args.teacher_class_map
    return {
        'members': [_member_key(args.teacher_cache, number, spec) for number, spec in enumerate(specs)],
        'model': args.teacher_model,
        'kwargs': args.teacher_kwargs,
        'ema': args.teacher_ema,
        'img_size': args.teacher_img_size,
        'dtype': kd.teacher_dtype,
        'autocast': args.amp_dtype if kd.teacher_dtype == 'amp' else None,
        'class_map': hash_file(class_map) if class_map and os.path.isfile(class_map) else class_map,
        'class_map_missing': args.teacher_class_map_missing,
    }


def _member_key(folder: str, number: int, spec: str) -> Key:
    try:
        return fingerprint_teacher(spec)
    except UsageError:
        # A complete cache stands in for a teacher that is no longer there.
        members = read_members(Path(folder)) or []
        if [member['source'] for member in members[number:number + 1]] != [spec]:
            raise
        _logger.warning(f'--teacher {spec} is not there: trusting the logits in {folder}.')
        stored = read_key(Path(folder, KEY_FILE)).get('teacher', {}).get('members', [])
        return stored[number] if number < len(stored) else {}
