"""The process that a run lives in: its device and ranks, its random streams, its signals, and how it ends."""
import importlib
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
from timm.utils.distributed import init_distributed_device_so
from torch.distributed import register_rendezvous_handler, rendezvous

from .errors import CommandError, ExitCode, UsageError, shortened
from .files import NO_ROOM

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Process:
    """One of the processes of a run: its device, its number among them, and how many there are.

    Args:
        group: The processes as a gloo group, whatever backend the devices use; None for a process alone. It has no
            timeout that a download or a scan of the data could exceed.
    """
    device: torch.device
    rank: int = 0
    world_size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    @property
    def primary(self) -> bool:
        """Whether this process is the one that logs and writes the files of the run."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether a launcher started the process as one of a group (which may have a single member)."""
        return self.group is not None

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.group is not None:
            torch.distributed.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all processes give, in the order of their ranks."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def primary_first(self) -> Iterator[None]:
        """Let the primary process through before the others: they find done what it downloads or clears."""
        if not self.primary:
            self.barrier()
        yield
        if self.primary:
            self.barrier()


_RENDEZVOUS = 'timm-kd'


def _rendezvous(url: str, **kwargs: Any) -> Iterator[tuple[torch.distributed.Store, int, int]]:
    """Meet as torch's `env://` does, and start a `_Watch` of the processes.

    torchrun's agent keeps one store over its restarts, where a restarted process could find the address of a dead one:
    each start of the processes has names of its own in it.
    """
    prefix = f'start-{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}'
    for store, rank, world_size in rendezvous('env://', **kwargs):
        store = torch.distributed.PrefixStore(prefix, store)
        _Watch.of_this_process = _Watch(store, rank, world_size)
        yield store, rank, world_size


register_rendezvous_handler(_RENDEZVOUS, _rendezvous)


def setup_process(device: str, device_modules: list[str] | None = None) -> Process:
    """Set up the device and, under `torchrun` or SLURM, the process group, as timm does.

    Args:
        device: The device by its name in torch. In a process group, each process of a host gets one of its own. On a
            machine without a GPU, cuda means the CPU, with a warning: it is the default, and a user who asked for a GPU
            was refused by `cli.checks.check_device`.
        device_modules: Modules to import first, which make their devices known to torch.

    Raises:
        UsageError: If the device or a module for it does not exist.
    """
    for module in device_modules or []:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f'`device_modules` {module}: {error}.') from error
    if device.split(':')[0] == 'cuda' and not torch.cuda.is_available():
        _logger.warning('No GPU found: training on the CPU (--device cpu says so without this warning).')
        device = 'cpu'
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    try:
        found = init_distributed_device_so(device, dist_url=f'{_RENDEZVOUS}://')
        device = torch.device(found['device'])
        torch.zeros(1, device=device).item()  # shows whether this torch has the device, and can compute on it
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'`device` {device}: {shortened(error).rstrip(".")}.') from error
    rank, world_size = found['global_rank'], found['world_size']
    group = None
    if found['distributed']:
        group = torch.distributed.new_group(backend='gloo', timeout=timedelta(days=30))  # as good as none
        _logger.info(f'Process {rank} of {world_size} on {device}.')
    else:
        _logger.info(f'Training with a single process on 1 device ({device}).')
    return Process(device, rank, world_size, group)


def _accelerators() -> dict[str, Any]:
    """Return torch's modules of the accelerators in use, whose random streams are those of the process's device."""
    in_use = {
        'cuda': torch.cuda.is_initialized(),
        'xpu': torch.xpu.is_initialized(),
        'mps': torch.backends.mps.is_available(),
    }
    return {name: getattr(torch, name) for name, used in in_use.items() if used}


def get_random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch and the device, as `weights_only` can load them."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, position, has_gauss, cached = np.random.get_state()
    return {
        'python': (version, list(keys), gauss),
        'numpy': (name, numpy_keys.tolist(), position, has_gauss, cached),
        'torch': torch.get_rng_state(),
        'devices': {name: module.get_rng_state() for name, module in _accelerators().items()},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set what `get_random_state` returned, but for kinds of devices that this process does not use."""
    version, keys, gauss = state['python']
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    devices = state.get('devices')
    if devices is None:  # a checkpoint of version 0.1 lists all CUDA devices of the machine
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        devices = {'cuda': state['cuda'][index]} if index < len(state['cuda']) else {}
    for name, module in _accelerators().items():
        if name in devices:
            module.set_rng_state(devices[name])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave every random stream as it was found, so that what this project adds changes no draw of the training."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


class Terminated(CommandError):
    """SIGTERM came; a recovery checkpoint is on disk."""
    exit_code = ExitCode.TERMINATED


class AgreedStop:
    """SIGTERM (schedulers send it before they kill) and Ctrl-C, as decisions that all processes of a run take at once.

    A process that stopped by itself would leave the others in a collective operation that nobody answers, and a signal
    reaches the processes at different moments, or one of them alone. So each `check` starts a reduction of the signals
    in the gloo group and acts on the result of the reduction that the check before it started: by then it has arrived,
    and nothing waits for a device.

    A single process stops at the first check after SIGTERM; Ctrl-C raises `KeyboardInterrupt` there wherever it is.

    Args:
        process: The process. In a group, all must make the object and the same number of checks.

    Attributes:
        agreed: Whether the run stops for SIGTERM.
    """

    def __init__(self, process: Process):
        self.received = 0  # the number of the signal
        self.agreed = False
        self._process = process
        self._previous: dict[int, Any] = {}
        self._reduction = self._flag = None

    def __enter__(self) -> 'AgreedStop':
        signals = [signal.SIGTERM]
        # A process that a shell script started in the background ignores Ctrl-C, and must go on ignoring it.
        if self._process.distributed and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signals.append(signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame: object) -> None:
        self.received = max(self.received, number)  # SIGTERM, which leaves a recovery file, over Ctrl-C

    def check(self) -> bool:
        """Tell whether to stop here for SIGTERM: the same answer in all processes.

        Raises:
            KeyboardInterrupt: After Ctrl-C, in all processes at the same check.
        """
        if self._process.group is None:
            self.agreed = self.received == signal.SIGTERM
            return self.agreed
        if self._reduction is not None:
            self._reduction.wait()
            if self._flag == signal.SIGINT:
                raise KeyboardInterrupt
            self.agreed = bool(self._flag)
        if not self.agreed:
            self._flag = torch.tensor(self.received, dtype=torch.uint8)
            self._reduction = torch.distributed.all_reduce(
                self._flag, torch.distributed.ReduceOp.MAX, group=self._process.group, async_op=True)
        return self.agreed

    def leave(self, place: str) -> NoReturn:
        """End the run when all processes are here: once one has ended, torchrun gives the others 30 seconds.

        Raises:
            Terminated: Naming the place.
        """
        self._process.barrier()
        raise Terminated(f'SIGTERM: stopped in {place}; --resume auto goes on from there.')


class _Watch:
    """Lets the processes of a run end together: one that fails says so, the others follow with its exit code.

    Without it, the others stay in a collective operation with a process that has ended, until they report a lost
    connection (gloo) or for ten minutes (NCCL). They hear of each other through the store that they met in.

    Attributes:
        of_this_process: The watch of this process, where it is one of several.
        code: The exit code of the process that failed first, once it is known.
    """
    of_this_process: '_Watch | None' = None

    def __init__(self, store: torch.distributed.Store, rank: int, world_size: int):
        self.code: int | None = None
        self._store = store
        self._rank = rank
        self._others = [f'ended-{other}' for other in range(world_size) if other != rank]
        self._ended = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        try:
            while not self._store.check(['failure']):
                if self._ended.wait(1.0):
                    return
            self.code = int(self._store.get('failure').split()[1])
            self._store.set(f'ended-{self._rank}', '')
        except RuntimeError:  # the process that held the store is gone
            return
        # The main thread comes out of a gloo operation by itself and closes its files. Where it cannot, nothing is
        # lost: all files of a run survive a kill.
        if not self._ended.wait(10.0):
            os._exit(self.code)

    def announce(self, code: int) -> bool:
        """Say that this process fails, and return whether it is the first to."""
        self._ended.set()
        if self.code is not None:
            return False
        own = f'{self._rank} {int(code)}'
        try:
            first = self._store.compare_set('failure', '', own).decode()
            self.code = int(first.split()[1])
            self._store.set(f'ended-{self._rank}', '')
            if self._rank == 0:  # it may hold the store: the others read there before it goes
                self._store.wait(self._others, timedelta(seconds=10))
        except RuntimeError:  # of the store: there is nobody to tell
            if self.code is None:
                self.code = int(code)
                return True
        return first == own

    def close(self) -> None:
        """Stop watching: this process has done its part."""
        _Watch.of_this_process = None
        self._ended.set()
        try:
            self._store.set(f'ended-{self._rank}', '')
        except RuntimeError:  # the process that held the store is done, too
            return


@contextmanager
def ending(
        program: str,
        interrupted: str = 'interrupted.',
        speak: Callable[[str], str] = str,
) -> Iterator[None]:
    """End a command as all of this project's end: an error of its user is one line on stderr and an `ExitCode`.

    The process group is left as it is after an error: taking it down can hang while another process is in the middle
    of an operation.

    Args:
        program: The name of the command.
        interrupted: What it says after Ctrl-C.
        speak: Puts the message of the error into the command's own words, its flags.

    Raises:
        SystemExit: With the exit code of the error; in a group of processes, that of the one that failed first.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code, message = _explain(error, interrupted)
        watch = _Watch.of_this_process
        first = watch is None or watch.announce(code)
        if first and message is None:
            raise
        if first:
            print(f'{program}: error: {speak(message)}', file=sys.stderr)
        raise SystemExit(code if watch is None else watch.code) from None
    if _Watch.of_this_process is not None:
        torch.distributed.destroy_process_group()
        _Watch.of_this_process.close()


def _explain(error: BaseException, interrupted: str) -> tuple[int, str | None]:
    """Return the exit code and the line of an error; no line for a defect of the program, which has a traceback."""
    if isinstance(error, CommandError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, interrupted
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return ExitCode.FAILED, f'could not write {error.filename or "a file"} ({error.strerror}): free some space.'
    return ExitCode.FAILED, None
