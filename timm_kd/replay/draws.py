"""Random streams seeded by a place in the run, and given back as they were."""
import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info

# What a seed is for: the second part of every key.
ORDER, SAMPLE, MIXUP, ERASING = range(4)

_PAIR = struct.Struct('<2q')


def derive_seed(*key: int) -> int:
    """Hash integers into 64 bits that are the same on every platform and in every version."""
    return int.from_bytes(hashlib.blake2b(struct.pack(f'<{len(key)}q', *key), digest_size=8).digest(), 'little')


def seeds_under(*key: int) -> Callable[[int, int], int]:
    """Return a function of two integers: the seed of `key` followed by them, in a fifth of the time."""
    start = hashlib.blake2b(struct.pack(f'<{len(key)}q', *key), digest_size=8)

    def derive(first: int, second: int) -> int:
        digest = start.copy()
        digest.update(_PAIR.pack(first, second))
        return int.from_bytes(digest.digest(), 'little')

    return derive


def seed_generators(seed: int, generator: torch.Generator = torch.default_generator) -> None:
    """Seed the three streams that timm's and torchvision's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xffff_ffff)
    generator.manual_seed(seed >> 1)


@contextmanager
def preserved_generators(generator: torch.Generator = torch.default_generator) -> Iterator[None]:
    """Restore the three streams at the end. In a worker nobody else draws from them, so nothing is saved there."""
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
