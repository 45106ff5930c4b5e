"""The task loss: the flags that choose and set it, and what timm's factory is given of them."""
import argparse
from collections.abc import Iterator, Set
from typing import Any

from timm.loss import (
    CLASS_WEIGHT_METHODS,
    LOSS_TYPES,
    MULTI_LABEL_LOSS_TYPES,
    create_classification_loss,
    load_class_stats,
    resolve_class_weights,
)
from timm.task import MultiLabelClassificationEvaluator

from ..errors import shortened
from .messages import given
from .parser import Flag, flag, not_negative, number, positive

SINGLE_LABEL_LOSS_TYPES = tuple(loss for loss in LOSS_TYPES if loss not in ('twoway', 'zlpr', 'db'))

# The flags that set one loss or two, and the losses that each of them sets: where an image has one class, and where it
# has several. The dests are arguments of timm's factory, but for the first six.
LOSS_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'loss_class_weight': (('bce',), ('bce', 'asl')),
    'loss_pos_weight': (('bce',), ('bce', 'asl')),
    'loss_weight_power': (('bce',), ('bce', 'asl')),
    'loss_weight_beta': (('bce',), ('bce', 'asl')),
    'loss_weight_max': (('bce',), ('bce', 'asl')),
    'class_stats': (('bce',), ('bce', 'asl', 'db')),
    'asl_gamma_pos': (('asl',), ('asl',)),
    'asl_gamma_neg': (('asl',), ('asl',)),
    'asl_clip': ((), ('asl',)),
    'asl_reduction': ((), ('asl',)),
    'poly_epsilon': (('poly',), ('poly',)),
    'poly_gamma': ((), ('poly',)),
    'poly_alpha': ((), ('poly',)),
    'twoway_tp': ((), ('twoway',)),
    'twoway_tn': ((), ('twoway',)),
    'db_neg_scale': ((), ('db',)),
    'db_init_bias': ((), ('db',)),
    'db_focal_gamma': ((), ('db',)),
}
_FACTORY_ARGUMENTS = [dest for dest in LOSS_PARAMETERS if not dest.startswith(('loss_', 'class_'))]

# The defaults that are others with `--task multilabel`.
MULTI_LABEL_DEFAULTS = {'smoothing': 0.0, 'eval_metric': MultiLabelClassificationEvaluator.default_metric}

LOSS_FLAGS: list[Flag] = [
    flag('--loss', known=('', *LOSS_TYPES), help='task loss (ce when unset; bce with --task multilabel)'),
    flag(
        '--class-stats', type=str, metavar='FILE', default='',
        help='JSON file of timm\'s class_weights.py: images of each class (pos_counts) and of all (num_samples)',
    ),
    flag(
        '--loss-class-weight', type=str, metavar='WEIGHT', default='',
        help='weight of each class in bce: a number, a list "1,2,3", a file, or by --class-stats: inv_freq, '
             'effective_num',
    ),
    flag(
        '--loss-pos-weight', type=str, metavar='WEIGHT', default='',
        help='weight of the positive term of bce: as --loss-class-weight, or by --class-stats: neg_pos',
    ),
    flag('--loss-weight-power', type=not_negative, default=1.0, help='exponent of neg_pos and inv_freq'),
    flag('--loss-weight-beta', type=number(float, above=0, below=1), default=0.999, help='beta of effective_num'),
    flag('--loss-weight-max', type=positive, help='cap on weights made from --class-stats'),
    flag('--asl-gamma-pos', type=not_negative, default=1.0, help='asl: focus on the classes of an image'),
    flag('--asl-gamma-neg', type=not_negative, default=4.0, help='asl: focus on the other classes'),
    flag('--asl-clip', type=not_negative, default=0.05, help='asl, multi-label: margin of the other classes'),
    flag(
        '--asl-reduction', known=('batchmean', 'sum', 'mean'), default='batchmean',
        help='asl, multi-label: how the classes and images make one number',
    ),
    flag('--poly-epsilon', type=float, default=2.0, help='poly: weight of 1 - p (0 is ce, or bce)'),
    flag('--poly-gamma', type=not_negative, default=0.0, help='poly, multi-label: focus (0 is off)'),
    flag('--poly-alpha', type=float, help='poly, multi-label: balance of positive and negative terms (unset: none)'),
    flag('--twoway-tp', type=positive, default=4.0, help='twoway: temperature of the positive logits'),
    flag('--twoway-tn', type=positive, default=1.0, help='twoway: temperature of the negative logits'),
    flag('--db-neg-scale', type=positive, default=2.0, help='db: scale of the negative logits'),
    flag('--db-init-bias', type=float, default=0.05, help='db: shift of the logits by how frequent a class is'),
    flag('--db-focal-gamma', type=not_negative, default=2.0, help='db: focus (0 is off)'),
]


def task_loss_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that choose the task loss, as on the command line, and what each chooses."""
    flags = {'--jsd-loss': 'jsd'} if args.jsd_loss else {}
    if args.bce_loss:
        flags['--bce-loss'] = 'bce'
    if args.loss:
        flags[f'--loss {args.loss}'] = args.loss
    return flags


def is_multi_label(args: argparse.Namespace) -> bool:
    """Return whether an image may have several classes."""
    return args.task == 'multilabel'


def task_loss(args: argparse.Namespace) -> str:
    """Return the name of the task loss: that of its flag, or what timm's script takes without one."""
    return next(iter(task_loss_flags(args).values()), 'bce' if is_multi_label(args) else 'ce')


def loss_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of timm's `create_classification_loss`.

    Raises:
        OSError: A file of weights cannot be read.
        ValueError: It, or a weight, is not what timm reads.
    """
    loss_type = task_loss(args)
    stats = load_class_stats(args.class_stats)
    weighting = dict(
        class_stats=stats,
        power=args.loss_weight_power,
        beta=args.loss_weight_beta,
        max_weight=args.loss_weight_max,
    )
    kwargs = dict(
        loss_type=loss_type,
        multi_label=is_multi_label(args),
        smoothing=args.smoothing,
        soft_targets=is_mixing(args) and loss_type != 'jsd',
        jsd_splits=args.aug_splits,
        class_weight=resolve_class_weights(args.loss_class_weight, 'class_weight', **weighting),
        pos_weight=resolve_class_weights(args.loss_pos_weight, 'pos_weight', **weighting),
        **{name: getattr(args, name) for name in _FACTORY_ARGUMENTS},
    )
    if loss_type == 'bce':
        kwargs.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum)
        kwargs['pos_weight'] = args.bce_pos_weight if kwargs['pos_weight'] is None else kwargs['pos_weight']
    if loss_type == 'db' and stats is not None:
        kwargs.update(class_counts=stats[0], num_samples=stats[1])
    return kwargs


def is_mixing(args: argparse.Namespace) -> bool:
    """Return whether Mixup or CutMix is on, so that targets are dense."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_task_loss(args: argparse.Namespace, changed: Set[str]) -> Iterator[str]:
    """Yield what is wrong with the flags of the task loss; `changed` are those that differ from their defaults."""
    multi_label = is_multi_label(args)
    flags = task_loss_flags(args)
    if len(set(flags.values())) > 1:
        yield f'{" and ".join(flags)}: choose one task loss.'
    chosen, loss = next(iter(flags), '--loss'), task_loss(args)
    fitting = MULTI_LABEL_LOSS_TYPES if multi_label else SINGLE_LABEL_LOSS_TYPES
    if loss not in fitting:
        other = '; it is for --task multilabel' if loss in MULTI_LABEL_LOSS_TYPES else ''
        yield (f'{chosen}: with {"several classes" if multi_label else "one class"} an image timm has '
               f'{", ".join(fitting)}{other}.')
    if loss == 'jsd' and args.aug_splits < 2:
        yield f'{chosen} compares augmentation splits: add --aug-splits 2 or more.'
    if loss == 'db' and not args.class_stats:
        yield f'{chosen}: needs --class-stats FILE, the images of each class.'
    for dest, owners in LOSS_PARAMETERS.items():
        if dest in changed and loss not in owners[multi_label]:
            its_own = ' or '.join(f'--loss {owner}' for owner in owners[multi_label])
            way_out = its_own or f'--task multilabel --loss {owners[True][0]}'
            yield f'{given(args, dest)}: no parameter of {loss}, add {way_out} or leave it out.'
    if args.bce_pos_weight is not None and args.loss_pos_weight not in ('', str(args.bce_pos_weight)):
        yield f'{given(args, "bce_pos_weight")} beside {given(args, "loss_pos_weight")}: say it once.'
    weights = {args.loss_class_weight, args.loss_pos_weight}
    if args.class_stats and loss != 'db' and weights.isdisjoint(CLASS_WEIGHT_METHODS):
        yield (f'{given(args, "class_stats")}: no weight is made of it, add --loss-pos-weight neg_pos, '
               'or --loss-class-weight inv_freq or effective_num.')
    for dest in ('mixup', 'cutmix', 'cutmix_minmax'):
        if getattr(args, dest) and (loss in ('twoway', 'zlpr') or (loss == 'asl' and not multi_label)):
            yield f'{chosen}: needs targets that are not mixed, leave out {given(args, dest)}.'
    try:
        create_classification_loss(**loss_kwargs(args))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        flags = [dest for dest in ('loss_class_weight', 'loss_pos_weight', 'class_stats') if getattr(args, dest)]
        yield (f'{given(args, *flags) or chosen}: {shortened(error).rstrip(".")}; a weight is a number, a list such as '
               f'1,2,3, a file with one of these, or beside --class-stats FILE {" or ".join(CLASS_WEIGHT_METHODS)}.')
