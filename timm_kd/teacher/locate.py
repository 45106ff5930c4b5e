"""Where a teacher's spec points: a file, a folder, a timm name or the Hub."""

import logging
import re
from pathlib import Path

import timm
from timm.models import create_model, get_arch_name, get_pretrained_cfg, is_model, list_models, list_pretrained

from ..errors import UsageError, nearest

_logger = logging.getLogger(__name__)

_HUB_PREFIXES = ('hf-hub:', 'hf_hub:')
_FOLDER_PREFIX = 'local-dir:'
_WEIGHTS_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt')
_REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?')
# The recipes A1-A3 of "ResNet strikes back" (arXiv 2110.00476) train with binary cross-entropy, one sigmoid a class.
_BCE_TAG = re.compile(r'(rsb_)?a[123]h?_in1k')
# torchvision's and GluonCV's weights: softmax cross-entropy
_SOFTMAX_TAGS = ('tv_in1k', 'gluon_in1k', 'tv2_in1k')


def locate(spec: str) -> tuple[str, str]:
    """Finds a spec, in this order: a prefix; an existing file or folder; a timm name; `org/name` on the Hub.

    Returns:
        `hub`, `folder` or `timm` and the name timm's `create_model` takes, or `file` and its path.

    Raises:
        UsageError: If it points nowhere; with the nearest names that exist.
    """
    if spec.startswith(_HUB_PREFIXES):
        return 'hub', spec
    if spec.startswith(_FOLDER_PREFIX):
        return 'folder', _saved_by_timm(Path(spec.removeprefix(_FOLDER_PREFIX)).expanduser(), spec)
    path = Path(spec).expanduser()
    if path.is_file():
        return 'file', str(path)
    if path.is_dir():
        return 'folder', _saved_by_timm(path, spec)
    if is_model(get_arch_name(spec)):
        return 'timm', _with_weights(spec)
    if spec.endswith(_WEIGHTS_SUFFIXES):
        raise UsageError(f'--teacher {spec}: no such file')
    if _REPO_ID.fullmatch(spec):
        return 'hub', f'hf-hub:{spec}'
    if '/' in spec or ':' in spec:
        raise UsageError(
            f'--teacher {spec}: no such file or folder, and not a timm name, hf-hub:org/name or local-dir:PATH'
        )
    raise UsageError(
        f'--teacher {spec} is no file, no folder and no model of timm {timm.__version__}{nearest_model(spec)}'
    )


def nearest_model(name: str) -> str:
    """Return the end of a sentence that proposes timm's models nearest to a wrong name."""
    return nearest(name, list_pretrained() if '.' in name else list_models())


def warn_of_bce(name: str) -> None:
    """Logs one warning where an untagged timm name stands for weights trained with binary cross-entropy."""
    cfg = get_pretrained_cfg(name)
    if name != get_arch_name(name) or not _BCE_TAG.fullmatch(cfg.tag or ''):
        return
    tagged = list_pretrained(f'{name}.*')
    better = next((f'{name}.{tag}' for tag in _SOFTMAX_TAGS if f'{name}.{tag}' in tagged), None)
    _logger.warning(
        f'--teacher {name} is {name}.{cfg.tag}, of a recipe that trains with binary cross-entropy: its softmax is not '
        'calibrated as the distillation losses assume. '
        + (f'{better} was trained with softmax cross-entropy.' if better else 'Name the tag if you mean it.')
    )


def _saved_by_timm(path: Path, spec: str) -> str:
    """A folder, as timm names it."""
    if not path.is_dir():
        raise UsageError(f'--teacher {spec}: no such folder')
    if not (path / 'config.json').is_file():
        raise UsageError(
            f'--teacher {spec} has no config.json, so timm did not save it: name the weights file in it, and its '
            'architecture with --teacher-model'
        )
    return f'{_FOLDER_PREFIX}{path}'


def _with_weights(name: str) -> str:
    """A timm name for which timm has weights, a retired one by its successor."""
    arch = get_arch_name(name)
    if name == arch and name not in list_models():
        cfg = create_model(name).pretrained_cfg  # timm's factory alone knows the successors
        return f'{cfg["architecture"]}.{cfg["tag"]}'
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ', '.join(list_pretrained(f'{arch}.*')) or 'none with weights'
        raise UsageError(f'--teacher {name}: timm has no such tag; of {arch} it has {known}') from error
    if cfg is None or not cfg.has_weights:
        raise UsageError(
            f'--teacher {name} has no pretrained weights in timm: train it, and give its checkpoint file with '
            f'--teacher-model {arch}'
        )
    return name
