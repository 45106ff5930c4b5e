"""Counting a model's floating-point operations without running it."""

import logging

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

_logger = logging.getLogger(__name__)


@torch.no_grad()
def count_flops(model: nn.Module, image_shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> int | None:
    """FLOPs of one image `(C, H, W)`, a multiply-add counting as two; None for a model that resists tracing.

    The weights are replaced by tensors without data, so it takes milliseconds and no memory.
    """
    state = {name: tensor.to('meta') for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    image = torch.empty(1, *image_shape, dtype=dtype, device='meta')
    try:
        with FlopCounterMode(display=False) as counter:
            functional_call(model, state, (image,))
    except Exception as error:  # a model may do anything in its forward; the figure is a courtesy
        _logger.debug('FLOPs not counted: %s', error)
        return None
    return counter.get_total_flops()
