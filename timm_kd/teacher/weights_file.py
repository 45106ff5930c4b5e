"""A teacher's weights file: read without running code, and what it says about the model it came from."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict

from ..errors import UsageError
from ..files import load_file

_EMA_KEYS = ('state_dict_ema', 'model_ema')
_STATE_KEYS = ('state_dict', 'model')


@dataclass
class WeightsFile:
    """A state dict, and the training arguments saved beside it (timm's script and this one save them)."""

    state_dict: dict[str, torch.Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    arch: str | None = None


def read_weights_file(path: Path, use_ema: bool = False) -> WeightsFile:
    """Reads `.safetensors`, or a PyTorch file with `weights_only`, and strips the prefixes of DDP and torch.compile.

    Args:
        path: The file: a state dict, or a checkpoint of timm's script, of torchvision's references or of this script.
        use_ema: Take the averaged weights of a checkpoint.

    Raises:
        UsageError: If the file is missing, truncated, no checkpoint, or would run code when loaded.
    """
    checkpoint = load_file(path, '--teacher')
    if not isinstance(checkpoint, dict):
        raise UsageError(f'--teacher {path} holds a {type(checkpoint).__name__}, not a checkpoint or a state dict')
    keys = [k for k in (_EMA_KEYS if use_ema else _STATE_KEYS) if isinstance(checkpoint.get(k), dict)]
    if use_ema and not keys:
        raise UsageError(f'--teacher-ema: --teacher {path} holds no EMA weights; leave the flag out')
    state_dict = checkpoint[keys[0]] if keys else checkpoint
    if not state_dict or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise UsageError(f'--teacher {path} holds no state dict: a checkpoint has tensors by parameter name')
    args = checkpoint.get('args') if keys else None
    return WeightsFile(
        state_dict=clean_state_dict(state_dict),
        args=vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {},
        arch=checkpoint.get('arch') if keys else None,
    )
