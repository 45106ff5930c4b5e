"""timm's training loader made replayable."""
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..errors import UsageError
from .batches import ReplayBatchSampler, ShuffledSampler
from .transforms import ReplayCollateMixup, ReplayDataset, ReplayErasing


class ReplayLoader(DataLoader):
    """A `DataLoader` that tells its batch sampler which batch it hands out."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.batch_sampler.deliver()
            yield batch


def make_replayable(
        loader: PrefetchLoader | DataLoader,
        seed: int,
        num_epochs: int | None = None,
        num_crops: int = 1,
) -> PrefetchLoader | ReplayLoader:
    """Make a training loader of `timm.data.create_loader` replayable.

    `loader.batch_sampler.set_epoch(epoch, start_batch=0)` must precede each epoch. A `Mixup` of the training loop is
    replayed by `ReplayMixup`. A `MultiEpochsDataLoader` becomes a loader with persistent workers, which spares the same
    restarts without reading ahead of `set_epoch`.

    Args:
        loader: A training loader (shuffling, or with timm's or torch's distributed sampler), not yet iterated.
        seed: The seed of the run, the same on every rank: which rank this is comes from the loader's sampler.
        num_epochs: Distinct epochs, after which the first comes again; None: all are distinct.
        num_crops: Crops M of each image, side by side in a batch: the image is decoded once for them, and so many
            epochs in a row share one shuffled order. The batch size must be a multiple of it.

    Returns:
        A loader of the same kind, with the same transforms, collation and workers.

    Raises:
        UsageError: The data set is iterable: it has no index to make the draws a function of.
        ValueError: `num_crops` is above 1, and the loader repeats, splits or schedules its samples, or its batch size
            is no multiple.
    """
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if isinstance(inner.dataset, IterableDataset):
        raise UsageError(
            f'replayable data needs samples with an index; {type(inner.dataset).__name__} is iterable: take a folder, '
            'tar or Hub data set that is not streamed.'
        )
    replay = _replay_loader(inner, seed, num_epochs, num_crops)
    if not isinstance(loader, PrefetchLoader):
        return replay
    loader.loader = replay
    if loader.random_erasing is not None:
        loader.random_erasing = ReplayErasing(loader.random_erasing, replay.batch_sampler)
    return loader


def _replay_loader(loader: DataLoader, seed: int, num_epochs: int | None, num_crops: int) -> ReplayLoader:
    collate_fn = loader.collate_fn
    if isinstance(collate_fn, FastCollateMixup):
        collate_fn = ReplayCollateMixup(collate_fn, seed)
    multi_epochs = isinstance(loader, MultiEpochsDataLoader)
    batch_sampler = ReplayBatchSampler(_reseedable_batches(loader, num_crops), seed, collate_fn, num_epochs)
    return ReplayLoader(
        ReplayDataset(loader.dataset, seed, batch_sampler.num_repeats, num_crops),
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


def _reseedable_batches(loader: DataLoader, num_crops: int) -> BatchSampler | ScheduledBatchSampler:
    """Return the loader's batches over a sampler that shuffles by `set_epoch` alone."""
    batches = loader.batch_sampler.sampler if isinstance(loader, MultiEpochsDataLoader) else loader.batch_sampler
    sampler = batches.sampler
    if num_crops > 1:
        for part in (sampler, batches, loader.dataset):
            if isinstance(part, RepeatAugSampler | ScheduledBatchSampler | AugMixDataset):
                raise ValueError(f'num_crops {num_crops} does not go with a {type(part).__name__}.')
        if loader.batch_size % num_crops:
            raise ValueError(f'num_crops {num_crops} does not divide the batch size, {loader.batch_size}.')
    if not isinstance(sampler, RepeatAugSampler):
        world_size, rank = getattr(sampler, 'num_replicas', 1), getattr(sampler, 'rank', 0)
        # Dropping the rest keeps the last batch of an epoch the same for any world size. A schedule of batches is
        # planned by timm for the padded length; its loader has `drop_last=False`.
        sampler = ShuffledSampler(loader.dataset, world_size, rank, loader.drop_last, num_crops)
    if isinstance(batches, ScheduledBatchSampler):
        batches.sampler = sampler
        return batches
    return BatchSampler(sampler, loader.batch_size, loader.drop_last)
