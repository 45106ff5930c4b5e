"""What is wrong with the flags together: clashes, files that are not there, what timm cannot make of them.

The range of a number and the names that a flag takes stand at the flag. Everything here is known before a model is
built. Each rule below yields a sentence for what it finds wrong; `changed` are the flags that differ from their
defaults.
"""
import argparse
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Set
from importlib.util import find_spec
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.data import create_transform
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from ..data import find_class_map
from ..errors import UsageError, nearest
from ..losses import KD_LOSSES, create_kd_loss
from .kd_flags import TIMM_DISTILLATION, KDSettings, knob_dests, named_teachers, resolve_kd
from .messages import as_given, flag_name, given
from .task_loss import check_task_loss, is_mixing, is_multi_label

# Data sets that timm finds by name, for which a local folder is only the store; and those that it reads as a stream.
_NAMED_DATASETS = ('hfds', 'hfids', 'tfds', 'wds', 'torch')
_STREAMS = ('hfids', 'tfds', 'wds')

# Flags, and those that act only beside each of them.
_COMPANIONS = {
    'pretrained': 'pretrained_path',
    'torchcompile': 'torchcompile_mode',
    'train_img_sizes': 'train_batch_sizes train_size_probs',
    'class_stats': 'loss_weight_power loss_weight_beta loss_weight_max',
    'naflex_loader': 'naflex_train_seq_lens naflex_max_seq_len naflex_patch_sizes naflex_loss_scale '
                     'naflex_patchify_channels_first',
    'naflex_patch_sizes': 'naflex_patch_size_probs',
    'push_to_hub': 'hub_private hub_license hub_revision',
    'teacher_class_map': 'teacher_class_map_missing',
    'teacher_cache': 'teacher_cache_dtype teacher_cache_epochs teacher_cache_topk teacher_cache_rebuild',
}

# Flags that do not go together: each of the first with each of the second, and why.
_CLASHES = (
    ('aug_splits', 'no_prefetcher', 'needs the prefetching loader'),
    ('aug_splits', 'mixup cutmix cutmix_minmax', 'does not go with Mixup or CutMix'),
    ('sync_bn', 'torchscript', 'cannot be scripted'),
    ('torchcompile', 'torchscript', 'both compile the student'),
    ('crops_per_image', 'aug_repeats aug_splits', 'both take an image several times'),
    ('crops_per_image', 'train_img_sizes', 'the batches of --train-img-sizes need not hold whole images'),
    ('crops_per_image', 'no_aug', 'with --no-aug all crops of an image are the same'),
    ('train_img_sizes use_multi_epochs_loader aug_splits aug_repeats crops_per_image', 'naflex_loader',
     'timm\'s NaFlex loader has nothing of the kind'),
    ('no_prefetcher channels_last save_images torchscript', 'naflex_loader',
     'a NaFlex batch is no tensor of images but a dict of patches'),
    ('teacher_cache', 'naflex_loader',
     'stored logits need images that come back as they were, and NaFlex draws cannot be replayed'),
    ('replayable_data', 'naflex_loader', 'timm\'s NaFlex loader makes its draws by worker, not by image'),
    ('teacher_img_size', 'naflex_loader', 'the images have no common size that a teacher could be shown'),
    ('teacher_cache', 'train_img_sizes', 'stored logits belong to one image size'),
    ('teacher_cache', 'aug_repeats aug_splits', 'stores one view of an image per epoch'),
    ('kd_logit_std', 'teacher_class_map_missing', 'masked classes have no logit to standardise'),
)

# The flags that decide whether timm can make a schedule.
_SCHEDULE_FLAGS = {
    **dict.fromkeys(('cosine', 'tanh', 'poly'), 'epochs cooldown_epochs lr_cycle_mul lr_cycle_decay lr_cycle_limit'),
    'constant': 'warmup_epochs',
    'step': 'decay_epochs decay_rate',
    'multistep': 'decay_milestones decay_rate',
    'plateau': 'sched_on_updates decay_rate patience_epochs',
    'wsd': 'epochs warmup_epochs warmup_prefix decay_epochs',
    'rsqrt': 'epochs warmup_epochs warmup_prefix decay_epochs lr_stable_timescale',
}


def check_args(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Refuse what cannot make a sensible run.

    Raises:
        UsageError: Naming the flag, its value and the way out.
    """
    changed = {dest for dest, value in vars(args).items() if value != defaults[dest]}
    if args.kd_warmup_epochs == 0:  # asks for nothing; once the default, it stands in args.yaml of plain runs
        changed.discard('kd_warmup_epochs')
    rules = (
        _pairs(args, changed), _data(args, changed), _files(args), _images(args), _batches(args), _crops(args),
        _labels(args), check_task_loss(args, changed), _compiling(args), _optimizer(args), _schedule(args),
        _train_sizes(args), _naflex(args), _extras(args), _distillation(args, changed),
    )
    for rule in rules:
        for sentence in rule:
            raise UsageError(sentence)


def check_device(device: str) -> None:
    """Refuse a GPU that was asked for on a machine without one; by default such a machine trains on its CPU.

    Raises:
        UsageError: torch finds no CUDA device.
    """
    if device.split(':')[0] == 'cuda' and not torch.cuda.is_available():
        raise UsageError(f'--device {device}: torch finds no CUDA device; --device cpu trains without one.')


def _pairs(args: argparse.Namespace, changed: Set[str]) -> Iterator[str]:
    for owner, flags in _COMPANIONS.items():
        for dest in flags.split():
            if dest in changed and not getattr(args, owner):
                yield f'{given(args, dest)}: belongs to {flag_name(owner)}, which is not given.'
    for flags, others, reason in _CLASHES:
        for dest, other in itertools.product(flags.split(), others.split()):
            if {dest, other} <= changed:
                yield f'{given(args, dest)}: {reason}, leave out this or {given(args, other)}.'


def _data(args: argparse.Namespace, changed: Set[str]) -> Iterator[str]:
    if args.data and args.data_dir and args.data != args.data_dir:
        yield f'two data folders, {args.data} and --data-dir {args.data_dir}: give one.'
    data_dir, kind = args.data_dir or args.data, _kind_of_dataset(args)
    if kind in _STREAMS:
        for dest in ('crops_per_image', 'naflex_loader', 'teacher_cache'):
            if dest in changed:
                yield f'{given(args, dest)}: needs a data set with indices, and --dataset {args.dataset} is a stream.'
    if kind in _NAMED_DATASETS:
        return
    if not data_dir:
        yield 'no data set: give its folder (train-kd /data/imagenet ...), or --dataset hfds/NAME.'
    elif not os.path.exists(data_dir):
        yield f'data folder {data_dir} does not exist.'


def _kind_of_dataset(args: argparse.Namespace) -> str:
    prefix, separator, _ = args.dataset.partition('/')
    return prefix.lower() if separator else ''


def _files(args: argparse.Namespace) -> Iterator[str]:
    files = {dest: getattr(args, dest) for dest in ('initial_checkpoint', 'pretrained_path', 'resume')}
    files['class_map'] = find_class_map(args.class_map, args.data_dir or args.data or '', args.train_split)
    if args.resume == 'auto':
        del files['resume']
        if not args.experiment:
            yield '--resume auto needs --experiment NAME: the name of the run to go on with.'
    for dest, path in files.items():
        if path and not os.path.isfile(path):
            yield f'{as_given(dest, path)}: {"a folder, not a file" if os.path.isdir(path) else "no such file"}.'


def _images(args: argparse.Namespace) -> Iterator[str]:
    if args.aa:
        try:
            create_transform(is_training=True, auto_augment=args.aa)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            yield f'--aa {args.aa}: timm knows no such policy ({error}).'
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, dest)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            yield f'{given(args, dest)}: expected two values, the least and the greatest.'
    if args.aug_splits == 1:
        yield '--aug-splits 1: expected 0 (off), or at least 2 splits.'
    if args.split_bn and not (args.aug_splits or args.resplit):
        yield '--split-bn needs --aug-splits 2 or more.'


def _batches(args: argparse.Namespace) -> Iterator[str]:
    dest = 'validation_batch_size' if args.validation_batch_size else 'batch_size'
    if args.tta and getattr(args, dest) % args.tta:
        yield (f'{given(args, dest)}: --tta {args.tta} averages so many neighbouring outputs of a '
               'batch, make it a multiple.')
    if args.split_bn and not args.aug_splits and args.batch_size % 2:
        yield f'--batch-size {args.batch_size}: --split-bn halves a batch and needs an even one.'
    if is_mixing(args) and not args.naflex_loader:
        dest = 'train_batch_sizes' if args.train_batch_sizes else 'batch_size'
        if any(batch_size % 2 for batch_size in args.train_batch_sizes or [args.batch_size]):
            yield f'{given(args, dest)}: Mixup and CutMix mix pairs and need an even batch size.'


def _crops(args: argparse.Namespace) -> Iterator[str]:
    if args.crops_per_image == 1:
        return
    crops = f'--crops-per-image {args.crops_per_image}'
    images, rest = divmod(args.batch_size, args.crops_per_image)
    if rest:
        yield f'{crops}: a batch holds all crops of an image, make --batch-size {args.batch_size} a multiple.'
    if is_mixing(args) and images % 2 and images > 1:
        yield (f'{crops}: --batch-size {args.batch_size} holds {images} images, and Mixup and CutMix, which mix the '
               'first row with the last, would mix the middle image with itself: make the batch a multiple of '
               f'{2 * args.crops_per_image}.')
    if args.teacher_cache_epochs and args.teacher_cache_epochs % args.crops_per_image:
        yield (f'--teacher-cache-epochs {args.teacher_cache_epochs}: {args.crops_per_image} epochs in a row share the '
               f'images ({crops}), make it a multiple: the images of the others would never be seen.')


def _labels(args: argparse.Namespace) -> Iterator[str]:
    evaluator = MultiLabelClassificationEvaluator if is_multi_label(args) else ClassificationEvaluator
    if args.eval_metric not in evaluator.metric_names:
        yield (f'--eval-metric {args.eval_metric}: not measured with --task {args.task or "classification"}, which has '
               f'{", ".join(evaluator.metric_names)}.')
    fields = ',' in (args.target_key or '')
    if not is_multi_label(args):
        if fields or args.target_format == 'multihot':
            dest = 'target_key' if fields else 'target_format'
            yield f'{given(args, dest)}: gives an image several labels, add --task multilabel.'
        if args.multilabel_threshold != 0.5:
            yield f'--multilabel-threshold {args.multilabel_threshold}: belongs to --task multilabel.'
        return
    if args.num_classes is None:
        yield '--task multilabel needs --num-classes N: how many labels there are.'
    if fields and args.target_format == 'multihot':
        yield f'--target-format multihot: the fields of --target-key {args.target_key} have a format of their own.'
    if _kind_of_dataset(args) not in ('hfds', 'hfids', 'tfds', 'wds'):
        yield ('--task multilabel: a folder, a tar or a torch/ data set gives an image one class; take --dataset '
               'hfds/NAME, hfids/NAME, tfds/NAME or wds/NAME.')
    if resolve_kd(args) is not None:
        yield ('--task multilabel: distillation compares what student and teacher choose of all classes, and here '
               'each label is a question of its own; leave out the teacher and --kd-loss.')


def _compiling(args: argparse.Namespace) -> Iterator[str]:
    if args.amp and args.model_dtype not in (None, 'float32'):
        yield f'--model-dtype {args.model_dtype}: AMP keeps the model in float32; leave out this or --amp.'
    compiled = [dest for dest in ('torchcompile', 'teacher_compile') if getattr(args, dest)]
    if not compiled:
        return
    import torch._dynamo as dynamo  # takes seconds
    known = dynamo.list_backends(None)
    for dest in compiled:
        if getattr(args, dest) not in known:
            yield f'{given(args, dest)}: torch has no such backend{nearest(getattr(args, dest), known)}.'
    if args.torchcompile == 'inductor' and args.torchcompile_mode:
        from torch._inductor import list_mode_options
        mode = f'--torchcompile-mode {args.torchcompile_mode}'
        if args.torchcompile_mode not in list_mode_options():
            yield f'{mode}: expected one of {", ".join(list_mode_options())}.'
        cuda_graphs = args.torchcompile_mode in ('reduce-overhead', 'max-autotune') and args.device.startswith('cuda')
        if cuda_graphs and args.grad_accum_steps > 1:  # pytorch issue 169545: gradients live in a graph's memory
            yield (f'{mode} --grad-accum-steps {args.grad_accum_steps}: the CUDA graphs of this mode overwrite '
                   'accumulated gradients: take max-autotune-no-cudagraphs, or leave out one of the two.')


def base_optimizer(name: str) -> str:
    """Return the optimizer that steps, by its name in timm: `lookahead_` is a wrapper around it."""
    return name.lower().split('_')[-1]


def _optimizer(args: argparse.Namespace) -> Iterator[str]:
    """Yield what timm's factory refuses: it builds this optimizer for a dummy parameter."""
    name = base_optimizer(args.opt)
    try:
        get_optimizer_info(name)
    except ValueError:
        yield f'{given(args, "opt")}: timm has no such optimizer{nearest(name, list_optimizers())}.'
    for twice in sorted(set(args.opt_kwargs) & set(optimizer_kwargs(args))):
        by_flag = f'opt_{twice}' if twice in ('eps', 'betas') else twice
        yield f'{given(args, "opt_kwargs")}: {twice} is set by {flag_name(by_flag)}.'
    kwargs = dict(optimizer_kwargs(args), lr=args.lr or args.lr_base, **args.opt_kwargs)
    try:
        create_optimizer_v2([torch.zeros(2, 2, requires_grad=True)], **kwargs)
    except IndexError:
        yield f'{given(args, "opt_betas")}: too few for --opt {args.opt}.'
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        flags = given(args, 'opt', 'opt_kwargs', 'opt_eps', 'opt_betas')
        yield f'{flags}: timm cannot make such an optimizer ({error}).'
    except RuntimeError:
        pass  # a matter of the device (fused=True): the real parameters will tell


def _schedule(args: argparse.Namespace) -> Iterator[str]:
    """Yield what timm's factory refuses, and a schedule that has no rate for its first or last epoch."""
    for dest in ('lr_decay_fn', 'lr_stable_timescale'):
        if getattr(args, dest) is not None and args.sched not in ('wsd', 'rsqrt'):
            yield f'{given(args, dest)}: is for --sched wsd and rsqrt, not {args.sched}.'
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    updates = 1000  # in an epoch: a stand-in, large enough that no length of the schedule is rounded to 0
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
        flags = _SCHEDULE_FLAGS[args.sched].split()
        unset = [flag_name(dest) for dest in flags if not given(args, dest)]
        without = f' without {", ".join(unset)}' if unset else ''
        reason = str(error.args[-1]).rstrip('.') if error.args else type(error).__name__
        yield (f'{given(args, "sched", *flags)}{without}: timm cannot make this schedule ({reason}), change one of '
               'these flags.')
    if args.stop_epoch is not None and args.stop_epoch > num_epochs:
        yield (f'--stop-epoch {args.stop_epoch}: the schedule of --epochs {args.epochs} ends after {num_epochs} '
               'epochs, lower this or raise --epochs.')


def _train_sizes(args: argparse.Namespace) -> Iterator[str]:
    sizes = args.train_img_sizes or []
    for dest in ('train_batch_sizes', 'train_size_probs'):
        value = getattr(args, dest)
        if value is not None and len(value) != len(sizes):
            yield f'{given(args, dest)}: expected one value for each of the {len(sizes)} --train-img-sizes.'
    if args.train_size_probs is not None and not any(args.train_size_probs):
        yield f'{given(args, "train_size_probs")}: expected a value above 0 among them.'
    if args.train_size_schedule == 'progressive' and len(sizes) < 2:
        yield '--train-size-schedule progressive needs two or more --train-img-sizes.'


def _naflex(args: argparse.Namespace) -> Iterator[str]:
    if not args.naflex_loader:
        return
    if args.cutmix_minmax and not (args.mixup or args.cutmix):
        yield f'{given(args, "cutmix_minmax")}: NaFlex Mixup has no such box, take --cutmix.'
    sizes, probs = args.naflex_patch_sizes or [], args.naflex_patch_size_probs
    if probs is not None and (len(probs) != len(sizes) or not any(probs)):
        yield (f'{given(args, "naflex_patch_size_probs")}: expected one value for each of the {len(sizes)} '
               '--naflex-patch-sizes, and one above 0.')


def _extras(args: argparse.Namespace) -> Iterator[str]:
    if args.log_tensorboard and find_spec('tensorboard') is None:
        yield '--log-tensorboard: tensorboard is not installed, pip install timm-kd[tensorboard].'
    try:
        if args.push_to_hub is not None:
            validate_repo_id(args.push_to_hub)
    except HFValidationError as error:
        yield f'{given(args, "push_to_hub")}: {error}'


def _distillation(args: argparse.Namespace, changed: Set[str]) -> Iterator[str]:
    if args.teacher and args.kd_model_name and args.kd_model_name != args.teacher:
        yield f'--kd-model-name {args.kd_model_name} beside {_teacher_flag(args)}: name one teacher.'
    settings = resolve_kd(args)
    if settings is not None:
        yield from _kd_loss(args, settings, changed)
    else:
        weights = 'task_loss_weight', 'distill_loss_weight', 'kd_warmup_epochs'
        for dest in ('kd_distill_type', *_parameter_dests(), *weights):
            if dest in changed:
                yield f'{given(args, dest)}: there is nothing to distil, add --teacher SPEC or --kd-loss NAME.'
    if settings is not None and settings.teacher is not None:
        yield from _teacher(args)
    else:
        for dest in vars(args):
            if dest in changed and dest.startswith(('teacher_', 'no_teacher_eval')):
                yield f'{given(args, dest)}: there is no teacher, add --teacher SPEC or leave this out.'


def _parameter_dests() -> list[str]:
    """Return the flags that set a distillation loss, or one of timm's distillation tasks."""
    return list(dict.fromkeys([*knob_dests(), *(dest for own in TIMM_DISTILLATION.values() for dest in own)]))


def _kd_loss(args: argparse.Namespace, settings: KDSettings, changed: Set[str]) -> Iterator[str]:
    if settings.loss in TIMM_DISTILLATION:
        chosen, further = f'--kd-distill-type {settings.loss}', _timm_distillation(args, settings, changed)
        known = list(TIMM_DISTILLATION[settings.loss])
    else:
        chosen, further = f'--kd-loss {settings.loss}', _logit_distillation(args, settings)
        known = [dest for dest, knob in knob_dests().items() if knob in KD_LOSSES[settings.loss].hyper_parameters()]
    for dest in _parameter_dests():
        if dest in changed and dest not in known:
            its_own = ', '.join(map(flag_name, known)) or 'none'
            yield f'{given(args, dest)}: no parameter of {settings.loss}, which has {its_own}.'
    yield from further
    if settings.distill_loss_weight < 0:
        yield (f'--task-loss-weight {args.task_loss_weight} leaves the distillation loss a weight of '
               f'{settings.distill_loss_weight:g}: give --distill-loss-weight too.')
    if settings.task_loss_weight == settings.distill_loss_weight == 0:
        yield '--task-loss-weight 0 and --distill-loss-weight 0 leave nothing to train on.'
    if args.num_classes == 1 and settings.loss != 'feature':
        yield f'--num-classes 1: {chosen} compares classes and needs at least 2.'


def _timm_distillation(args: argparse.Namespace, settings: KDSettings, changed: Set[str]) -> Iterator[str]:
    """Yield what is wrong with flags that the distillation of logits takes, and timm's own distillation does not."""
    chosen = f'--kd-distill-type {settings.loss}'
    if args.kd_loss not in (None, 'kd'):
        yield (f'{chosen} beside --kd-loss {args.kd_loss}: that loss is for logits, leave it out (--kd-loss kd '
               'overrides a config file).')
    if settings.teacher is None:
        yield f'{chosen} needs a teacher: add --teacher SPEC.'
    if settings.loss == 'token' and args.kd_token_distill_type == 'hard' and args.kd_temperature is not None:
        yield f'--kd-temperature {args.kd_temperature}: --kd-token-distill-type hard has none, leave it out.'
    own = {
        'feature': {'teacher_class_map': 'compares no classes'},
        'token': {'teacher_class_map_missing': 'needs a logit of every class'},
    }
    reasons = {
        'kd_warmup_epochs': 'is timm\'s, without a warm-up',
        'teacher_cache': 'asks the live teacher, and stored logits are for --kd-loss',
        'naflex_loader': 'takes images, not patches',
        'torchscript': 'has to look into the student, which a script hides',
        **own[settings.loss],
    }
    for dest, reason in reasons.items():
        if dest in changed:
            yield f'{given(args, dest)}: {chosen} {reason}; leave it out.'
    if settings.loss == 'feature' and len(named_teachers(args)) > 1:
        yield f'{_teacher_flag(args)}: {chosen} learns the features of one teacher; leave out the others.'


def _logit_distillation(args: argparse.Namespace, settings: KDSettings) -> Iterator[str]:
    loss = KD_LOSSES[settings.loss]
    if settings.teacher is None and loss.needs_teacher:
        teacher_free = ' or '.join(name for name, other in KD_LOSSES.items() if not other.needs_teacher)
        yield f'--kd-loss {settings.loss} needs a teacher: add --teacher SPEC, or choose {teacher_free}.'
    if settings.teacher is not None and not loss.accepts_teacher:
        yield (f'{_teacher_flag(args)}: --kd-loss {settings.loss} has no teacher, leave it out (--teacher \'\' '
               'overrides a config file).')
    for dest, knob in knob_dests().items():
        if knob in settings.loss_parameters and settings.teacher is not None and knob in loss.knobs_without_teacher:
            yield (f'{given(args, dest)}: stands in for a teacher of {settings.loss}, and there is '
                   f'{_teacher_flag(args)}: leave out one.')
    try:
        create_kd_loss(settings.loss, **settings.loss_parameters)
    except ValueError as error:  # a range that is narrower than that of another loss's flag of the same name
        yield f'--kd-loss {settings.loss}: {error}'


def _teacher(args: argparse.Namespace) -> Iterator[str]:
    # Stored logits may stand in for a file that is no longer there.
    if not args.teacher_cache and not any(os.path.isfile(os.path.expanduser(spec)) for spec in named_teachers(args)):
        for dest in ('teacher_model', 'teacher_ema'):
            if getattr(args, dest):
                yield (f'{_teacher_flag(args)} is no file, and {given(args, dest)} is for a teacher that is a weights '
                       'file.')
    if args.teacher_dtype == 'amp' and not args.amp:
        yield '--teacher-dtype amp: is the autocast of the student, add --amp or choose a dtype.'


def _teacher_flag(args: argparse.Namespace) -> str:
    dest = 'teacher' if args.teacher else 'kd_model_name'
    return ' '.join(as_given(dest, spec) for spec in named_teachers(args))
