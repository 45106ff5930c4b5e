"""Which samples a batch holds, and the key under which its draws are made."""
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import BatchSampler, DistributedSampler

from .draws import ORDER, derive_seed


class ShuffledSampler(DistributedSampler):
    """torch's sampler, which also gives a rank's order of an epoch as an array: a list of millions takes seconds.

    With several crops of each image, as many epochs share one shuffled order. Each takes the next part of it, every
    image of that part with all its crops side by side. `set_epoch(n)` chooses order `n // num_crops`, part `n %
    num_crops`. What is over when the images are parted, and when a part is dealt out to the ranks, is dropped under
    `drop_last`; else the first come again to fill up.
    """

    def __init__(
            self,
            dataset: Sized,
            num_replicas: int,
            rank: int,
            drop_last: bool = False,
            num_crops: int = 1,
    ) -> None:
        num_images = len(dataset) // num_crops if drop_last else math.ceil(len(dataset) / num_crops)
        super().__init__(range(num_images), num_replicas, rank, drop_last=drop_last)
        self.num_crops = num_crops
        self._size = len(dataset)

    def order(self) -> np.ndarray:
        """Return the sample indices of this rank in the epoch set last, `[N]` int64."""
        shuffle, part = divmod(self.epoch, self.num_crops)
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self.seed + shuffle)).numpy()
        num_images = len(self.dataset)
        images = np.resize(order, num_images * self.num_crops)[part * num_images:(part + 1) * num_images]
        own = np.resize(images, self.total_size)[self.rank::self.num_replicas]
        return own.repeat(self.num_crops)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return self.num_samples * self.num_crops


class BatchKey(NamedTuple):
    """What a worker must know of a batch: its samples, and the place in the run that seeds its draws."""

    epoch: int
    first: int  # position of row 0 in the epoch
    stride: int  # world size: positions from one row to the next
    samples: list  # indices, or timm's (index, choice) pairs where batches have different image sizes
    mixup_enabled: bool
    num_crops: int = 1  # rows side by side that are crops of one image

    def position(self, row: int | np.ndarray) -> int | np.ndarray:
        """Return the place of a row of the batch in the epoch, over all ranks; crops of an image are side by side."""
        crop = row % self.num_crops
        return self.first + (row - crop) * self.stride + crop


class ReplayBatchSampler:
    """The batches of one rank as `BatchKey`s, in an order that is a function of (seed, epoch).

    Args:
        batches: Batch sampler over a sampler that has `set_epoch(n)` and shuffles by n alone.
        seed: Seed of the run, the same on every rank.
        collate_fn: Collation of the loader; if it mixes, its `mixup_enabled` at the start of an epoch holds for it.
        num_epochs: Distinct epochs, after which the first comes again; None: all are distinct.

    Attributes:
        epoch: The epoch chosen last, by the number of the first one that has its data.
        start_batch: The first batch of it that is yielded.
        num_passes: How many iterations have begun.
        delivered: Key of the batch that the loader handed out last.
    """

    def __init__(
            self,
            batches: BatchSampler | ScheduledBatchSampler,
            seed: int,
            collate_fn: Any = None,
            num_epochs: int | None = None,
    ) -> None:
        self.batches = batches
        self.seed = seed
        self.collate_fn = collate_fn
        self.num_epochs = num_epochs
        self.rank = batches.sampler.rank
        self.world_size = batches.sampler.num_replicas
        self.num_repeats = math.ceil(getattr(batches.sampler, 'num_repeats', 1))
        self.num_crops = getattr(batches.sampler, 'num_crops', 1)
        self.delivered: BatchKey | None = None
        self.num_passes = 0
        self._issued: deque[BatchKey] = deque()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: Epoch, from 0.
            start_batch: Batches of the epoch to leave out, for a run that resumes inside it. `len` still counts all.
        """
        self.epoch, = self.distinct([epoch])
        self.start_batch = start_batch
        self._order = None
        if isinstance(self.batches, ScheduledBatchSampler):
            self.batches.set_epoch(self.epoch)
        order, part = divmod(self.epoch, self.num_crops)
        self.batches.sampler.set_epoch((derive_seed(self.seed, ORDER, order) >> 1) * self.num_crops + part)

    def distinct(self, epochs: Iterable[int]) -> list[int]:
        """Return the epochs whose data these epochs have, in ascending order, each once."""
        return sorted({epoch % self.num_epochs if self.num_epochs else epoch for epoch in epochs})

    def __iter__(self) -> Iterator[BatchKey]:
        issued = self._issued = deque()
        self.num_passes += 1
        epoch, start_batch = self.epoch, self.start_batch
        mixup_enabled = getattr(self.collate_fn, 'mixup_enabled', False)
        num_seen = 0
        for number, samples in enumerate(self.batches):
            key = self._key(num_seen, samples, epoch, mixup_enabled)
            num_seen += len(samples)
            if number >= start_batch:
                issued.append(key)
                yield key

    def _key(self, num_seen: int, samples: list, epoch: int, mixup_enabled: bool = False) -> BatchKey:
        first = num_seen * self.world_size + self.rank * self.num_crops
        return BatchKey(epoch, first, self.world_size, samples, mixup_enabled, self.num_crops)

    def __len__(self) -> int:
        return len(self.batches)

    def deliver(self) -> None:
        """Note that the loader hands out its next batch; having read ahead, it asked for that one some time ago."""
        self.delivered = self._issued.popleft()

    def rows(self, batch: int, num_batches: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Tell which rows batches of the epoch set last hold, without loading them.

        Args:
            batch: Number of the first batch in the epoch, from 0.
            num_batches: How many batches.

        Returns:
            Sample indices and positions of their rows on this rank, `[num_batches * B]` int64 each.
        """
        if isinstance(self.batches, ScheduledBatchSampler):
            raise TypeError('The rows of a batch are not known ahead where batches have different image sizes.')
        if self._order is None:
            sampler = self.batches.sampler
            shuffled = isinstance(sampler, ShuffledSampler)
            self._order = sampler.order() if shuffled else np.fromiter(sampler, dtype=np.int64)
        start = batch * self.batches.batch_size
        indices = self._order[start:start + num_batches * self.batches.batch_size]
        return indices, self._key(start, indices, self.epoch).position(np.arange(len(indices)))
