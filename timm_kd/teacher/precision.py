"""In which precision and memory layout a device runs a frozen model fastest."""

import torch
from torch import nn

from ..errors import UsageError

TEACHER_DTYPES = ('auto', 'amp', 'float32', 'bfloat16', 'float16')


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of the teacher's weights.

    Args:
        name: One of `TEACHER_DTYPES`. `amp` keeps float32 weights, for the autocast of the caller to narrow.
        device: Where the teacher runs; `auto` is bfloat16 where that is fast, else float32.

    Raises:
        UsageError: If the name is none of `TEACHER_DTYPES`.
    """
    if name not in TEACHER_DTYPES:
        raise UsageError(f"--teacher-dtype {name!r} is none of {', '.join(TEACHER_DTYPES)}")
    if name == 'auto':
        return torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32
    return torch.float32 if name == 'amp' else getattr(torch, name)


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; emulation is slower than float32."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == 'cpu':
        # private names: PyTorch has no public way to ask, and where they are missing float32 is the safe answer
        probes = (getattr(torch.cpu, name, None) for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'))
        return any(probe is not None and probe() for probe in probes)
    return False


def is_convolutional(model: nn.Module) -> bool:
    """Whether channels-last pays: more than one spatial convolution, so not a transformer's lone patch embedding."""
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return len(spatial) > 1
