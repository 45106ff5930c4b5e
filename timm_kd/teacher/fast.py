"""What makes a frozen model fast: its precision, its memory layout, and batch norms folded into convolutions."""

import copy
import logging

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError, shortened

_logger = logging.getLogger(__name__)

TEACHER_DTYPES = ('auto', 'amp', 'float32', 'bfloat16', 'float16')


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the teacher's weights.

    Args:
        name: One of `TEACHER_DTYPES`. `amp` keeps float32 weights, for the autocast of the caller to narrow.
        device: Where the teacher runs; `auto` is bfloat16 where that is fast, else float32.

    Raises:
        UsageError: If the name is none of `TEACHER_DTYPES`.
    """
    if name not in TEACHER_DTYPES:
        raise UsageError(f"`dtype` {name!r} is none of {', '.join(TEACHER_DTYPES)}.")
    if name == 'auto':
        return torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32
    return torch.float32 if name == 'amp' else getattr(torch, name)


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware; emulation is slower than float32."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == 'cpu':
        # Private names: PyTorch has no public way to ask, and where they are missing float32 is the safe answer.
        probes = (getattr(torch.cpu, name, None) for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'))
        return any(probe is not None and probe() for probe in probes)
    return False


def is_convolutional(model: nn.Module) -> bool:
    """Return whether channels-last pays: more than one spatial convolution, so not a ViT with its patch embedding."""
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return len(spatial) > 1


@torch.no_grad()
def fold_batch_norms(model: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return a copy of a model whose batch norms are folded into the convolutions before them.

    torch's `fuse` finds the pairs in a trace of the model and computes the convolutions. They are put back into a copy
    of the model, with identities in place of the folded batch norms, so that its class, attributes and forward stay.

    Args:
        model: In eval mode; it is left untouched.
        image_shape: `(C, H, W)` of two images on which the copy must answer as the model does.

    Returns:
        The copy, in float32 on the CPU; the model itself where there is nothing to fold, it cannot be traced, or the
        copy answers differently.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    try:
        folded = copy.deepcopy(model).to('cpu', torch.float32)
        images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
        expected = folded(images)
        _separate_activations(folded)
        fused = fuse(folded, inplace=True)
        left = {node.target for node in fused.graph.nodes if node.op == 'call_module'}
        for name, module in list(folded.named_modules()):
            if name in left:
                folded.set_submodule(name, fused.get_submodule(name))
            elif isinstance(module, _BatchNorm):
                folded.set_submodule(name, nn.Identity())
        error = (folded(images) - expected).abs().max() / expected.abs().max()
        if not error <= 1e-4:
            raise ValueError(f'the logits are off by {error:.1g}')
    except Exception as error:  # a model may do anything in its forward, and this is a matter of speed alone
        _logger.debug(f'Batch norms of {type(model).__name__} not folded: {shortened(error)}.')
        return model
    return folded


def _separate_activations(model: nn.Module) -> None:
    """Replace each of timm's fused batch norms and activations by one of each, which `fuse` can tell apart."""
    for parent in list(model.modules()):
        for name, both in list(parent.named_children()):
            if type(both) is BatchNormAct2d:
                norm = nn.BatchNorm2d(
                    both.num_features, both.eps, affine=both.affine, track_running_stats=both.track_running_stats,
                )
                norm.load_state_dict(both.state_dict(), strict=False)  # an activation may have parameters, too
                setattr(parent, name, nn.Sequential(norm, both.drop, both.act).eval())
