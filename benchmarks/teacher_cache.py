#!/usr/bin/env python
"""What stored teacher logits save: an epoch of plain training, with a live teacher, filling a cache, and reading one.

The four kinds of epoch run in turn in one process, through the script's own loop and timm's loader, with one student
on generated JPEGs. Times are medians over the rounds; a ratio is the median of each round's ratio, with the middle half
of them beside it. The price of several students follows from them. Then, apart: what the cache itself does in such an
epoch, with no model beside it; one read from a file of ImageNet's shape; and what `--teacher-cache-topk` and float16 do
to each loss. The output is markdown. Run it on an idle machine.

    python benchmarks/teacher_cache.py [--student resnet18 --teacher resnet34] [--device cuda --amp] [--rounds 40]
"""
import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from common import seconds
from loader import write_images
from timm.data import create_dataset, create_loader
from timm.task import ClassificationTask
from torch import nn

from timm_kd import KDTask, Teacher, create_kd_loss
from timm_kd.engine import StepSettings, train_one_epoch
from timm_kd.meters import StepTotals
from timm_kd.replay import make_replayable
from timm_kd.teacher_cache import CachedTeacher, CacheFolder, RowLayout
from timm_kd.teacher_cache.epoch_file import EpochFile

NUM_CLASSES = 1000
BARS = {'read / plain': 1.03, 'fill / live': 1.05}
STUDENTS = (1, 5, 20)


def cache_key(num_rows: int, num_classes: int = NUM_CLASSES) -> dict[str, dict]:
    """Return the key of a cache of whole rows in float16, numbered by sample."""
    return {'rows': {'by': 'sample', 'count': num_rows, 'classes': num_classes, 'dtype': 'float16', 'topk': None}}


class Epochs:
    """The four kinds of epoch, on one student, one teacher and one loader."""

    def __init__(self, args: argparse.Namespace, home: Path) -> None:
        torch.manual_seed(0)
        self.home = home
        self.device = torch.device(args.device)
        self.batch_size = args.batch_size
        loader = create_loader(
            create_dataset('', root=str(home), split='train'), (3, args.img_size, args.img_size), args.batch_size,
            is_training=True, num_workers=args.workers, device=self.device, interpolation='random',
        )
        self.loader = make_replayable(loader, seed=0)
        self.student = timm.create_model(args.student, num_classes=NUM_CLASSES).to(self.device)
        model = timm.create_model(args.teacher, num_classes=NUM_CLASSES)
        self.teacher = Teacher(model, NUM_CLASSES, device=self.device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9)
        autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.amp)
        self.settings = StepSettings(self.device, autocast=autocast)
        self.run('fill', 'stored')

    def open_cache(self, folder: str, live: nn.Module | None) -> CachedTeacher:
        """Return a teacher that stores in, or without a live one reads from, a folder."""
        cache = CacheFolder(self.home / folder, cache_key(len(self.loader.dataset)))
        return CachedTeacher(cache, self.loader.batch_sampler, self.device, live)

    def own_work(self, kind: str) -> float:
        """Do what the cache does in an epoch of 'fill' or 'read', with no model beside it; return its seconds."""
        answers = torch.randn(self.batch_size, NUM_CLASSES, device=self.device)

        def work() -> None:
            cached = self.open_cache('fresh', _Known(answers)) if kind == 'fill' else self.open_cache('stored', None)
            self.loader.batch_sampler.set_epoch(0)
            for _ in self.loader.batch_sampler:
                cached(answers)
            cached.close()

        taken = seconds(work, self.device.type)
        shutil.rmtree(self.home / 'fresh', ignore_errors=True)
        return taken

    def run(self, kind: str, folder: str = 'fresh') -> float:
        """Train for an epoch, and return its seconds."""
        cached = None
        if kind in ('fill', 'read'):
            cached = self.open_cache(folder, self.teacher if kind == 'fill' else None)
        if kind == 'plain':
            task = ClassificationTask(self.student, device=self.device, verbose=False)
        else:
            kd_loss = create_kd_loss('nkd')
            task = KDTask(self.student, kd_loss, cached or self.teacher, device=self.device, verbose=False)
        self.loader.batch_sampler.set_epoch(0)

        def epoch() -> None:
            train_one_epoch(task, self.loader, self.optimizer, 0, self.settings, StepTotals(self.device))
            if cached is not None:
                cached.close()

        taken = seconds(epoch, self.device.type)
        if folder == 'fresh':
            shutil.rmtree(self.home / folder, ignore_errors=True)
        return taken


class _Known(nn.Module):
    """A teacher whose answer costs nothing."""
    members = ()

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.answers


def measure_epochs(args: argparse.Namespace, home: Path) -> dict[str, float]:
    """Time the four kinds of epoch in turn, print them, and return the median seconds of each."""
    side = args.img_size * 3 // 2
    write_images(home, args.images, side, side)
    epochs = Epochs(args, home)
    kinds = ['plain', 'read', 'live', 'fill']  # what is compared runs side by side, in turn the one or the other first
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind in kinds:
        epochs.run(kind, 'stored' if kind == 'read' else 'fresh')
    for number in range(args.rounds):
        for kind in kinds[::1 if number % 2 else -1]:
            times[kind].append(epochs.run(kind, 'stored' if kind == 'read' else 'fresh'))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    print(f'| epoch of {args.images} images | seconds | images/s |\n|---|---|---|')
    for kind, value in medians.items():
        print(f'| {kind} | {value:.2f} | {args.images / value:.0f} |')
    print('\n| ratio | median | middle half | at most |\n|---|---|---|---|')
    for name, bar in BARS.items():
        above, below = (times[kind] for kind in name.split(' / '))
        low, median, high = statistics.quantiles(a / b for a, b in zip(above, below, strict=True))
        print(f'| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {bar} |')
    print('\n| the cache itself, in such an epoch | milliseconds | of the epoch |\n|---|---|---|')
    for kind, base in (('read', 'plain'), ('fill', 'live')):
        own = statistics.median(epochs.own_work(kind) for _ in range(20))
        print(f'| {kind} | {1000 * own:.1f} | {100 * own / medians[base]:.2f} % of {base} |')
    return medians


def print_prices(seconds: dict[str, float], num_epochs: int) -> None:
    """Print what several students of one teacher take, in plain trainings of one student."""
    print(f'\n| students, {num_epochs} epochs each | live teacher | with the cache | saved |\n|---|---|---|---|')
    for count in STUDENTS:
        live = count * seconds['live'] / seconds['plain']
        cached = (seconds['fill'] + (count - 1) * seconds['read']) / seconds['plain']
        print(f'| {count} | {live:.2f} plain trainings | {cached:.2f} | {100 * (1 - cached / live):.0f} % |')


def measure_read(home: Path, num_rows: int, batch_size: int = 256) -> None:
    """Print the time of one batch read at random from a file of float16 rows, from memory and from disk."""
    layout = RowLayout(NUM_CLASSES)
    file = EpochFile(home / 'epoch', num_rows, layout.row_bytes, writable=True)
    block = np.random.default_rng(0).integers(0, 256, (4096, layout.row_bytes), dtype=np.uint8)
    for start in range(0, num_rows, len(block)):
        rows = np.arange(start, min(start + len(block), num_rows))
        file.write(rows, block[:len(rows)])
    file.close()
    order = np.random.default_rng(1).permutation(num_rows)[:100 * batch_size].reshape(100, batch_size)
    out = np.empty((batch_size, layout.row_bytes), np.uint8)
    print(f'\n| {batch_size} rows out of {num_rows} | milliseconds, median | slowest |\n|---|---|---|')
    for name in ('from disk', 'from memory'):
        if name == 'from disk':
            with open(home / 'epoch', 'rb') as raw:
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file = EpochFile(home / 'epoch', num_rows, layout.row_bytes, writable=False)
        times = []
        for rows, following in zip(order, np.roll(order, -1, axis=0), strict=True):
            start = time.perf_counter()
            assert file.has(rows).all()
            file.read(rows, out)
            file.prefetch(following)
            times.append(1000 * (time.perf_counter() - start))
        file.close()
        print(f'| {name} | {statistics.median(times):.2f} | {max(times):.2f} |')
    (home / 'epoch').unlink()


def print_storage_effects() -> None:
    """Print how far stored logits move each loss, on logits drawn to resemble a trained ImageNet-21k model's."""
    num_classes, batch = 21841, 64
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes, (batch,), generator=generator)
    # Related classes stand out from a bulk of small logits: a heavy upper tail, the target near its top.
    bulk = torch.randn(batch, num_classes, generator=generator)
    tail = torch.rand(batch, num_classes, generator=generator).pow(-0.35)
    teacher = bulk + 2 * tail
    teacher.scatter_(1, target[:, None], teacher.amax(1, keepdim=True) + 1.5)
    student = 0.6 * teacher + torch.randn(batch, num_classes, generator=generator)
    print(f'\n| loss | float16, all | {" | ".join(f"top {k}" for k in (10, 50, 500))} |\n|---|---|---|---|---|')
    layouts: list[RowLayout] = [RowLayout(num_classes), *(RowLayout(num_classes, topk=k) for k in (10, 50, 500))]
    for name in ('kd', 'dkd', 'nkd'):
        value: Callable[[torch.Tensor], float] = partial(_loss, name, student, target)
        exact = value(teacher)
        moved = [100 * (value(layout.unpack(layout.pack(teacher))) / exact - 1) for layout in layouts]
        print(f'| {name} | {" | ".join(f"{percent:+.3f} %" for percent in moved)} |')
    sizes = ' | '.join(f'{layout.row_bytes * 1e-3:.2f} kB' for layout in layouts)
    print(f'| a row takes | {sizes} |')


def _loss(name: str, student: torch.Tensor, target: torch.Tensor, teacher: torch.Tensor) -> float:
    return create_kd_loss(name)(student, teacher, target)['kd_loss'].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--student', default='resnet18')
    parser.add_argument('--teacher', default='resnet34')
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--img-size', type=int, default=128)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast for the student')
    parser.add_argument('--rounds', type=int, default=40)
    parser.add_argument('--rows', type=int, default=200_000, help='rows of the file that is read at random')
    parser.add_argument('--epochs', type=int, default=100, help='epochs of a training, for the price list')
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == 'cuda' else f'{platform.processor() or platform.machine()}'
    print(
        f'{args.teacher} -> {args.student} at {args.img_size} px, batches of {args.batch_size}, '
        f'{args.workers} workers, {name}, {os.cpu_count()} cores, torch {torch.__version__}, {args.rounds} rounds\n'
    )
    with tempfile.TemporaryDirectory() as home:
        print_prices(measure_epochs(args, Path(home)), args.epochs)
        measure_read(Path(home), args.rows)
    print_storage_effects()


if __name__ == '__main__':
    main()
