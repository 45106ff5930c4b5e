"""args -> the model to train, built as timm's script builds it."""
import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, load_checkpoint, resolve_model_input_args
from timm.utils import set_jit_fuser
from torch import nn

from .errors import UsageError, explain, shortened
from .files import load_file
from .process import Process
from .student_checks import check_forward, check_pretrained
from .teacher.spec import nearest_model

_logger = logging.getLogger(__name__)

# What timm, torch, safetensors and the Hub client raise for a model or a file of weights that cannot be had.
_BUILD_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError, EOFError,
    SafetensorError,
)


def create_student(
        args: argparse.Namespace,
        process: Process,
        dtype: torch.dtype | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Creates the student on its device, and the data configuration that its images follow.

    Sets `args.num_classes` where the flag left it to the model.

    Returns:
        The model, and timm's data config: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.

    Raises:
        UsageError: If timm cannot build the model that the flags describe, or it cannot take the images.
    """
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    try:
        model = _create_model(args)
        _adjust_head(model, args)
        if args.num_classes is None:
            args.num_classes = model.num_classes
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        if process.primary:
            _logger.info(f'Model {args.model} created, param count:{sum(p.numel() for p in model.parameters())}')
        data_config = resolve_input_data_config(model, vars(args), verbose=process.primary)
    except UsageError:
        raise
    except _BUILD_ERRORS as error:
        raise UsageError(_why_not_built(args, error)) from error
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=process.device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    check_forward(model, args, data_config['input_size'])
    if process.distributed and args.sync_bn:
        args.dist_bn = ''  # synchronised statistics need no further distribution
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        model = torch.jit.script(model)
    return model, data_config


def _create_model(args: argparse.Namespace) -> nn.Module:
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else None
    factory_args = resolve_model_input_args(
        args.model,
        vars(args),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        pretrained_cfg_overlay=overlay,
        **args.model_kwargs,
    )
    build = partial(
        create_model,
        pretrained=args.pretrained,
        pretrained_cfg_overlay=overlay,
        scriptable=args.torchscript or None,
        **factory_args,
    )
    model = build()
    if args.pretrained_path:
        check_pretrained(model, build, args)
    if args.initial_checkpoint:
        try:
            load_checkpoint(model, args.initial_checkpoint)
        except _BUILD_ERRORS as error:
            _check_readable(args.initial_checkpoint, '--initial-checkpoint')
            other_head = '--pretrained --pretrained-path takes all but the head of a file; '
            raise UsageError(
                f'--initial-checkpoint {args.initial_checkpoint} does not fit --model {args.model}: '
                f'{other_head if "size mismatch" in str(error) else ""}{shortened(error)}'
            ) from error
    return model


def _why_not_built(args: argparse.Namespace, error: Exception) -> str:
    """Tells the user what an error of timm, torch, safetensors or the Hub client means."""
    if str(error).startswith('Unknown model'):
        return f'--model {args.model} is no model of timm {timm.__version__}{nearest_model(args.model)}'
    if args.pretrained_path:
        _check_readable(args.pretrained_path, '--pretrained-path')
    elif isinstance(error, OSError) and not args.model.startswith('local-dir:'):
        return f'--model {args.model}{" --pretrained" if args.pretrained else ""}: {explain(error, args.model)}'
    source = f' --pretrained-path {args.pretrained_path}' if args.pretrained_path else ''
    return f'--model {args.model}{source}: {shortened(error)}'


def _check_readable(path: str, flag: str) -> None:
    if Path(path).suffix in ('.npz', '.npy'):  # timm reads those by itself, without pickles
        return
    content = load_file(path, f'{flag} {path}')
    if not isinstance(content, dict):
        raise UsageError(f'{flag} {path} holds a {type(content).__name__}, not a checkpoint or a state dict')


def _adjust_head(model: nn.Module, args: argparse.Namespace) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    with torch.no_grad():
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(head.bias, args.head_init_bias)
