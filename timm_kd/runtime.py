"""The process a run lives in: device, precision, ranks, SIGTERM."""
import argparse
import importlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from timm.utils import NativeScaler, init_distributed_device
from torch.distributed import register_rendezvous_handler, rendezvous

from .errors import UsageError, shortened

_logger = logging.getLogger(__name__)

EXIT_SIGTERM = 128 + signal.SIGTERM

_RESTARTED = 'timm-kd-restarted'


def _rendezvous_of_this_start(url: str, **kwargs: Any) -> Iterator[tuple[torch.distributed.Store, int, int]]:
    """torch's `env://`, under keys of this start of the workers.

    torchrun's agent keeps one store over its restarts, where a restarted rank may find the address of a dead one.
    """
    prefix = f'start-{os.environ["TORCHELASTIC_RESTART_COUNT"]}'
    for store, rank, world_size in rendezvous('env://', **kwargs):
        yield torch.distributed.PrefixStore(prefix, store), rank, world_size


register_rendezvous_handler(_RESTARTED, _rendezvous_of_this_start)


def setup_device(args: argparse.Namespace, device_given: bool) -> torch.device:
    """Sets up the device and, under `torchrun` or SLURM, the process group, as timm does.

    Sets `device`, `distributed`, `world_size`, `rank` and `local_rank` of `args`.

    Raises:
        UsageError: If the device or a module for it does not exist. Without `--device`, a machine without a
            GPU trains on its CPU.
    """
    for module in args.device_modules or []:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f'--device-modules {module}: {error}') from error
    if args.device.split(':')[0] == 'cuda' and not torch.cuda.is_available():
        if device_given:
            raise UsageError(f'--device {args.device}: torch finds no CUDA device; --device cpu trains without one.')
        _logger.warning('No GPU found: training on the CPU (--device cpu says so without this warning).')
        args.device = 'cpu'
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if 'TORCHELASTIC_RESTART_COUNT' in os.environ:
        args.dist_url = f'{_RESTARTED}://'
    try:
        device = init_distributed_device(args)
        torch.zeros(1, device=device).item()  # tells whether this torch has the device, and can compute on it
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'--device {args.device}: {shortened(error)}') from error
    finally:
        vars(args).pop('dist_url', None)
    if args.distributed:
        _logger.info(f'Process {args.rank} of {args.world_size} on {args.device}.')
    elif args.rank == 0:
        _logger.info(f'Training with a single process on 1 device ({args.device}).')
    return device


def model_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Returns the dtype that `--model-dtype` names, or None for the default."""
    if args.model_dtype == 'float16':
        _logger.warning('--model-dtype float16: training in pure float16 easily overflows; bfloat16 is safer.')
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Returns what makes the context that forwards run in: autocast under `--amp`."""
    if not args.amp:
        return nullcontext
    _logger.info(f'Using native Torch AMP ({args.amp_dtype}). Training in mixed precision.')
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def create_loss_scaler(args: argparse.Namespace, device: torch.device) -> NativeScaler | None:
    """Returns timm's loss scaler where float16 gradients need it: under `--amp` on a GPU."""
    if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
        return NativeScaler(device=device.type)
    return None


class Terminated(Exception):
    """SIGTERM came; a recovery checkpoint is on disk."""


class TerminationSignal:
    """Remembers SIGTERM (what schedulers send before they kill) until the run reaches a place to stop at."""

    def __init__(self) -> None:
        self.received = False
        self._previous = None

    def __enter__(self) -> 'TerminationSignal':
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True


class SkippedSteps:
    """Counts optimizer steps in a row that a loss scaler skipped, without asking the device.

    Args:
        optimizer: Its `step` is called by the scaler only when the gradients are finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.in_a_row = 0
        self._stepped = False
        step = optimizer.step

        # No hook: an optimizer that wraps another (timm's Lookahead) does not call hooks.
        @wraps(step)
        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self._stepped = True
            return step(*args, **kwargs)

        optimizer.step = counted_step

    def count_update(self) -> int:
        """Returns how many updates in a row were skipped, the one just made included."""
        self.in_a_row = 0 if self._stepped else self.in_a_row + 1
        self._stepped = False
        return self.in_a_row
