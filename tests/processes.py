"""Runs of the script in processes of their own that a signal can end, without paying for the imports each time.

A fork server imports the project once; each run is a fork of it.
"""
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # the server reads it when it imports torch
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['timm_kd.train'])


class Run:
    """A process that runs `function(*args)`, its output in files.

    Args:
        function: A function of a module (it travels by name).
        args: Its arguments.
        folder: Where stdout and stderr go.
        env: Further environment variables.
    """

    def __init__(self, function: Callable, args: tuple, folder: Path, env: dict[str, str] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / 'stdout', folder / 'stderr']
        self.process = _context.Process(target=_run, args=(function, args, *self._outputs, env or {}))
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """Returns the exit code, negative for a signal; None if the process still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text()


def start_on_ranks(function: Callable, args: tuple, folder: Path, world_size: int = 2) -> list[Run]:
    """Starts a function in as many processes, with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    return [
        Run(function, args, folder / f'rank-{rank}', dict(
            MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(world_size), RANK=str(rank),
            LOCAL_RANK=str(rank), OMP_NUM_THREADS='1',
        ))
        for rank in range(world_size)
    ]


def run_on_ranks(function: Callable, args: tuple, folder: Path, world_size: int = 2) -> list[Run]:
    """Starts a function in as many processes and waits for all to end well."""
    runs = start_on_ranks(function, args, folder, world_size)
    for run in runs:
        assert run.wait(300) == 0, run.stderr
    return runs


def _run(function: Callable, args: tuple, stdout: Path, stderr: Path, env: dict[str, str]) -> None:
    os.environ.update(env)
    # Workers as in a run from the command line; those of a fork server would outlive one that is killed.
    multiprocessing.set_start_method('fork', force=True)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream.fileno())
    function(*args)
