"""What a teacher's spec names, and the model with the weights that are there."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import (
    clean_state_dict,
    create_model,
    get_arch_name,
    get_pretrained_cfg,
    is_model,
    list_models,
    list_pretrained,
    resolve_model_input_args,
)
from torch import nn

from ..errors import UNSAFE, UsageError, explain, nearest, shortened
from ..files import load_file
from .adapt import can_adapt_channels

_logger = logging.getLogger(__name__)

_HUB_PREFIXES = ('hf-hub:', 'hf_hub:')
_FOLDER_PREFIX = 'local-dir:'
_WEIGHTS_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt')
_REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?')
# The recipes A1-A3 of "ResNet strikes back" (arXiv 2110.00476) train with binary cross-entropy, one sigmoid a class.
_BCE_TAG = re.compile(r'(rsb_)?a[123]h?_in1k')
# The weights of torchvision and GluonCV were trained with softmax cross-entropy.
_SOFTMAX_TAGS = ('tv_in1k', 'gluon_in1k', 'tv2_in1k')
# Entries of a pretrained config that describe timm's own weights, not the architecture.
_TIMM_WEIGHTS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load', 'label_offset')


def locate(spec: str) -> tuple[str, str]:
    """Find a spec, in this order: a prefix; an existing file or folder; a timm name; `org/name` on the Hub.

    Returns:
        `hub`, `folder` or `timm` and the name that timm's `create_model` takes, or `file` and its path.

    Raises:
        UsageError: If it points nowhere; with the nearest names that exist.
    """
    if spec.startswith(_HUB_PREFIXES):
        return 'hub', spec
    path = Path(spec.removeprefix(_FOLDER_PREFIX)).expanduser()
    if path.is_dir():
        if not (path / 'config.json').is_file():
            raise UsageError(
                f"teacher '{spec}' has no config.json, so timm did not save it: name the weights file in it, and its "
                'architecture with `model`.'
            )
        return 'folder', f'{_FOLDER_PREFIX}{path}'
    if spec.startswith(_FOLDER_PREFIX):
        raise UsageError(f"teacher '{spec}': no such folder.")
    if path.is_file():
        return 'file', str(path)
    if is_model(get_arch_name(spec)):
        return 'timm', _with_weights(spec)
    if spec.endswith(_WEIGHTS_SUFFIXES):
        raise UsageError(f"teacher '{spec}': no such file.")
    if _REPO_ID.fullmatch(spec):
        return 'hub', f'hf-hub:{spec}'
    if '/' in spec or ':' in spec:
        raise UsageError(
            f"teacher '{spec}': no such file or folder, and not a timm name, hf-hub:org/name or local-dir:PATH."
        )
    raise UsageError(
        f"teacher '{spec}' is no file, no folder and no model of timm {timm.__version__}{nearest_model(spec)}."
    )


def nearest_model(name: str) -> str:
    """Return the end of a sentence that proposes timm's models nearest to a wrong name."""
    return nearest(name, list_pretrained() if '.' in name else list_models())


def _with_weights(name: str) -> str:
    """Return a timm name for which timm has weights: the name itself, or the successor of a retired one."""
    arch = get_arch_name(name)
    if name == arch and name not in list_models():
        cfg = create_model(name).pretrained_cfg  # only timm's factory knows the successor of a name
        return f'{cfg["architecture"]}.{cfg["tag"]}'
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ', '.join(list_pretrained(f'{arch}.*')) or 'none with weights'
        raise UsageError(f"teacher '{name}': timm has no such tag; of {arch} it has {known}.") from error
    if cfg is None or not cfg.has_weights:
        raise UsageError(
            f"teacher '{name}' has no pretrained weights in timm: train it, and give its checkpoint file with "
            f'`model` {arch}.'
        )
    return name


def warn_of_bce(name: str) -> None:
    """Log one warning where an untagged timm name stands for weights trained with binary cross-entropy."""
    cfg = get_pretrained_cfg(name)
    if name != get_arch_name(name) or not _BCE_TAG.fullmatch(cfg.tag or ''):
        return
    tagged = list_pretrained(f'{name}.*')
    better = next((f'{name}.{tag}' for tag in _SOFTMAX_TAGS if f'{name}.{tag}' in tagged), None)
    _logger.warning(
        f'Teacher {name} is {name}.{cfg.tag}, of a recipe that trains with binary cross-entropy: its softmax is not '
        'calibrated as the distillation losses assume. '
        + (f'{better} was trained with softmax cross-entropy.' if better else 'Name the tag if you mean it.')
    )


def load_model(
        spec: str,
        num_classes: int | None = None,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
) -> nn.Module:
    """Build the teacher's model with its weights, on the CPU in float32; the arguments are those of `Teacher`.

    Raises:
        UsageError: If the teacher is unknown, cannot be had, does not load, or has other classes than the student.
    """
    kind, place = locate(spec)
    kwargs = dict(model_kwargs or {})
    if 'num_classes' in kwargs:
        raise UsageError('`model_kwargs` num_classes: a teacher keeps the head it was trained with.')
    try:
        if kind == 'file':
            return _load_file(Path(place), num_classes, in_chans, img_size, model, kwargs, use_ema)
        if model is not None:
            raise UsageError(f"`model` {model} names the architecture of a weights file, teacher '{spec}' is none.")
        if use_ema:
            raise UsageError(f"`use_ema` takes the EMA weights of a checkpoint file, teacher '{spec}' is none.")
        if kind == 'timm':
            warn_of_bce(place)
        args = _resolve(place, in_chans, img_size, kwargs)
        # Before the weights, which may have to be downloaded.
        own_classes = args.get('num_classes', args['pretrained_cfg'].get('num_classes'))
        check_num_classes(spec, own_classes, num_classes, f'{place} --pretrained')
        return create_model(pretrained=True, **args)
    except UsageError:
        raise
    except Exception as error:  # timm, torch, safetensors and the Hub client each raise errors of their own
        if kwargs and (isinstance(error, TypeError) or 'Conflicting' in str(error)):
            raise UsageError(f'`model_kwargs` {kwargs} do not suit the teacher: {shortened(error)}.') from error
        if 'weights_only' in str(error):
            reason = UNSAFE
        elif kind == 'file':
            reason = f'does not fit `model` {model}: {shortened(error)}'
        elif kind == 'folder':
            reason = f'its config.json or weights are damaged or do not fit each other ({shortened(error)})'
        else:
            # A spec without a prefix, `org/name`, may as well be the mistyped path of a folder.
            no_folder = 'there is no such folder, and on the Hub: ' if place != spec and kind == 'hub' else ''
            repo = place.partition(':')[2] if kind == 'hub' else get_pretrained_cfg(place).hf_hub_id or place
            reason = no_folder + explain(error, repo)
        raise UsageError(f"teacher '{spec}'{' ' if kind == 'file' else ': '}{reason}.") from error


def check_num_classes(
        source: str,
        teacher_classes: int | None,
        num_classes: int | None,
        pretrained: str = 'NAME --pretrained',
) -> None:
    """Refuse a teacher of another class count than the student's, or of none; an unknown count passes.

    `pretrained` is what the script's `--model` takes to start from this teacher's weights.

    Raises:
        UsageError: With both counts, and the command that makes a teacher for the student's classes.
    """
    if num_classes is not None and teacher_classes == 0:
        raise UsageError(f"teacher '{source}' has no classifier: choose one trained on the classes of the student.")
    if num_classes is not None and teacher_classes is not None and teacher_classes != num_classes:
        raise UsageError(
            f"teacher '{source}' has {teacher_classes} classes, the student {num_classes}: a head is never rebuilt; "
            f"fine-tune a teacher on the student's classes (train-kd DATA --model {pretrained} --num-classes "
            f'{num_classes}) and name its checkpoint, or say with `class_map` which of its own they are.'
        )


def _resolve(
        name: str,
        in_chans: int,
        img_size: int | tuple[int, int] | None,
        kwargs: dict[str, Any],
        saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments of `create_model`: the pretrained config, and the channels and size to build for.

    `saved` are the training arguments that a checkpoint holds: they say what its weights were built for.
    """
    request = {key: (saved or {}).get(key) for key in ('in_chans', 'img_size', 'input_size')}
    if img_size is not None:
        request = {'in_chans': request['in_chans'] or (request['input_size'] or [None])[0], 'img_size': img_size}
    args = resolve_model_input_args(name, args=request, **kwargs)
    own_chans = args.get('in_chans') or args['pretrained_cfg'].get('input_size', (3,))[0]
    if not can_adapt_channels(in_chans, own_chans):
        args['in_chans'] = in_chans
    return args


def _load_file(
        path: Path,
        num_classes: int | None,
        in_chans: int,
        img_size: int | tuple[int, int] | None,
        model: str | None,
        kwargs: dict[str, Any],
        use_ema: bool,
) -> nn.Module:
    """Build `model` and load a weights file into it strictly, by way of timm's own conversion of older formats."""
    state_dict, saved, arch = _read_weights_file(path, use_ema)
    if model is None:
        hint = f', {arch} as the file has it' if arch else ''
        raise UsageError(f"teacher '{path}' needs `model`, the architecture of its weights{hint}.")
    if not is_model(get_arch_name(model)):
        raise UsageError(f'`model` {model} is no architecture of timm {timm.__version__}{nearest_model(model)}.')
    try:
        get_pretrained_cfg(model)
    except RuntimeError as error:
        raise UsageError(f'`model` {model}: timm has no such tag; the architecture alone will do.') from error
    built_with = {**(saved.get('model_kwargs') or {}), 'global_pool': saved.get('gp'), **kwargs}
    args = _resolve(model, in_chans, img_size, built_with, saved)
    cfg = _describe_weights(args['pretrained_cfg'], state_dict, saved, num_classes)
    args.update(pretrained_cfg=cfg, num_classes=cfg['num_classes'])
    try:
        teacher = create_model(pretrained=True, **args)
    except RuntimeError as error:
        if arch in (None, model, get_arch_name(model)):
            raise
        raise RuntimeError(f'the file says {arch}. {error}') from error
    # Checked once the weights fit: of a file of another architecture, the class count is not what is wrong.
    check_num_classes(str(path), cfg['num_classes'], num_classes, f'{model} --pretrained --pretrained-path {path}')
    del teacher.pretrained_cfg['state_dict']  # a second copy of the weights
    return teacher


def _read_weights_file(path: Path, use_ema: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any], str | None]:
    """Return a state dict, and the training arguments and architecture that timm's script and this one save beside it.

    The file is a state dict, or a checkpoint of timm's script, of torchvision's references or of this script; the
    prefixes of DDP and torch.compile are stripped.
    """
    name = f"teacher '{path}'"
    checkpoint = load_file(path, name)
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{name} holds a {type(checkpoint).__name__}, not a checkpoint or a state dict.')
    names = ('state_dict_ema', 'model_ema') if use_ema else ('state_dict', 'model')
    key = next((key for key in names if isinstance(checkpoint.get(key), dict)), None)
    if use_ema and key is None:
        raise UsageError(f'`use_ema`: {name} holds no EMA weights; leave it out.')
    state_dict, beside = (checkpoint, {}) if key is None else (checkpoint[key], checkpoint)
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise UsageError(f'{name} holds no state dict: a checkpoint has tensors by parameter name.')
    args = beside.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return clean_state_dict(state_dict), args if isinstance(args, dict) else {}, beside.get('arch')


def _describe_weights(
        cfg: dict[str, Any],
        state_dict: dict[str, torch.Tensor],
        saved: dict[str, Any],
        num_classes: int | None,
) -> dict[str, Any]:
    """Return the architecture's pretrained config, made to describe a weights file instead of timm's weights."""
    def weight(module: str | tuple[str, ...] | None) -> torch.Tensor | None:
        return state_dict.get(f'{module[0] if isinstance(module, tuple | list) else module}.weight')

    cfg = {key: value for key, value in cfg.items() if key not in _TIMM_WEIGHTS}
    stem, head = weight(cfg.get('first_conv')), weight(cfg.get('classifier'))
    chans = saved.get('in_chans') or (stem.shape[1] if stem is not None and stem.ndim == 4 else cfg['input_size'][0])
    data = resolve_data_config({key: saved.get(key) for key in ('mean', 'std', 'interpolation')}, pretrained_cfg=cfg)
    return {
        **cfg,
        'state_dict': state_dict,
        'input_size': (chans, *cfg['input_size'][1:]),
        'num_classes': len(head) if head is not None else saved.get('num_classes') or num_classes or cfg['num_classes'],
        **{key: data[key] for key in ('mean', 'std', 'interpolation')},
    }
