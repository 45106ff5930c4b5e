"""What the flags of optimizer and schedule mean together, before either is built."""
import argparse
import math

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs

from ..errors import UsageError, nearest
from .messages import as_given

_DEFAULT_DECAY = 0.2  # timm's share of wsd and rsqrt


def check_optimizer(args: argparse.Namespace) -> None:
    """Refuse what timm's factory refuses: it builds this optimizer for a dummy parameter."""
    name = args.opt.lower().split('_')[-1]
    try:
        get_optimizer_info(name)
    except ValueError as error:
        raise UsageError(f'--opt {args.opt}: timm has no such optimizer{nearest(name, list_optimizers())}') from error
    for twice in sorted(set(args.opt_kwargs) & set(optimizer_kwargs(args))):
        by_flag = f'opt_{twice}' if twice in ('eps', 'betas') else twice
        raise UsageError(f'{as_given("opt_kwargs", args.opt_kwargs)}: {twice} is set by {as_given(by_flag, True)}')
    kwargs = dict(optimizer_kwargs(args), lr=args.lr or args.lr_base, **args.opt_kwargs)
    try:
        create_optimizer_v2([torch.zeros(2, 2, requires_grad=True)], **kwargs)
    except IndexError as error:
        raise UsageError(f'{as_given("opt_betas", args.opt_betas)}: too few for --opt {args.opt}') from error
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        given = [as_given(dest, getattr(args, dest)) for dest in ('opt', 'opt_kwargs', 'opt_eps', 'opt_betas')
                 if getattr(args, dest) not in (None, {})]
        raise UsageError(f'{" ".join(given)}: timm cannot make such an optimizer ({error})') from error
    except RuntimeError:
        pass  # a matter of the device (fused=True): the real parameters will tell


def check_schedule(args: argparse.Namespace) -> None:
    """Refuse lengths that leave a schedule nothing, and flags of another schedule."""
    for dest in ('lr_decay_fn', 'lr_stable_timescale'):
        if getattr(args, dest) is not None and args.sched not in ('wsd', 'rsqrt'):
            raise UsageError(f'{as_given(dest, getattr(args, dest))}: is for --sched wsd and rsqrt, not {args.sched}')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise UsageError('--sched plateau looks at a metric of the epoch: leave out --sched-on-updates')
    if args.sched == 'step' and args.decay_epochs == 0:
        raise UsageError('--decay-epochs 0: --sched step drops the rate each time so many epochs have passed: '
                         'expected a value above 0')
    if args.sched in ('cosine', 'tanh', 'poly') and args.lr_cycle_mul < 1:
        _check_cooldown(args)
    if args.sched in ('wsd', 'rsqrt'):
        _check_decay(args)
    if args.sched == 'rsqrt' and not args.warmup_epochs and args.lr_stable_timescale is None:
        raise UsageError('--sched rsqrt takes its time scale from the warm-up, and --warmup-epochs is 0: '
                         'add --lr-stable-timescale EPOCHS')


def _check_cooldown(args: argparse.Namespace) -> None:
    """The lengths of shrinking cycles are a geometric series; timm's formula has no value from its limit on."""
    limit = args.epochs / (1 - args.lr_cycle_mul)
    end_of_cycles = math.floor(limit * (1 - args.lr_cycle_mul ** args.lr_cycle_limit))
    if args.cooldown_epochs and end_of_cycles + args.cooldown_epochs >= limit:
        raise UsageError(f'--cooldown-epochs {args.cooldown_epochs}: with --lr-cycle-mul {args.lr_cycle_mul:g}, '
                         f'--sched {args.sched} ends before epoch {limit:g}, and the cycles take {end_of_cycles}: '
                         'lower it or raise --lr-cycle-mul')


def _check_decay(args: argparse.Namespace) -> None:
    """The decay of wsd and rsqrt shares the epochs with what comes before it."""
    length = args.epochs if args.warmup_prefix else args.epochs - args.warmup_epochs
    epochs = f'--sched {args.sched} with --epochs {args.epochs}'
    if not args.warmup_prefix:
        epochs += f' and --warmup-epochs {args.warmup_epochs}'
    if length <= 0:
        raise UsageError(f'{epochs}: nothing is left after the warm-up, raise --epochs, lower --warmup-epochs or '
                         'add --warmup-prefix')
    given = _DEFAULT_DECAY if args.decay_epochs is None else args.decay_epochs
    decay = given * length if given < 1 else given
    decay_flag = f'--decay-epochs {given:g}{" (its default)" if args.decay_epochs is None else ""}'
    if decay > length:
        raise UsageError(f'{decay_flag}: {epochs} has {length} epochs for it, lower it or raise --epochs')
    if not decay or (round(decay) == 0 and not args.sched_on_updates):
        raise UsageError(f'{epochs}: {decay_flag} is less than one epoch to decay in, give --decay-epochs 1 or more, '
                         'or raise --epochs')
