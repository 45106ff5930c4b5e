"""Augmentation, Mixup and random erasing, all of them timm's, under the key of their batch."""
import random
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, get_worker_info

from ..errors import UsageError
from .batches import BatchKey, ReplayBatchSampler
from .draws import ERASING, MIXUP, SAMPLE, derive_seed, preserved_generators, seed_generators, seeds_under


class Samples(list):
    """The samples of a batch on their way to the collation, with its key."""

    def __init__(self, key: BatchKey) -> None:
        super().__init__()
        self.key = key


class ReplayDataset(Dataset):
    """Map-style dataset that loads a whole batch by its key, each sample under a seed of its own.

    With several crops of an image, the data set under it must apply its attribute `transform`, as timm's and
    torchvision's do: the crops take this over, and the data set decodes an image once for them.
    """

    def __init__(self, dataset: Dataset, seed: int, num_repeats: int = 1, num_crops: int = 1) -> None:
        self.dataset = dataset
        self.seed = seed
        self.num_repeats = num_repeats
        self.num_crops = num_crops
        if num_crops > 1:
            self.transform, dataset.transform = dataset.transform, None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, key: BatchKey) -> Samples:
        samples = Samples(key)
        with preserved_generators():
            samples.extend(self._crops(key) if self.num_crops > 1 else self._samples(key))
        return samples

    def _samples(self, key: BatchKey) -> Iterator[tuple]:
        for row, sample in enumerate(key.samples):
            index = sample[0] if isinstance(sample, tuple) else sample
            # The copies of a sample that `--aug-repeats` asks for are neighbours in the order.
            repeat = key.position(row) % self.num_repeats
            seed_generators(derive_seed(self.seed, SAMPLE, key.epoch, index, repeat))
            yield self.dataset[sample]

    def _crops(self, key: BatchKey) -> Iterator[tuple]:
        for index in key.samples[::self.num_crops]:
            image, *rest = self.dataset[index]
            for crop in range(self.num_crops):
                seed_generators(derive_seed(self.seed, SAMPLE, key.epoch, index, crop))
                yield self.transform(image), *rest


class ReplayCollateMixup(FastCollateMixup):
    """timm's `FastCollateMixup` under the key of its batch, which also says whether to mix.

    timm's loop turns mixing off by an attribute that persistent workers never see; the key brings it to them.
    """

    def __init__(self, mixup: FastCollateMixup, seed: int) -> None:
        vars(self).update(vars(mixup), seed=seed)

    def __call__(self, batch: Samples, _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        with preserved_generators():
            seed_generators(derive_seed(self.seed, MIXUP, batch.key.epoch, batch.key.first))
            if get_worker_info() is not None:
                self.mixup_enabled = batch.key.mixup_enabled
            return super().__call__(batch)


class ReplayMixup(Mixup):
    """timm's `Mixup` under the key of the batch that the loader handed out last (`--no-prefetcher`).

    Args:
        mixup: The `Mixup` whose settings to take.
        batch_sampler: That of the replayable loader; each batch is mixed before the loader is asked for the next.
    """

    def __init__(self, mixup: Mixup, batch_sampler: ReplayBatchSampler) -> None:
        vars(self).update(vars(mixup), batch_sampler=batch_sampler)

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.batch_sampler.delivered
        with preserved_generators():
            seed_generators(derive_seed(self.batch_sampler.seed, MIXUP, key.epoch, key.first))
            return super().__call__(x, target)


class ReplayErasing(RandomErasing):
    """timm's `RandomErasing` on the device, row by row under the key of the batch that the loader handed out last."""

    def __init__(self, erasing: RandomErasing, batch_sampler: ReplayBatchSampler) -> None:
        vars(self).update(vars(erasing), batch_sampler=batch_sampler, generator=_device_generator(erasing))

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        key = self.batch_sampler.delivered
        num_samples = len(key.samples)
        first_row = len(input) // self.num_splits if self.num_splits > 1 else 0
        row_seed = seeds_under(self.batch_sampler.seed, ERASING, key.epoch)
        with preserved_generators(self.generator):
            for row in range(first_row, len(input)):
                split, sample = divmod(row, num_samples)
                seed = row_seed(key.position(sample), split)
                # Python's stream alone decides whether a row is erased; most rows are not, and need no other.
                random.seed(seed)
                if random.random() <= self.probability:
                    seed_generators(seed, self.generator)
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
            f'the pixels of random erasing (`re_mode` {erasing.mode}) cannot be replayed on {device.type}: use '
            '`re_mode` const, or no prefetcher.'
        )
    return device_module.default_generators[device_module.current_device() if device.index is None else device.index]
