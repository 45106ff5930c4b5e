"""Replayable data: every random draw of timm's training loader as a function of where it is used, not of when.

timm draws order, augmentation, Mixup and random erasing from the process-wide streams of Python, NumPy and torch, so a
batch depends on every batch before it and on how long its worker has lived. Here each draw gets a seed of its own:

| draw | function of |
|---|---|
| order of the samples | seed, epoch |
| augmentation of a sample | seed, epoch, index, repeat (`--aug-repeats`) |
| Mixup, CutMix of a batch | seed, epoch, position of the batch's first row |
| random erasing on the device | seed, epoch, position of the row, augmentation split |

The *position* of a row is its place in the epoch over all ranks: row `i` of rank `r` in global batch `k` is at
`(k * batch_size + i) * world_size + r`, as torch's `DistributedSampler` deals them out. So global batch `k` holds the
same samples with the same pixels for any world size, the global batch size being the same. Mixup is the exception: timm
mixes a row with its mirror image in the batch of its own rank.

The key of a batch travels with its indices from the sampler to the worker, so that persistent workers follow too, and
nothing is drawn from the process-wide streams: the model's dropout is undisturbed by the number of workers.
"""
import hashlib
import math
import random
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from timm_kd.errors import UsageError

_ORDER, _SAMPLE, _MIXUP, _ERASING = range(4)


def derive_seed(*key: int) -> int:
    """Hash integers into 64 bits that are the same on every platform and in every version."""
    return int.from_bytes(hashlib.blake2b(struct.pack(f'<{len(key)}q', *key), digest_size=8).digest(), 'little')


def _seed_generators(seed: int, generator: torch.Generator = torch.default_generator) -> None:
    """Seed the three streams that timm's and torchvision's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xffff_ffff)
    generator.manual_seed(seed >> 1)


@contextmanager
def _preserved_generators(generator: torch.Generator = torch.default_generator) -> Iterator[None]:
    """Give the streams back as they were; in a worker nobody else draws from them, so nothing is saved there."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])


class BatchKey(NamedTuple):
    """What a worker must know of a batch: its samples, and the place in the run that seeds its draws."""

    epoch: int
    first: int  # position of row 0 in the epoch
    stride: int  # world size: positions from one row to the next
    samples: list  # indices, or timm's (index, choice) pairs under --train-img-sizes
    mixup_enabled: bool

    def position(self, row: int) -> int:
        return self.first + row * self.stride


class ReplayBatchSampler:
    """The batches of one rank as `BatchKey`s, in an order that is a function of (seed, epoch).

    Args:
        batches: Batch sampler over a sampler that has `set_epoch(n)` and shuffles by n alone.
        seed: Seed of the run, the same on every rank.
        collate_fn: Collation of the loader; if it mixes, its `mixup_enabled` at the start of an epoch holds for it.
    """

    def __init__(self, batches: BatchSampler | ScheduledBatchSampler, seed: int, collate_fn: Any = None) -> None:
        self.batches = batches
        self.seed = seed
        self.collate_fn = collate_fn
        self.rank = batches.sampler.rank
        self.world_size = batches.sampler.num_replicas
        self.num_repeats = math.ceil(getattr(batches.sampler, 'num_repeats', 1))
        self.issued: deque[BatchKey] = deque()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: Epoch, from 0.
            start_batch: Batches of the epoch to leave out, for a run that resumes inside it. `len` still counts all.
        """
        self.epoch = epoch
        self.start_batch = start_batch
        self._order = None
        if isinstance(self.batches, ScheduledBatchSampler):
            self.batches.set_epoch(epoch)
        self.batches.sampler.set_epoch(derive_seed(self.seed, _ORDER, epoch) >> 1)

    def __iter__(self) -> Iterator[BatchKey]:
        issued = self.issued = deque()
        epoch, start_batch = self.epoch, self.start_batch
        mixup_enabled = getattr(self.collate_fn, 'mixup_enabled', False)
        num_seen = 0
        for number, samples in enumerate(self.batches):
            key = BatchKey(epoch, num_seen * self.world_size + self.rank, self.world_size, samples, mixup_enabled)
            num_seen += len(samples)
            if number >= start_batch:
                issued.append(key)
                yield key

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tell which rows a batch of the epoch set last holds, without loading it.

        Args:
            batch: Number of the batch in the epoch, from 0.

        Returns:
            Sample indices and positions of its rows on this rank, `[B]` int64 each.
        """
        if isinstance(self.batches, ScheduledBatchSampler):
            raise TypeError('The rows of a batch are not known ahead with --train-img-sizes.')
        if self._order is None:
            self._order = np.fromiter(self.batches.sampler, dtype=np.int64, count=len(self.batches.sampler))
        start = batch * self.batches.batch_size
        indices = self._order[start:start + self.batches.batch_size]
        return indices, (start + np.arange(len(indices))) * self.world_size + self.rank


class _Samples(list):
    """The samples of a batch on their way to the collation, with its key."""

    key: BatchKey


class ReplayDataset(Dataset):
    """Map-style dataset that loads a whole batch by its key, each sample under a seed of its own."""

    def __init__(self, dataset: Dataset, seed: int, num_repeats: int = 1) -> None:
        self.dataset = dataset
        self.seed = seed
        self.num_repeats = num_repeats

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, key: BatchKey) -> _Samples:
        samples = _Samples()
        samples.key = key
        with _preserved_generators():
            for row, sample in enumerate(key.samples):
                index = sample[0] if isinstance(sample, tuple) else sample
                # A sample's copies are neighbours in the order, at most num_repeats of them.
                repeat = key.position(row) % self.num_repeats
                _seed_generators(derive_seed(self.seed, _SAMPLE, key.epoch, index, repeat))
                samples.append(self.dataset[sample])
        return samples


class ReplayCollateMixup(FastCollateMixup):
    """timm's `FastCollateMixup` under the key of its batch, which also says whether to mix.

    timm's loop turns mixing off by an attribute that persistent workers never see; the key brings it to them.
    """

    def __init__(self, mixup: FastCollateMixup, seed: int) -> None:
        vars(self).update(vars(mixup), seed=seed)

    def __call__(self, batch: _Samples, _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        with _preserved_generators():
            _seed_generators(derive_seed(self.seed, _MIXUP, batch.key.epoch, batch.key.first))
            if get_worker_info() is not None:
                self.mixup_enabled = batch.key.mixup_enabled
            return super().__call__(batch)


class ReplayMixup(Mixup):
    """timm's `Mixup` under the key of the batch that the loader handed out last (`--no-prefetcher`).

    Args:
        mixup: The `Mixup` whose settings to take.
        loader: The replayable loader; each of its batches is mixed before the next is asked for.
    """

    def __init__(self, mixup: Mixup, loader: 'ReplayLoader') -> None:
        vars(self).update(vars(mixup), loader=loader)

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.loader.key
        with _preserved_generators():
            _seed_generators(derive_seed(self.loader.batch_sampler.seed, _MIXUP, key.epoch, key.first))
            return super().__call__(x, target)


class ReplayErasing(RandomErasing):
    """timm's `RandomErasing` on the device, row by row under the key of the batch that the loader handed out last."""

    def __init__(self, erasing: RandomErasing, loader: 'ReplayLoader') -> None:
        vars(self).update(vars(erasing), loader=loader, generator=_device_generator(erasing))

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        key = self.loader.key
        num_samples = len(key.samples)
        first_row = len(input) // self.num_splits if self.num_splits > 1 else 0
        with _preserved_generators(self.generator):
            for row in range(first_row, len(input)):
                split, sample = divmod(row, num_samples)
                seed = derive_seed(self.loader.batch_sampler.seed, _ERASING, key.epoch, key.position(sample), split)
                _seed_generators(seed, self.generator)
                super().__call__(input[row])
        return input


def _device_generator(erasing: RandomErasing) -> torch.Generator:
    """Return the generator that erasing draws its pixels from; seeding it never waits for the device."""
    device = torch.device(erasing.device)
    if device.type == 'cpu' or not (erasing.per_pixel or erasing.rand_color):
        return torch.default_generator
    device_module = torch.get_device_module(device)
    if not getattr(device_module, 'default_generators', None):
        raise UsageError(
            f'--replayable-data cannot replay --remode {erasing.mode} on --device {device.type}: '
            'use --remode const or --no-prefetcher.'
        )
    return device_module.default_generators[device_module.current_device() if device.index is None else device.index]


class ReplayLoader(DataLoader):
    """A `DataLoader` that says which batch it hands out: `key` is that of the batch yielded last."""

    key: BatchKey

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        for batch in batches:
            self.key = self.batch_sampler.issued.popleft()
            yield batch


def make_replayable(loader: PrefetchLoader | DataLoader, seed: int) -> PrefetchLoader | ReplayLoader:
    """Make a training loader of `timm.data.create_loader` replayable.

    `loader.batch_sampler.set_epoch(epoch, start_batch=0)` must precede each epoch. A `Mixup` of the training loop is
    replayed by `ReplayMixup`. A `MultiEpochsDataLoader` becomes a loader with persistent workers, which spares the same
    restarts without reading ahead of `set_epoch`.

    Args:
        loader: A training loader (shuffling, or with timm's or torch's distributed sampler), not yet iterated.
        seed: `--seed`, the same on every rank: which rank this is comes from the loader's sampler.

    Returns:
        A loader of the same kind, with the same transforms, collation and workers.

    Raises:
        UsageError: The data set is iterable: it has no index to make the draws a function of.
    """
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if isinstance(inner.dataset, IterableDataset):
        raise UsageError(
            f'--replayable-data needs samples with an index; {type(inner.dataset).__name__} is iterable: '
            'leave the flag out or use a folder, tar or Hub data set that is not streamed.'
        )
    replay = _replay_loader(inner, seed)
    if not isinstance(loader, PrefetchLoader):
        return replay
    loader.loader = replay
    if loader.random_erasing is not None:
        loader.random_erasing = ReplayErasing(loader.random_erasing, replay)
    return loader


def _replay_loader(loader: DataLoader, seed: int) -> ReplayLoader:
    collate_fn = loader.collate_fn
    if isinstance(collate_fn, FastCollateMixup):
        collate_fn = ReplayCollateMixup(collate_fn, seed)
    multi_epochs = isinstance(loader, MultiEpochsDataLoader)
    batch_sampler = ReplayBatchSampler(_reseedable_batches(loader), seed, collate_fn)
    return ReplayLoader(
        ReplayDataset(loader.dataset, seed, batch_sampler.num_repeats),
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        # An iterator draws a base seed for its workers; from here it leaves torch's own stream alone.
        generator=torch.Generator(),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.num_workers > 0 and (loader.persistent_workers or multi_epochs),
    )


def _reseedable_batches(loader: DataLoader) -> BatchSampler | ScheduledBatchSampler:
    """Return the loader's batches over a sampler that shuffles by `set_epoch` alone."""
    batches = loader.batch_sampler.sampler if isinstance(loader, MultiEpochsDataLoader) else loader.batch_sampler
    sampler = batches.sampler
    if not isinstance(sampler, RepeatAugSampler):
        world_size, rank = getattr(sampler, 'num_replicas', 1), getattr(sampler, 'rank', 0)
        # Padding would make the last batch of an epoch depend on the world size. A schedule made for it keeps it.
        drop_last = loader.drop_last and not isinstance(batches, ScheduledBatchSampler)
        sampler = DistributedSampler(loader.dataset, num_replicas=world_size, rank=rank, drop_last=drop_last)
    if isinstance(batches, ScheduledBatchSampler):
        batches.sampler = sampler
        return batches
    return BatchSampler(sampler, loader.batch_size, loader.drop_last)
