"""What the flags of distillation mean together, and which of them have nothing to act on."""
import argparse
import os
from typing import Any

from ..errors import UsageError
from ..losses import KD_LOSSES, create_kd_loss
from .kd_flags import KDSettings, knob_dests, resolve_kd
from .messages import as_given, task_loss_flags

_REFUSED = {
    'kd_distill_type': 'feature and token distillation are not supported, only logits are distilled.',
    'kd_loss_type': 'only kl, which is --kd-loss kd; --kd-loss chooses among the others.',
    'kd_student_feature_dim': 'feature distillation is not supported.',
    'kd_teacher_feature_dim': 'feature distillation is not supported.',
    'kd_token_distill_type': 'token distillation is not supported.',
}

# Data sets that timm reads as a stream, without indices.
_ITERABLE_DATASETS = ('hfids', 'tfds', 'wds')


def check_kd(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Refuse distillation flags that do not go together; a part of `check_args`, with its arguments."""
    for dest, reason in _REFUSED.items():
        if getattr(args, dest) != defaults[dest]:
            raise UsageError(f'{as_given(dest, getattr(args, dest))}: {reason}')
    if args.teacher and args.kd_model_name and args.kd_model_name != args.teacher:
        raise UsageError(f'--kd-model-name {args.kd_model_name} beside {_teacher_flag(args)}: name one teacher.')

    settings = resolve_kd(args)
    if settings is None:
        for dest in (*knob_dests(), 'task_loss_weight', 'distill_loss_weight', 'kd_warmup_epochs'):
            # A warm-up of 0 asks for nothing: it was the default, and stands in the args.yaml of older plain runs.
            if getattr(args, dest) not in (defaults[dest], *([0] if dest == 'kd_warmup_epochs' else [])):
                raise UsageError(f'{as_given(dest, getattr(args, dest))}: there is nothing to distil, '
                                 'add --teacher SPEC or --kd-loss NAME.')
    else:
        _check_loss(args, settings)
        _check_setting(args, settings)
    if settings is None or settings.teacher is None:
        for dest, value in vars(args).items():
            if (dest.startswith('teacher_') or dest == 'no_teacher_eval') and value != defaults[dest]:
                raise UsageError(f'{as_given(dest, value)}: there is no teacher, add --teacher SPEC or leave this out.')
    else:
        _check_teacher(args, settings)
        _check_teacher_cache(args, defaults)


def _check_loss(args: argparse.Namespace, settings: KDSettings) -> None:
    loss = KD_LOSSES[settings.loss]
    if settings.teacher is None and loss.needs_teacher:
        teacher_free = ' or '.join(name for name, other in KD_LOSSES.items() if not other.needs_teacher)
        raise UsageError(f'--kd-loss {settings.loss} needs a teacher: add --teacher SPEC, or choose {teacher_free}.')
    if settings.teacher is not None and not loss.accepts_teacher:
        raise UsageError(f'{_teacher_flag(args)}: --kd-loss {settings.loss} has no teacher, leave it out '
                         '(--teacher \'\' overrides a config file).')
    known = [dest for dest, knob in knob_dests().items() if knob in loss.hyper_parameters()]
    for dest, knob in knob_dests().items():
        if knob in settings.loss_parameters and dest not in known:
            its_own = f'which has {", ".join(as_given(dest, True) for dest in known)}' if known else 'which has none'
            raise UsageError(f'{as_given(dest, getattr(args, dest))}: no parameter of {settings.loss}, {its_own}.')
        if knob in settings.loss_parameters and settings.teacher is not None and knob in loss.knobs_without_teacher:
            raise UsageError(f'{as_given(dest, getattr(args, dest))}: stands in for a teacher of {settings.loss}, '
                             f'and there is {_teacher_flag(args)}: leave out one.')
    try:
        create_kd_loss(settings.loss, **settings.loss_parameters)
    except ValueError as error:  # a range that is narrower than that of another loss's flag of the same name
        raise UsageError(f'--kd-loss {settings.loss}: {error}') from error
    if settings.distill_loss_weight < 0:
        raise UsageError(f'--task-loss-weight {args.task_loss_weight} leaves the distillation loss a weight of '
                         f'{settings.distill_loss_weight:g}: give --distill-loss-weight too.')
    if settings.task_loss_weight == settings.distill_loss_weight == 0:
        raise UsageError('--task-loss-weight 0 and --distill-loss-weight 0 leave nothing to train on.')


def _check_setting(args: argparse.Namespace, settings: KDSettings) -> None:
    for flag, loss in task_loss_flags(args).items():
        if loss == 'jsd':
            raise UsageError(f'{flag}: does not go with distillation (--kd-loss {settings.loss}).')
    if args.aug_splits:
        raise UsageError(f'--aug-splits {args.aug_splits}: does not go with distillation (--kd-loss {settings.loss}).')
    if args.num_classes == 1:
        raise UsageError(f'--num-classes 1: --kd-loss {settings.loss} compares classes and needs at least 2.')


def _check_teacher(args: argparse.Namespace, settings: KDSettings) -> None:
    specs = settings.teacher if isinstance(settings.teacher, list) else [settings.teacher]
    # Stored logits may stand in for a file that is no longer there.
    if not args.teacher_cache and not any(os.path.isfile(os.path.expanduser(spec)) for spec in specs):
        for dest in ('teacher_model', 'teacher_ema'):
            if getattr(args, dest):
                raise UsageError(f'{_teacher_flag(args)} is no file, and {as_given(dest, getattr(args, dest))} '
                                 'is for a teacher that is a weights file.')
    if args.teacher_dtype == 'amp' and not args.amp:
        raise UsageError('--teacher-dtype amp: is the autocast of the student, add --amp or choose a dtype.')
    if args.teacher_class_map_missing == 'mask' and not args.teacher_class_map:
        raise UsageError('--teacher-class-map-missing mask: belongs to --teacher-class-map, which is not given.')
    if args.teacher_class_map_missing == 'mask' and args.kd_logit_std:
        raise UsageError('--kd-logit-std: masked classes have no logit to standardise, '
                         'leave out this or --teacher-class-map-missing mask.')


def _check_teacher_cache(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    if args.teacher_cache is None:
        for dest, value in vars(args).items():
            if dest.startswith('teacher_cache_') and value != defaults[dest]:
                raise UsageError(f'{as_given(dest, value)}: belongs to --teacher-cache DIR, which is not given.')
        return
    cache = as_given('teacher_cache', args.teacher_cache)
    if args.train_img_sizes:
        raise UsageError(f'{cache}: stored logits belong to one image size, leave out --train-img-sizes.')
    if args.aug_repeats:
        raise UsageError(f'{cache}: stores one view of an image per epoch, leave out --aug-repeats.')
    if args.dataset.partition('/')[0].lower() in _ITERABLE_DATASETS and '/' in args.dataset:
        raise UsageError(f'{cache}: needs a data set with indices, and --dataset {args.dataset} is a stream.')


def _teacher_flag(args: argparse.Namespace) -> str:
    if not args.teacher:
        return as_given('kd_model_name', args.kd_model_name)
    specs = args.teacher if isinstance(args.teacher, list) else [args.teacher]
    return ' '.join(as_given('teacher', spec) for spec in specs)
