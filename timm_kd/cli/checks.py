"""What the flags mean together, and on this machine: clashes, files that are not there, what timm cannot make of them.

The range of a number and the names that a flag takes stand at the flag. Everything here is known before a model is
built.
"""
import argparse
import math
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.data import create_transform
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..errors import UsageError, nearest
from .kd_checks import check_kd
from .messages import as_given, task_loss_flags

# Data sets that timm finds by name: a local folder is only where they are stored.
_NAMED_DATASETS = ('hfds', 'hfids', 'tfds', 'wds', 'torch')

# The flags that decide whether timm can make a schedule.
_SCHEDULE_FLAGS = {
    **dict.fromkeys(
        ('cosine', 'tanh', 'poly'), ('epochs', 'cooldown_epochs', 'lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit')),
    'constant': ('warmup_epochs',),
    'step': ('decay_epochs', 'decay_rate'),
    'multistep': ('decay_milestones', 'decay_rate'),
    'plateau': ('sched_on_updates', 'decay_rate', 'patience_epochs'),
    'wsd': ('epochs', 'warmup_epochs', 'warmup_prefix', 'decay_epochs'),
    'rsqrt': ('epochs', 'warmup_epochs', 'warmup_prefix', 'decay_epochs', 'lr_stable_timescale'),
}


def check_args(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Refuse what cannot make a sensible run.

    Args:
        args: The parsed namespace.
        defaults: The default of each dest.

    Raises:
        UsageError: Naming the flag, its value and the way out.
    """
    _check_refused(args, defaults)
    _check_data(args)
    _check_files(args)
    _check_image_flags(args)
    _check_task_loss(args)
    _check_precision(args)
    _check_compile(args)
    _check_optimizer(args)
    _check_schedule(args)
    _check_train_sizes(args)
    _check_hub(args)
    check_kd(args, defaults)


def _check_refused(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    for dest, value in vars(args).items():
        if dest.startswith('naflex_') and value != defaults[dest]:
            raise UsageError(f'{as_given(dest, value)}: NaFlex data is not supported, leave the naflex flags out.')
    if args.target_key and ',' in args.target_key:
        raise UsageError(f'--target-key {args.target_key}: several fields make a multi-label task: not supported.')
    if args.log_tensorboard and find_spec('tensorboard') is None:
        raise UsageError('--log-tensorboard: tensorboard is not installed, pip install timm-kd[tensorboard].')


def _check_data(args: argparse.Namespace) -> None:
    if args.data and args.data_dir and args.data != args.data_dir:
        raise UsageError(f'two data folders, {args.data} and --data-dir {args.data_dir}: give one.')
    prefix, separator, _ = args.dataset.partition('/')
    if separator and prefix.lower() in _NAMED_DATASETS:
        return
    data_dir = args.data_dir or args.data
    if not data_dir:
        raise UsageError('no data set: give its folder (train-kd /data/imagenet ...), or --dataset hfds/NAME.')
    if not os.path.exists(data_dir):
        raise UsageError(f'data folder {data_dir} does not exist.')


def _check_files(args: argparse.Namespace) -> None:
    for dest in ('initial_checkpoint', 'pretrained_path'):
        _require_file(dest, getattr(args, dest))
    if args.pretrained_path and not args.pretrained:
        raise UsageError(f'{as_given("pretrained_path", args.pretrained_path)}: timm reads it with --pretrained alone, '
                         'add that.')
    if args.resume == 'auto':
        if not args.experiment:
            raise UsageError('--resume auto needs --experiment NAME: the name of the run to go on with.')
    else:
        _require_file('resume', args.resume)
    data_dir = args.data_dir or args.data or ''
    places = (os.path.join(data_dir, args.class_map), os.path.join(data_dir, args.train_split, args.class_map))
    if args.class_map and not any(map(os.path.isfile, places)):
        _require_file('class_map', args.class_map)


def _require_file(dest: str, path: str | None) -> None:
    if path and not os.path.isfile(path):
        reason = 'a folder, not a file' if os.path.isdir(path) else 'no such file'
        raise UsageError(f'{as_given(dest, path)}: {reason}.')


def _check_image_flags(args: argparse.Namespace) -> None:
    if args.aa:
        try:
            create_transform(is_training=True, auto_augment=args.aa)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UsageError(f'--aa {args.aa}: timm knows no such policy ({error}).') from error
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, dest)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise UsageError(f'{as_given(dest, value)}: expected two values, the least and the greatest.')
    batch_flag = 'validation_batch_size' if args.validation_batch_size else 'batch_size'
    if args.tta and getattr(args, batch_flag) % args.tta:
        raise UsageError(f'{as_given(batch_flag, getattr(args, batch_flag))}: --tta {args.tta} averages so many '
                         'neighbouring outputs of a batch, make it a multiple.')
    if args.aug_splits == 1:
        raise UsageError('--aug-splits 1: expected 0 (off), or at least 2 splits.')
    if args.aug_splits and args.no_prefetcher:
        raise UsageError(f'--aug-splits {args.aug_splits}: needs the prefetching loader, leave out --no-prefetcher.')
    if args.split_bn and not (args.aug_splits or args.resplit):
        raise UsageError('--split-bn needs --aug-splits 2 or more.')
    if args.split_bn and not args.aug_splits and args.batch_size % 2:
        raise UsageError(f'--batch-size {args.batch_size}: --split-bn halves a batch and needs an even one.')
    if args.mixup or args.cutmix or args.cutmix_minmax:
        batch_flag = 'train_batch_sizes' if args.train_batch_sizes else 'batch_size'
        if any(batch_size % 2 for batch_size in args.train_batch_sizes or [args.batch_size]):
            raise UsageError(
                f'{as_given(batch_flag, getattr(args, batch_flag))}: Mixup and CutMix mix pairs and need an even batch '
                'size.'
            )
        if args.aug_splits:
            raise UsageError(f'--aug-splits {args.aug_splits}: does not go with Mixup or CutMix.')


def _check_task_loss(args: argparse.Namespace) -> None:
    flags = task_loss_flags(args)
    if len(set(flags.values())) > 1:
        raise UsageError(f'{" and ".join(flags)}: choose one task loss.')
    if 'jsd' in flags.values() and args.aug_splits < 2:
        raise UsageError(f'{next(iter(flags))} compares augmentation splits: add --aug-splits 2 or more.')


def _check_precision(args: argparse.Namespace) -> None:
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UsageError(f'--model-dtype {args.model_dtype}: AMP keeps the model in float32; leave out this or --amp.')


def _check_compile(args: argparse.Namespace) -> None:
    mode = as_given('torchcompile_mode', args.torchcompile_mode)
    if args.torchscript and args.sync_bn:
        raise UsageError('--sync-bn cannot be scripted: leave out this or --torchscript.')
    if args.torchscript and args.torchcompile:
        raise UsageError('--torchscript and --torchcompile: choose one.')
    if args.torchcompile_mode and not args.torchcompile:
        raise UsageError(f'{mode}: belongs to --torchcompile, which is not given.')
    named = {dest: getattr(args, dest) for dest in ('torchcompile', 'teacher_compile') if getattr(args, dest)}
    if not named:
        return
    import torch._dynamo as dynamo  # takes seconds
    backends = dynamo.list_backends(None)
    for dest, backend in named.items():
        if backend not in backends:
            raise UsageError(f'{as_given(dest, backend)}: torch has no such backend{nearest(backend, backends)}.')
    if args.torchcompile == 'inductor' and args.torchcompile_mode:
        from torch._inductor import list_mode_options
        if args.torchcompile_mode not in list_mode_options():
            raise UsageError(f'{mode}: expected one of {", ".join(list_mode_options())}.')
        cuda_graphs = args.torchcompile_mode in ('reduce-overhead', 'max-autotune') and args.device.startswith('cuda')
        if cuda_graphs and args.grad_accum_steps > 1:  # pytorch issue 169545: gradients live in a graph's memory
            raise UsageError(
                f'{mode} --grad-accum-steps {args.grad_accum_steps}: the CUDA graphs of this mode overwrite '
                'accumulated gradients: take max-autotune-no-cudagraphs, or leave out one of the two.')


def _check_optimizer(args: argparse.Namespace) -> None:
    """Refuse what timm's factory refuses: it builds this optimizer for a dummy parameter."""
    name = args.opt.lower().split('_')[-1]
    try:
        get_optimizer_info(name)
    except ValueError as error:
        hint = nearest(name, list_optimizers())
        raise UsageError(f'{as_given("opt", args.opt)}: timm has no such optimizer{hint}.') from error
    for twice in sorted(set(args.opt_kwargs) & set(optimizer_kwargs(args))):
        by_flag = f'opt_{twice}' if twice in ('eps', 'betas') else twice
        raise UsageError(f'{as_given("opt_kwargs", args.opt_kwargs)}: {twice} is set by {as_given(by_flag, True)}.')
    kwargs = dict(optimizer_kwargs(args), lr=args.lr or args.lr_base, **args.opt_kwargs)
    try:
        create_optimizer_v2([torch.zeros(2, 2, requires_grad=True)], **kwargs)
    except IndexError as error:
        raise UsageError(f'{as_given("opt_betas", args.opt_betas)}: too few for --opt {args.opt}.') from error
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        given = [as_given(dest, getattr(args, dest)) for dest in ('opt', 'opt_kwargs', 'opt_eps', 'opt_betas')
                 if getattr(args, dest) not in (None, {})]
        raise UsageError(f'{" ".join(given)}: timm cannot make such an optimizer ({error}).') from error
    except RuntimeError:
        pass  # a matter of the device (fused=True): the real parameters will tell


def _check_schedule(args: argparse.Namespace) -> None:
    """Refuse what timm's factory refuses, and a schedule that has no rate for its first or last epoch."""
    for dest in ('lr_decay_fn', 'lr_stable_timescale'):
        if getattr(args, dest) is not None and args.sched not in ('wsd', 'rsqrt'):
            raise UsageError(f'{as_given(dest, getattr(args, dest))}: is for --sched wsd and rsqrt, not {args.sched}.')
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    updates = 1000  # an epoch: not known yet, but enough to round none of the lengths to 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # timm warns again when the run makes its schedule
            scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
        for epoch in (0, num_epochs) if scheduler is not None else ():
            scheduler.step_update(epoch * updates)
            scheduler.step(epoch)
            if not math.isfinite(optimizer.param_groups[0]['lr']):
                raise ValueError(f'the learning rate of epoch {epoch} is not finite')
    except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
        flags = {dest: getattr(args, dest) for dest in _SCHEDULE_FLAGS[args.sched]}
        unset = [dest for dest, value in flags.items() if value is None or value is False]
        given = ' '.join(as_given(dest, value) for dest, value in flags.items() if dest not in unset)
        without = f' without {", ".join(as_given(dest, True) for dest in unset)}' if unset else ''
        reason = str(error.args[-1]).rstrip('.') if error.args else type(error).__name__
        raise UsageError(
            f'--sched {args.sched} {given}{without}: timm cannot make this schedule ({reason}), change one of these '
            'flags.'
        ) from error
    if args.stop_epoch is not None and args.stop_epoch > num_epochs:
        raise UsageError(
            f'--stop-epoch {args.stop_epoch}: the schedule of --epochs {args.epochs} ends after {num_epochs} epochs, '
            'lower this or raise --epochs.'
        )


def _check_train_sizes(args: argparse.Namespace) -> None:
    for dest in ('train_batch_sizes', 'train_size_probs'):
        value = getattr(args, dest)
        if value is None:
            continue
        if args.train_img_sizes is None:
            raise UsageError(f'{as_given(dest, value)}: belongs to --train-img-sizes, which is not given.')
        if len(value) != len(args.train_img_sizes):
            raise UsageError(f'{as_given(dest, value)}: expected one value for each of the '
                             f'{len(args.train_img_sizes)} --train-img-sizes.')
    if args.train_size_probs is not None and not any(args.train_size_probs):
        raise UsageError(f'{as_given("train_size_probs", args.train_size_probs)}: expected a value above 0 among them.')
    if args.train_size_schedule == 'progressive' and len(args.train_img_sizes or []) < 2:
        raise UsageError('--train-size-schedule progressive needs two or more --train-img-sizes.')


def _check_hub(args: argparse.Namespace) -> None:
    if args.push_to_hub is None:
        for dest in ('hub_private', 'hub_license', 'hub_revision'):
            value = getattr(args, dest)
            if value:
                raise UsageError(f'{as_given(dest, value)}: belongs to --push-to-hub, which is not given.')
        return
    try:
        validate_repo_id(args.push_to_hub)
    except HFValidationError as error:
        raise UsageError(f'{as_given("push_to_hub", args.push_to_hub)}: {error}') from error


def check_device(device: str) -> None:
    """Refuse a GPU that was asked for on a machine without one; by default such a machine trains on its CPU.

    Args:
        device: The value of `--device`.

    Raises:
        UsageError: torch finds no CUDA device.
    """
    if device.split(':')[0] == 'cuda' and not torch.cuda.is_available():
        raise UsageError(f'--device {device}: torch finds no CUDA device; --device cpu trains without one.')
