"""What test files share: seeded models, digits, runs of the script in this process and in others, hostile pickles."""
import argparse
import contextlib
import csv
import io
import json
import logging
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import AugMixDataset, create_dataset, create_loader, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, DistributedSampler

from timm_kd import Teacher
from timm_kd.replay import make_replayable
from timm_kd.train import main

TESTS = Path(__file__).parent
BASE = (
    '--model test_resnet --num-classes 10 --img-size 32 --device cpu --epochs 1 --batch-size 32 --workers 0 '
    '--opt adamw --lr 3e-3 --warmup-epochs 0 --log-interval 2'
)
NUM_CLASSES, PER_CLASS = 10, 4  # of the fixture `image_folder`
NUM_SAMPLES = NUM_CLASSES * PER_CLASS
TIMM_FLAGS = json.loads((Path(__file__).parent / 'data' / 'timm_train_flags.json').read_text())
STILL = '--opt momentum --lr 1e-30'  # no weight moves: every loss is a function of the batch alone

# The processes of this file are forks of a server that has imported the project once.
os.environ.setdefault('OMP_NUM_THREADS', '1')  # the server reads it when it imports torch
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['timm_kd.train'])
_reserved: list[socket.socket] = []


def build(name: str = 'test_resnet', num_classes: int = 10, seed: int = 0, **kwargs) -> nn.Module:
    """Create a model of timm in eval mode whose weights the seed decides."""
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


def read_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's digits, `[1797, 1, 8, 8]` in [0, 1], and their classes `[1797]`."""
    from sklearn.datasets import load_digits  # seconds of import that most processes do not need

    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(classes)


def digits_batch(size: int = 8, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return digits `[size, 3, 32, 32]`, normalised with mean and deviation 0.5, and their classes `[size]`."""
    images, classes = (part[first:first + size] for part in read_digits())
    return (interpolate(images, (32, 32)).repeat(1, 3, 1, 1) - 0.5) / 0.5, classes


def save_digit(image: torch.Tensor, path: Path) -> None:
    """Save one of `read_digits`, `[1, 8, 8]`, as a PNG of 32x32 pixels in three channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((image[0] * 255).byte().numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    picture.convert('RGB').save(path)


def logits_of(
        model: nn.Module,
        digits: Path,
        data_config: dict | None = None,
        batch_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of a model for the validation images, preprocessed as it asks for by default, and their classes."""
    config = data_config or resolve_data_config({'img_size': 32}, model=model)
    loader = create_loader(
        create_dataset('', digits, 'validation', is_training=False), batch_size=batch_size, num_workers=0,
        device=torch.device('cpu'), use_prefetcher=False, persistent_workers=False,
        **{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')},
    )
    with torch.no_grad():
        answers = [(model.eval()(images), target) for images, target in loader]
    return tuple(torch.cat(part) for part in zip(*answers, strict=True))


def teacher_logits(
        folder: Path,
        digits: Path,
        dtype: torch.dtype,
        batch_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what timm's model of a folder answers; in bfloat16, where ours rounds folded weights, what ours does."""
    if dtype == torch.float32:
        return logits_of(timm.create_model(f'local-dir:{folder}', pretrained=True), digits, batch_size=batch_size)
    config = resolve_data_config({'img_size': 32}, model=timm.create_model('test_resnet'))
    return logits_of(Teacher(folder, 10, config['mean'], config['std'], dtype='bfloat16'), digits, config, batch_size)


def percent(answers: torch.Tensor, others: torch.Tensor) -> float:
    """Return how many rows have their largest logit at a class, or at that of other logits."""
    others = others.argmax(1) if others.ndim > 1 else others
    return 100 * (answers.argmax(1) == others).double().mean().item()


def replayable_loader(
        root: Path,
        workers: int = 0,
        *,
        batch_size: int = 8,
        world_size: int = 1,
        rank: int = 0,
        mixup: Callable | None = None,
        aug_repeats: int = 0,
        aug_splits: int = 0,
        seed: int = 1,
        num_epochs: int | None = None,
        num_crops: int = 1,
        **options,
) -> DataLoader:
    """Make a training loader of timm's replayable; one process plays any rank, by the sampler."""
    dataset = create_dataset('', root=str(root), split='train')
    if aug_splits:
        dataset = AugMixDataset(dataset, num_splits=aug_splits)
    loader = create_loader(
        dataset, (3, 32, 32), batch_size, is_training=True, num_workers=workers, device=torch.device('cpu'),
        num_aug_splits=aug_splits, collate_fn=mixup, interpolation='random', **options,
    )
    if world_size > 1 or aug_repeats:
        sampler = RepeatAugSampler(dataset, world_size, rank, num_repeats=aug_repeats, selected_round=0) \
            if aug_repeats else DistributedSampler(dataset, world_size, rank)
        loader.loader = DataLoader(
            dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=loader.loader.collate_fn,
            drop_last=True,
        )
    return make_replayable(loader, seed, num_epochs, num_crops)


class RunsCode:
    """Unpickles by calling `os.system`, which leaves the file `marker` behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f'touch {shlex.quote(str(self.marker))}',)


@contextlib.contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, which is what a full disk looks like to a writer."""
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# runs in this process


@dataclass
class Run:
    """What a run leaves behind."""
    folder: Path
    result: dict = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    exit_code: int = 0
    error: str = ''

    @property
    def rows(self) -> list[dict[str, float]]:
        """summary.csv, in numbers."""
        with open(self.folder / 'summary.csv', newline='') as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    @property
    def record(self) -> dict:
        """run.json."""
        return json.loads((self.folder / 'run.json').read_text())

    def checkpoint(self, name: str = 'last.pth.tar') -> dict:
        """Read a checkpoint as anybody may read it."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(self.folder / name, weights_only=True)


def run_script(flags: str, data: Path, output: Path, name: str = 'run') -> Run:
    """Run the script in this process."""
    run = Run(output / name)
    handler = logging.Handler()
    handler.emit = lambda record: run.log.append(record.getMessage())
    logging.root.addHandler(handler)
    argv = [str(data), *shlex.split(BASE), '--output', str(output), '--experiment', name, *shlex.split(flags)]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main(argv)
        except SystemExit as stop:
            run.exit_code = stop.code
        finally:
            logging.root.removeHandler(handler)
    run.error = stderr.getvalue()
    if not run.exit_code:
        run.result = json.loads(stdout.getvalue().rpartition('--result\n')[2])  # timm's NaFlex data set prints, too
    return run


# runs in processes of their own, which a signal can end


class Process:
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
        """Return the exit code, negative for a signal; None if the process still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text()


def free_port() -> int:
    """Return a port of the loopback that the system gives to nobody else while this process lives.

    Bound, not listened to, and reusable: the store of torch.distributed may listen on it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(('127.0.0.1', 0))
    _reserved.append(reserved)
    return reserved.getsockname()[1]


def start_on_ranks(function: Callable, args: tuple, folder: Path, world_size: int = 2) -> list[Process]:
    """Start a function in as many processes, with the environment that torchrun gives them."""
    port = free_port()
    return [
        Process(function, args, folder / f'rank-{rank}', dict(
            MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(world_size), RANK=str(rank),
            LOCAL_RANK=str(rank), OMP_NUM_THREADS='1',
        ))
        for rank in range(world_size)
    ]


def run_on_ranks(function: Callable, args: tuple, folder: Path, world_size: int = 2) -> list[Process]:
    """Start a function in as many processes and wait for all to end well."""
    processes = start_on_ranks(function, args, folder, world_size)
    for process in processes:
        assert process.wait(300) == 0, process.stderr
    return processes


def run_torchrun(function: Callable, args: tuple, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Run a function of a test module in two processes that torchrun starts."""
    script = folder / 'script.py'
    script.write_text(
        f'import sys\nfrom pathlib import PosixPath\nsys.path[:0] = {[str(TESTS.parent), str(TESTS)]}\n'
        f'from {function.__module__} import {function.__name__}\n{function.__name__}(*{args!r})\n'
    )
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *options]
    return subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=400)


def _run(function: Callable, args: tuple, stdout: Path, stderr: Path, env: dict[str, str]) -> None:
    os.environ.update(env)
    # The server read the variable when it imported torch, before this process had one of its own.
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    # Workers as in a run from the command line; those of a fork server would outlive one that is killed.
    multiprocessing.set_start_method('fork', force=True)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream.fileno())
    function(*args)
