"""From a spec to a model with weights, and what may be wrong with it."""

from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import create_model, get_arch_name, get_pretrained_cfg, is_model, resolve_model_input_args
from torch import nn

from ..errors import UNSAFE, UsageError, explain, shortened
from .adapt import can_adapt_channels
from .locate import locate, nearest_model, warn_of_bce
from .weights_file import WeightsFile, read_weights_file

# where timm's own weights are, and what is true of them alone
_TIMM_WEIGHTS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load', 'label_offset')


def load_model(
        spec: str,
        num_classes: int | None = None,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
        has_class_map: bool = False,
) -> nn.Module:
    """Builds the teacher's model with its weights, on the CPU in float32.

    Args:
        spec: See `locate`.
        num_classes: The student's classes, checked before weights are fetched; None: not checked.
        in_chans: Channels of the images. A teacher of 1 or 3 channels keeps its own where the images have 3 or 1;
            for other counts timm adapts the stem's weights.
        img_size: Input size to build a model of fixed size for.
        model: Architecture, for a weights file only.
        model_kwargs: Further arguments of the architecture.
        use_ema: Take the averaged weights of a weights file.
        has_class_map: The teacher's classes are its own, and their count is not checked.

    Raises:
        UsageError: If the teacher is unknown, cannot be had, does not load, or has other classes than the student.
    """
    kind, place = locate(spec)
    kwargs = dict(model_kwargs or {})
    if 'num_classes' in kwargs:
        raise UsageError('--teacher-kwargs num_classes: a teacher keeps the head it was trained with')
    expected = None if has_class_map else num_classes
    if kind == 'file':
        return _load_file(Path(place), num_classes, expected, in_chans, img_size, model, kwargs, use_ema)
    if model is not None:
        raise UsageError(f'--teacher-model {model} names the architecture of a weights file, --teacher {spec} is none')
    if use_ema:
        raise UsageError(f'--teacher-ema takes the EMA weights of a checkpoint file, --teacher {spec} is none')
    if kind == 'timm':
        warn_of_bce(place)
    try:
        args = _resolve(place, in_chans, img_size, kwargs)
        check_num_classes(spec, args.get('num_classes', args['pretrained_cfg'].get('num_classes')), expected)
        return create_model(pretrained=True, **args)
    except UsageError:
        raise
    except Exception as error:  # timm, torch, safetensors and the Hub client each raise errors of their own
        _blame_kwargs(kwargs, error)
        if 'weights_only' in str(error):
            reason = UNSAFE
        elif kind == 'folder':
            reason = f'its config.json or weights are damaged or do not fit each other ({shortened(error)})'
        else:
            # `org/name` may as well be the mistyped path of a folder
            no_folder = '' if kind == 'timm' or spec == place else 'there is no such folder, and on the Hub: '
            reason = no_folder + explain(error, _repo(kind, place))
        raise UsageError(f'--teacher {spec}: {reason}') from error


def check_num_classes(source: str, teacher_classes: int | None, num_classes: int | None) -> None:
    """Raises UsageError where teacher and student have different class counts; an unknown count passes."""
    if teacher_classes == 0:
        raise UsageError(f'--teacher {source} has no classifier: choose one trained on the classes of the student')
    if num_classes is not None and teacher_classes is not None and teacher_classes != num_classes:
        raise UsageError(
            f'--teacher {source} has {teacher_classes} classes, the student {num_classes}: a head is never rebuilt; '
            "train the teacher on the student's classes, or say with --teacher-class-map which of its own they are"
        )


def _resolve(
        name: str,
        in_chans: int,
        img_size: int | tuple[int, int] | None,
        kwargs: dict[str, Any],
        saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of `create_model`: the pretrained config, and the channels and size to build for.

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
        expected: int | None,
        in_chans: int,
        img_size: int | tuple[int, int] | None,
        model: str | None,
        kwargs: dict[str, Any],
        use_ema: bool,
) -> nn.Module:
    """Builds `model` and loads a weights file into it strictly, by way of timm's own conversion of older formats."""
    weights = read_weights_file(path, use_ema)
    _check_architecture(path, model, weights)
    saved = weights.args
    built_with = {**(saved.get('model_kwargs') or {}), 'global_pool': saved.get('gp'), **kwargs}
    try:
        args = _resolve(model, in_chans, img_size, built_with, saved)
        cfg = _describe_weights(args['pretrained_cfg'], weights, num_classes)
        args.update(pretrained_cfg=cfg, num_classes=cfg['num_classes'])
        teacher = create_model(pretrained=True, **args)
        # After the weights: the head of a file of another architecture says nothing about the trouble.
        check_num_classes(str(path), cfg['num_classes'], expected)
    except UsageError:
        raise
    except (RuntimeError, KeyError, ValueError, AssertionError, TypeError) as error:
        _blame_kwargs(kwargs, error)
        other = f', the file says {weights.arch}' if weights.arch not in (None, model, get_arch_name(model)) else ''
        raise UsageError(f'--teacher {path} does not fit --teacher-model {model}{other}: {shortened(error)}') from error
    del teacher.pretrained_cfg['state_dict']  # a second copy of the weights
    return teacher


def _check_architecture(path: Path, model: str | None, weights: WeightsFile) -> None:
    if model is None:
        hint = f', {weights.arch} as the file has it' if weights.arch else ''
        raise UsageError(f'--teacher {path} needs --teacher-model, the architecture of its weights{hint}')
    if not is_model(get_arch_name(model)):
        raise UsageError(f'--teacher-model {model} is no architecture of timm {timm.__version__}{nearest_model(model)}')
    try:
        get_pretrained_cfg(model)
    except RuntimeError as error:
        raise UsageError(f'--teacher-model {model}: timm has no such tag; the architecture alone will do') from error


def _describe_weights(cfg: dict[str, Any], weights: WeightsFile, num_classes: int | None) -> dict[str, Any]:
    """The architecture's pretrained config, made to describe a weights file instead of timm's weights."""
    state, saved = weights.state_dict, weights.args
    cfg = {key: value for key, value in cfg.items() if key not in _TIMM_WEIGHTS}
    stem, head = (_weight(state, cfg.get(key)) for key in ('first_conv', 'classifier'))
    chans = saved.get('in_chans') or (stem.shape[1] if stem is not None and stem.ndim == 4 else cfg['input_size'][0])
    data = resolve_data_config({key: saved.get(key) for key in ('mean', 'std', 'interpolation')}, pretrained_cfg=cfg)
    cfg.update(
        state_dict=state,
        input_size=(chans, *cfg['input_size'][1:]),
        num_classes=len(head) if head is not None else saved.get('num_classes') or num_classes or cfg['num_classes'],
        mean=data['mean'],
        std=data['std'],
        interpolation=data['interpolation'],
    )
    return cfg


def _weight(state_dict: dict[str, Any], module: str | tuple[str, ...] | None) -> Any:
    """The weight of a module that a pretrained config names, or of the first it names."""
    return state_dict.get(f'{module[0] if isinstance(module, tuple | list) else module}.weight')


def _blame_kwargs(kwargs: dict[str, Any], error: Exception) -> None:
    """Raises UsageError where the arguments of the architecture are what is wrong."""
    if kwargs and (isinstance(error, TypeError) or 'Conflicting' in str(error)):
        raise UsageError(f'--teacher-kwargs {kwargs} do not suit the teacher: {shortened(error)}') from error


def _repo(kind: str, place: str) -> str:
    """The Hub repository behind a Hub spec or a timm name."""
    return place.partition(':')[2] if kind == 'hub' else get_pretrained_cfg(place).hf_hub_id or place
