#!/usr/bin/env python
"""How fast images come out of the loader: timm's own, the replayable one, and several crops of each decoded image.

The loaders are the script's under a recipe, with one worker each, on JPEGs that the benchmark makes (500 x 375 pixels,
about 100 kB, with the spectrum and the edges of a photograph). They run in turn, in rounds of an epoch each. A ratio is
the median of the ratios of the rounds, with the middle half of them beside it. `worker` is the processor time that the
loader's worker took, which other work on the machine disturbs less. Then, apart: what a seed of its own costs a sample.
The output is Markdown. Run it on an idle machine (6 minutes).

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--rounds 60] [--crops 2 4] [--recipes resnet18_baseline]
"""
import argparse
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_kd.cli import parse_args
from timm_kd.process import setup_process
from timm_kd.replay.draws import SAMPLE, derive_seed, seed_generators
from timm_kd.setup.data import create_data

# Of images a second against timm's loader, at least.
BARS = {
    ('resnet18_baseline', 1): 0.98,
    ('resnet18_baseline', 4): 1.6,
    ('swin_tiny_baseline', 1): 0.98,
    ('swin_tiny_baseline', 4): 1.35,
}


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipes', nargs='+', default=['resnet18_baseline', 'swin_tiny_baseline'], metavar='NAME')
    parser.add_argument('--crops', nargs='+', type=int, default=[2, 4], metavar='M')
    parser.add_argument('--images', type=int, default=256, metavar='N')
    parser.add_argument('--batch-size', type=int, default=32, metavar='N')
    parser.add_argument('--rounds', type=int, default=60, metavar='N')
    args = parser.parse_args()
    logging.getLogger('timm_kd').setLevel(logging.ERROR)  # one class in place of a recipe's 1,000
    with tempfile.TemporaryDirectory() as home:
        num_bytes = write_images(Path(home), args.images)
        print(
            f'{args.images} images of {num_bytes / args.images / 1e3:.0f} kB an epoch, batches of {args.batch_size}, 1 '
            f'worker, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.rounds} rounds')
        for recipe in args.recipes:
            measure(args, home, recipe)
            measure_draws(args, home, recipe)


def write_images(root: Path, count: int, width: int = 500, height: int = 375) -> int:
    """Write pictures that compress like photographs into a folder of one class, and return how many bytes they are.

    Overlapping discs of power-law size give edges at all scales (the dead leaves model of Lee, Mumford and Huang 2001),
    and each has a texture whose amplitude falls with the frequency, as in natural images.
    """
    folder = root / 'train' / 'class'
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    y, x = np.mgrid[:height, :width]
    for index in range(count):
        real, imaginary = generator.standard_normal((2, 3, *frequency.shape))
        textures = np.fft.irfft2((real + 1j * imaginary) / frequency, (height, width))
        textures /= textures.std(axis=(1, 2), keepdims=True)
        picture = generator.uniform(40, 215, 3) + 25 * textures[0][..., None]
        for radius in sorted((generator.pareto(2, 400) * 8 + 6).clip(max=150), reverse=True):
            center_x, center_y = generator.uniform(0, width), generator.uniform(0, height)
            rows = slice(max(0, int(center_y - radius)), int(center_y + radius) + 1)
            columns = slice(max(0, int(center_x - radius)), int(center_x + radius) + 1)
            disc = (x[rows, columns] - center_x) ** 2 + (y[rows, columns] - center_y) ** 2 < radius ** 2
            texture = textures[generator.integers(3)][rows, columns][disc]
            picture[rows, columns][disc] = generator.uniform(20, 235, 3) + generator.uniform(4, 25) * texture[:, None]
        path = folder / f'{index:05d}.jpg'
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(args: argparse.Namespace, home: str, recipe: str) -> None:
    """Time the loaders of a recipe in turn, and print them."""
    loaders = {'timm': create(args, home, recipe)}
    loaders |= {crops: create(args, home, recipe, crops) for crops in dict.fromkeys([1, *args.crops])}
    for loader in loaders.values():
        read(loader, 0)  # workers start
    times = {name: [] for name in loaders}
    for epoch in range(1, args.rounds + 1):
        for name in list(loaders)[::1 if epoch % 2 else -1]:
            times[name].append(read(loaders[name], epoch))
    print(f'\n| {recipe} | images/s | of timm\'s | middle half | worker, ms an image | of timm\'s | at least |')
    print('|---|---|---|---|---|---|---|')
    for name, measured in times.items():
        num_images = len(loaders[name]) * args.batch_size
        wall, worker = (statistics.median(part) for part in zip(*measured, strict=True))
        ratios = [theirs[0] / ours[0] for theirs, ours in zip(times['timm'], measured, strict=True)]
        workers = [theirs[1] / ours[1] for theirs, ours in zip(times['timm'], measured, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        label = name if name == 'timm' else f'{name} crop{"s" if name > 1 else ""} an image'
        print(
            f'| {label} | {num_images / wall:.0f} | {ratio:.3f} | {low:.3f} to {high:.3f} | '
            f'{1e3 * worker / num_images:.2f} | {statistics.median(workers):.3f} | {BARS.get((recipe, name), "")} |')


def measure_draws(args: argparse.Namespace, home: str, recipe: str) -> None:
    """Time what a sample costs more than in timm's loader: its seed, and the first draws of three streams."""
    loader = create(args, home, recipe, crops=1).loader
    dataset, seed = loader.dataset.dataset, loader.batch_sampler.seed
    seeding, loading = [], []
    for epoch in range(args.rounds):
        for index in range(len(dataset)):
            start = time.perf_counter()
            seed_generators(derive_seed(seed, SAMPLE, epoch, index, 0))
            random.random(), np.random.random(), torch.rand(1)  # a seeded stream makes 624 numbers at its first draw
            seeded = time.perf_counter()
            dataset[index]
            seeding.append(seeded - start)
            loading.append(time.perf_counter() - seeded)
    seconds, share = statistics.median(seeding), statistics.median(seeding) / statistics.median(loading)
    print(f'\nA seed of its own costs a sample {1e6 * seconds:.0f} microseconds, {100 * share:.1f} % (at most 2 %).')


def create(args: argparse.Namespace, home: str, recipe: str, crops: int | None = None) -> DataLoader:
    """Return the training loader of a recipe: timm's, or the replayable one with so many crops of each image."""
    flags = [home, '-c', recipe, '-b', str(args.batch_size), '-j', '1', '--device', 'cpu', '--val-split', '']
    flags += ['--replayable-data', '--crops-per-image', str(crops)] if crops else []
    settings, _ = parse_args(flags)
    data_config = dict(
        input_size=tuple(settings.input_size), mean=tuple(settings.mean), std=tuple(settings.std),
        interpolation=settings.interpolation, crop_pct=settings.crop_pct,
    )
    return create_data(settings, data_config, setup_process('cpu'), None, (16, 16))[0].loader


def read(loader: DataLoader, epoch: int) -> tuple[float, float]:
    """Read an epoch; return its seconds, and those of the processor that the worker took."""
    if hasattr(loader.batch_sampler, 'set_epoch'):
        loader.batch_sampler.set_epoch(epoch)
    inner = getattr(loader, 'loader', loader)
    before, start = _worker_seconds(inner), time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start, _worker_seconds(inner) - before


def _worker_seconds(loader: DataLoader) -> float:
    """Return the processor time that the persistent worker of a loader has taken, in seconds (on Linux)."""
    if loader._iterator is None:
        return 0.0
    return time.clock_gettime(~loader._iterator._workers[0].pid << 3 | 2)  # clock_getcpuclockid(3) of that process


if __name__ == '__main__':
    main()
