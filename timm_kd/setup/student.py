"""args -> the student: built as timm's script builds it, and refused where it cannot train on the run's images."""
import argparse
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, load_checkpoint, load_state_dict, resolve_model_input_args
from timm.utils import set_jit_fuser
from torch import nn
from torch.func import functional_call

from ..cli import resolve_kd
from ..cli.messages import given
from ..data import DataConfig
from ..errors import UsageError, explain, few, shortened
from ..files import load_file
from ..losses import KD_LOSSES
from ..process import Process, preserved_random_state
from ..teacher.spec import nearest_model

_logger = logging.getLogger(__name__)

# What timm, torch, safetensors and the Hub client raise for a model or a file of weights that cannot be had.
_BUILD_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError, EOFError,
    SafetensorError,
)

# timm leaves random what a file does not name. Up to this share of the model, the user may have meant that.
_LARGEST_RANDOM_SHARE = 0.9


def create_student(
        args: argparse.Namespace,
        process: Process,
        dtype: torch.dtype | None,
) -> tuple[nn.Module, DataConfig, int]:
    """Create the student as timm's script does, checked on images like those of the run.

    Returns:
        The model on its device, timm's data config of its images, and the number of its classes: `--num-classes`, or
        the model's own where the flag leaves it to the model.

    Raises:
        UsageError: If timm cannot build the model that the flags describe, or it cannot take the images.
    """
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    try:
        model = _create_model(args)
        _scale_head(model, args.head_init_scale, args.head_init_bias)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        if process.primary:
            _logger.info(f'Model {args.model} created, param count:{sum(p.numel() for p in model.parameters())}')
        data_config = resolve_input_data_config(model, vars(args), verbose=process.primary)
    except UsageError:
        raise
    except _BUILD_ERRORS as error:
        raise UsageError(_why_not_built(args, error)) from error
    num_classes = model.num_classes if args.num_classes is None else args.num_classes
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=process.device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _check_distillation(args, model)
    _check_forward(args, model, data_config['input_size'], num_classes)
    if process.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        model = torch.jit.script(model)
    return model, data_config, num_classes


def get_patch_size(model: nn.Module) -> tuple[int, int]:
    """Return height and width of a model's patches; timm's 16 where the model has none."""
    return tuple(model.get_patch_size()) if hasattr(model, 'get_patch_size') else (16, 16)


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
    with _missing_keys() as missing:
        model = create_model(
            pretrained=args.pretrained,
            pretrained_cfg_overlay=overlay,
            scriptable=args.torchscript or None,
            **factory_args,
        )
    if args.pretrained_path:
        _check_pretrained(model, missing, args.pretrained_path, args.model)
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


def _check_distillation(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse a student that does not have what its distillation needs."""
    kd = resolve_kd(args)
    if kd is None:
        return
    if kd.loss == 'token' and not hasattr(model, 'set_distilled_training'):
        raise UsageError(
            f'--kd-distill-type token: --model {args.model} has no head that learns from the teacher alone: take one '
            'that has (deit_tiny_distilled_patch16_224, say), or distil its logits by --kd-loss.')
    if kd.loss == 'feature' and not (hasattr(model, 'forward_features') and hasattr(model, 'forward_head')):
        raise UsageError(f'--kd-distill-type feature: --model {args.model} does not give its features away.')
    if kd.loss in KD_LOSSES and hasattr(model, 'dist_token'):
        # timm averages the two heads as long as nobody calls `set_distilled_training`, but the second is there to learn
        # from the teacher alone, which no loss on logits does.
        raise UsageError(
            f'--model {args.model} has a distillation token, whose head gives a second set of logits in training, and '
            'the distillation losses are defined on one: add --kd-distill-type token, which trains it, or take a model '
            'without it (deit_tiny_patch16_224, say).'
        )


def _scale_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    if scale is None and bias is None:
        return
    head = model.get_classifier()
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            head.bias.mul_(scale)
        if bias is not None:
            nn.init.constant_(head.bias, bias)


def _check_forward(
        args: argparse.Namespace,
        model: nn.Module,
        input_size: tuple[int, int, int],
        num_classes: int,
) -> None:
    """Refuse a student that fails on blank images of the run's sizes, or whose output a loss on logits cannot read.

    Parameters, buffers and random streams are left as they were; the model is left in training mode.
    """
    for training, num_images, input, what in blank_batches(args, model, input_size):
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        try:
            with preserved_random_state(), torch.no_grad():
                output = functional_call(model.train(training), buffers, input)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
            flags = ['in_chans', 'gp', 'model_kwargs']
            flags += ['naflex_patch_sizes'] if args.naflex_loader else ['input_size', 'img_size', 'train_img_sizes']
            suspects = [flag for dest in flags if (flag := given(args, dest))]
            suspects += ['--batch-size 1'] if num_images == 1 else []
            usual = '--model (to naflexvit_base_patch16_gap, say)' if args.naflex_loader else '--img-size'
            raise UsageError(
                f'--model {args.model} fails on {what}, change {" or ".join(suspects or [usual])}: {shortened(error)}'
            ) from error
        if not isinstance(output, torch.Tensor):
            raise UsageError(
                f'--model {args.model} returns a {type(output).__name__} of {len(output)} outputs in training, and the '
                'losses are defined on one set of logits: take a model, or --model-kwargs, without it.'
            )
        if output.shape != (num_images, num_classes):
            raise UsageError(
                f'--model {args.model} returns outputs of shape {tuple(output.shape[1:])} for an image, the losses '
                f'need {num_classes} logits: leave --gp and --model-kwargs at their defaults.'
            )


def blank_batches(
        args: argparse.Namespace,
        model: nn.Module,
        input_size: tuple[int, int, int],
) -> Iterator[tuple[bool, int, torch.Tensor | dict[str, torch.Tensor], str]]:
    """Yield blank batches as the loaders make them.

    Each is a tuple: whether it is for training, how many images it has, the batch, and what an error calls it.
    """
    parameter = next(model.parameters())
    # Two images are enough for batch norm (with --split-bn in each split), but the batches of the run may hold one.
    smallest = min(2, args.batch_size, *args.train_batch_sizes or ())
    channels, *size = input_size
    if args.naflex_loader:
        sizes = [(False, get_patch_size(model), True)]  # patches of the model's own size are vectors
        sizes += [(True, (side, side), False) for side in args.naflex_patch_sizes or ()] or [(True, *sizes[0][1:])]
        for training, patch_size, flat in sizes:
            patchify = Patchify(
                patch_size, flatten_patches=flat, channels_last=not args.naflex_patchify_channels_first)
            patches = patchify(torch.zeros(channels, *(4 * side for side in patch_size)))
            batch, _ = NaFlexCollator(max_seq_len=16)([(patches, 0)] * smallest)
            batch = {
                name: value.to(parameter.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            batch['patches'] = batch['patches'].to(parameter.dtype)
            yield training, smallest, batch, f'NaFlex patches of {"x".join(map(str, patch_size))}'
        return
    splits = max(args.aug_splits, 2) if args.split_bn else 1
    batches = [(False, 2, size), *((True, smallest, [side] * 2) for side in args.train_img_sizes or [])]
    if not args.train_img_sizes:
        batches.append((True, smallest, size))
    for training, count, sides in batches:
        images = torch.zeros(count * splits, channels, *sides, device=parameter.device, dtype=parameter.dtype)
        yield training, len(images), images, f'images of {"x".join(map(str, images.shape[1:]))}'


def _why_not_built(args: argparse.Namespace, error: Exception) -> str:
    """Tell the user what an error of timm, torch, safetensors or the Hub client means."""
    if str(error).startswith('Unknown model'):
        return f'--model {args.model} is no model of timm {timm.__version__}{nearest_model(args.model)}.'
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
        raise UsageError(f'{flag} {path} holds a {type(content).__name__}, not a checkpoint or a state dict.')


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Collect the names of the weights that timm does not find in a pretrained file: only its log tells them."""
    logger = logging.getLogger('timm.models._builder')
    own_level, threshold = logger.level, logger.getEffectiveLevel()
    missing: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        report = re.match(r'Missing keys \((.*)\) discovered', record.getMessage())
        missing.extend(report[1].split(', ') if report else ())
        return record.levelno >= threshold

    logger.addFilter(listen)
    logger.setLevel(logging.INFO)
    try:
        yield missing
    finally:
        logger.setLevel(own_level)
        logger.removeFilter(listen)


def _check_pretrained(model: nn.Module, missing: Iterable[str], path: str, name: str) -> None:
    """Refuse a file of `--pretrained-path` that has next to no weights for the model.

    The head does not count: timm never takes it from such a file. Nor do vectors: they are biases and scales, which
    start as constants.
    """
    heads = model.pretrained_cfg.get('classifier') or ()
    heads = tuple(f'{head}.' for head in ([heads] if isinstance(heads, str) else heads))
    sizes = {
        name: weight.numel() for name, weight in model.named_parameters()
        if weight.ndim > 1 and not name.startswith(heads)
    }
    random = [name for name in missing if name in sizes]
    if sum(sizes[name] for name in random) > _LARGEST_RANDOM_SHARE * sum(sizes.values()):
        raise UsageError(
            f'--pretrained-path {path} does not fit --model {name}: it lacks {few(random)} and holds '
            f'{few(load_state_dict(path))}; name the model that it was saved from.'
        )
