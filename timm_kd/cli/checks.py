"""What the flags mean together: values out of range, names nobody knows, files that are not there, clashes.

Everything here is known from the flags alone, so that it is said before any model is built.
"""
import argparse
import math
import os
from importlib.util import find_spec
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.data import create_transform

from ..errors import UsageError, nearest
from .kd_checks import check_kd
from .messages import as_given, task_loss_flags
from .optim_checks import check_optimizer, check_schedule

_POSITIVE = (
    'batch_size', 'validation_batch_size', 'grad_accum_steps', 'epochs', 'stop_epoch', 'log_interval', 'val_interval',
    'checkpoint_hist', 'num_classes', 'in_chans', 'img_size', 'input_size', 'crop_pct', 'std', 'scale', 'ratio',
    'lr_base_size', 'lr_cycle_mul', 'lr_cycle_limit', 'lr_stable_timescale', 'train_num_samples', 'val_num_samples',
    'train_img_sizes', 'train_batch_sizes', 'train_batches_per_epoch', 'teacher_img_size', 'teacher_cache_epochs',
    'teacher_cache_topk', 'kd_temperature', 'kd_correct_prob',
)
_NOT_NEGATIVE = (
    'lr', 'lr_base', 'warmup_lr', 'min_lr', 'weight_decay', 'momentum', 'clip_grad', 'workers', 'recovery_interval',
    'warmup_epochs', 'cooldown_epochs', 'patience_epochs', 'decay_epochs', 'decay_rate', 'decay_milestones',
    'lr_k_decay', 'start_epoch', 'save_epochs', 'epoch_repeats', 'aug_repeats', 'aug_splits', 'mixup', 'cutmix',
    'mixup_off_epoch', 'color_jitter', 'recount', 'seed', 'tta', 'local_rank', 'train_size_probs',
    'train_size_schedule_spread', 'kd_alpha', 'kd_beta', 'kd_gamma', 'kd_warmup_epochs', 'task_loss_weight',
    'distill_loss_weight',
)
_AT_MOST_ONE = (
    'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
    'mixup_switch_prob', 'cutmix_minmax', 'model_ema_decay', 'bn_momentum', 'train_size_random_mix', 'kd_correct_prob',
)
_BELOW_ONE = ('smoothing', 'drop', 'drop_connect', 'drop_path', 'drop_block')

_FILTERS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_NAMES = {
    'interpolation': _FILTERS,
    'train_interpolation': (*_FILTERS, 'random'),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'fuser': ('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'),
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': ('float32', 'float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'remode': ('const', 'rand', 'pixel'),
    'mixup_mode': ('batch', 'pair', 'elem', 'half'),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'worker_seeding': ('all', 'part'),
    'eval_metric': ('top1', 'top5', 'loss'),
    'loss': ('', 'ce', 'bce', 'jsd'),
    'task': ('', 'classification', 'singlelabel', 'single-label', 'single_label', 'multiclass'),
    'target_format': ('', 'indices'),
}

# Data sets that timm finds by name: a local folder is only where they are stored.
_NAMED_DATASETS = ('hfds', 'hfids', 'tfds', 'wds', 'torch')


def check_args(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Refuse what cannot make a sensible run.

    Args:
        args: The parsed namespace.
        defaults: The default of each dest.

    Raises:
        UsageError: Naming the flag, its value and the way out.
    """
    for dest, value in vars(args).items():
        _check_number(dest, value)
        _check_name(dest, value, defaults)
    _check_refused(args, defaults)
    _check_data(args)
    _check_files(args)
    _check_image_flags(args)
    _check_task_loss(args)
    _check_precision(args)
    _check_compile(args)
    check_optimizer(args)
    check_schedule(args)
    _check_train_sizes(args)
    _check_hub(args)
    check_kd(args, defaults)


def _check_number(dest: str, value: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        expected = None
        if not math.isfinite(number):
            expected = 'a finite number'
        elif dest in _POSITIVE and number <= 0:
            expected = 'a value above 0'
        elif dest in _NOT_NEGATIVE and number < 0:
            expected = 'a value of 0 or more'
        elif dest in _AT_MOST_ONE and not 0 <= number <= 1:
            expected = 'a value from 0 to 1'
        elif dest in _BELOW_ONE and not 0 <= number < 1:
            expected = 'a value from 0 to below 1'
        elif dest == 'seed' and number >= 2 ** 32:
            expected = 'a value below 2**32'
        if expected:
            raise UsageError(f'{as_given(dest, value)}: expected {expected}')


def _check_name(dest: str, value: Any, defaults: dict[str, Any]) -> None:
    if dest not in _NAMES or value in _NAMES[dest] or value == defaults[dest] or not isinstance(value, str):
        return
    if dest in ('task', 'target_format'):
        reason = 'multi-label training is not supported, only one class per image'
    elif dest == 'loss':
        reason = 'the task loss is one of ce, bce, jsd'
    else:
        reason = f'expected one of {", ".join(name or repr("") for name in _NAMES[dest])}{nearest(value, _NAMES[dest])}'
    raise UsageError(f'{as_given(dest, value)}: {reason}')


def _check_refused(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    for dest, value in vars(args).items():
        if dest.startswith('naflex_') and value != defaults[dest]:
            raise UsageError(f'{as_given(dest, value)}: NaFlex data is not supported, leave the naflex flags out')
    if args.target_key and ',' in args.target_key:
        raise UsageError(f'--target-key {args.target_key}: several fields make a multi-label task: not supported')
    if args.log_tensorboard and find_spec('tensorboard') is None:
        raise UsageError('--log-tensorboard: tensorboard is not installed, pip install timm-kd[tensorboard]')


def _check_data(args: argparse.Namespace) -> None:
    if args.data and args.data_dir and args.data != args.data_dir:
        raise UsageError(f'two data folders, {args.data} and --data-dir {args.data_dir}: give one')
    prefix, separator, _ = args.dataset.partition('/')
    if separator and prefix.lower() in _NAMED_DATASETS:
        return
    data_dir = args.data_dir or args.data
    if not data_dir:
        raise UsageError('no data set: give its folder (train-kd /data/imagenet ...), or --dataset hfds/NAME')
    if not os.path.exists(data_dir):
        raise UsageError(f'data folder {data_dir} does not exist')


def _check_files(args: argparse.Namespace) -> None:
    for dest in ('initial_checkpoint', 'pretrained_path'):
        _require_file(dest, getattr(args, dest))
    if args.pretrained_path and not args.pretrained:
        raise UsageError(f'{as_given("pretrained_path", args.pretrained_path)}: timm reads it with --pretrained alone, '
                         'add that')
    if args.resume == 'auto':
        if not args.experiment:
            raise UsageError('--resume auto needs --experiment NAME: the name of the run to go on with')
    else:
        _require_file('resume', args.resume)
    data_dir = args.data_dir or args.data or ''
    places = (os.path.join(data_dir, args.class_map), os.path.join(data_dir, args.train_split, args.class_map))
    if args.class_map and not any(map(os.path.isfile, places)):
        _require_file('class_map', args.class_map)


def _require_file(dest: str, path: str | None) -> None:
    if path and not os.path.isfile(path):
        raise UsageError(f'{as_given(dest, path)}: {"a folder, not a file" if os.path.isdir(path) else "no such file"}')


def _check_image_flags(args: argparse.Namespace) -> None:
    if args.aa:
        try:
            create_transform(is_training=True, auto_augment=args.aa)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UsageError(f'--aa {args.aa}: timm knows no such policy ({error})') from error
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, dest)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise UsageError(f'{as_given(dest, value)}: expected two values, the least and the greatest')
    batch_flag = 'validation_batch_size' if args.validation_batch_size else 'batch_size'
    if args.tta and getattr(args, batch_flag) % args.tta:
        raise UsageError(f'{as_given(batch_flag, getattr(args, batch_flag))}: --tta {args.tta} averages so many '
                         'neighbouring outputs of a batch, make it a multiple')
    if args.aug_splits == 1:
        raise UsageError('--aug-splits 1: expected 0 (off), or at least 2 splits')
    if args.aug_splits and args.no_prefetcher:
        raise UsageError(f'--aug-splits {args.aug_splits}: needs the prefetching loader, leave out --no-prefetcher')
    if args.split_bn and not (args.aug_splits or args.resplit):
        raise UsageError('--split-bn needs --aug-splits 2 or more')
    if args.split_bn and not args.aug_splits and args.batch_size % 2:
        raise UsageError(f'--batch-size {args.batch_size}: --split-bn halves a batch and needs an even one')
    if args.mixup or args.cutmix or args.cutmix_minmax:
        for batch_size in args.train_batch_sizes or [args.batch_size]:
            if batch_size % 2:
                raise UsageError(f'--batch-size {batch_size}: Mixup and CutMix mix pairs and need an even batch size')
        if args.aug_splits:
            raise UsageError(f'--aug-splits {args.aug_splits}: does not go with Mixup or CutMix')


def _check_task_loss(args: argparse.Namespace) -> None:
    flags = task_loss_flags(args)
    if len(set(flags.values())) > 1:
        raise UsageError(f'{" and ".join(flags)}: choose one task loss')
    if 'jsd' in flags.values() and args.aug_splits < 2:
        raise UsageError(f'{next(iter(flags))} compares augmentation splits: add --aug-splits 2 or more')


def _check_precision(args: argparse.Namespace) -> None:
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UsageError(f'--model-dtype {args.model_dtype}: AMP keeps the model in float32; leave out this or --amp')


def _check_compile(args: argparse.Namespace) -> None:
    mode = as_given('torchcompile_mode', args.torchcompile_mode)
    if args.torchscript and args.sync_bn:
        raise UsageError('--sync-bn cannot be scripted: leave out this or --torchscript')
    if args.torchscript and args.torchcompile:
        raise UsageError('--torchscript and --torchcompile: choose one')
    if args.torchcompile_mode and not args.torchcompile:
        raise UsageError(f'{mode}: belongs to --torchcompile, which is not given')
    named = {dest: getattr(args, dest) for dest in ('torchcompile', 'teacher_compile') if getattr(args, dest)}
    if not named:
        return
    import torch._dynamo as dynamo  # takes seconds
    backends = dynamo.list_backends(None)
    for dest, backend in named.items():
        if backend not in backends:
            raise UsageError(f'{as_given(dest, backend)}: torch has no such backend{nearest(backend, backends)}')
    if args.torchcompile == 'inductor' and args.torchcompile_mode:
        from torch._inductor import list_mode_options
        if args.torchcompile_mode not in list_mode_options():
            raise UsageError(f'{mode}: expected one of {", ".join(list_mode_options())}')


def _check_train_sizes(args: argparse.Namespace) -> None:
    for dest in ('train_batch_sizes', 'train_size_probs'):
        value = getattr(args, dest)
        if value is None:
            continue
        if args.train_img_sizes is None:
            raise UsageError(f'{as_given(dest, value)}: belongs to --train-img-sizes, which is not given')
        if len(value) != len(args.train_img_sizes):
            raise UsageError(f'{as_given(dest, value)}: expected one value for each of the '
                             f'{len(args.train_img_sizes)} --train-img-sizes')
    if args.train_size_schedule == 'progressive' and len(args.train_img_sizes or []) < 2:
        raise UsageError('--train-size-schedule progressive needs two or more --train-img-sizes')


def _check_hub(args: argparse.Namespace) -> None:
    if args.push_to_hub is None:
        for dest in ('hub_private', 'hub_license', 'hub_revision'):
            if getattr(args, dest):
                raise UsageError(f'{as_given(dest, getattr(args, dest))}: belongs to --push-to-hub, which is not given')
        return
    try:
        validate_repo_id(args.push_to_hub)
    except HFValidationError as error:
        raise UsageError(f'--push-to-hub {args.push_to_hub}: {error}') from error
