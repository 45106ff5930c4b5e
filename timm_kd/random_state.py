"""The random streams that timm's training draws from: read, restored, kept apart."""
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """Returns the states of Python's, NumPy's, torch's and CUDA's generators, in types that `weights_only` loads."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, position, has_gauss, cached = np.random.get_state()
    return {
        'python': (version, list(keys), gauss),
        'numpy': (name, numpy_keys.tolist(), position, has_gauss, cached),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `get_random_state` returned; CUDA states only for as many devices as there are."""
    version, keys, gauss = state['python']
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if torch.cuda.is_available():
        for index, cuda_state in enumerate(state['cuda'][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leaves every random stream as it was found, so that what this project adds changes no draw of the training."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
