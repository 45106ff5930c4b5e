"""A run -> the folder that goes to the Hub, complete and loadable by timm from disk."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
import yaml
from timm.models import load_state_dict, resolve_model_input_args, save_for_hf
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..errors import UsageError
from .card import Publication, model_card
from .curves import draw_curves
from .run_files import Run, scrub

_logger = logging.getLogger(__name__)

# Facts of the weights that timm publishes for the architecture; none of them holds for the student's.
_SOURCE_FACTS = (
    'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
    'label_descriptions',
)


def export_run(run: Run, publication: Publication, checkpoint: str | None = None) -> list[Path]:
    """Writes `RUN_DIR/hub/`: weights, timm's config, model card, flags, epochs and curves.

    Args:
        run: The run, as `read_run` has it.
        publication: Where it goes, and what only its author can say about it.
        checkpoint: A checkpoint other than the best one of the run.

    Returns:
        The files written, which are the files to upload: whatever else lies in the folder stays there.

    Raises:
        UsageError: The checkpoint is missing, or is not one of this run.
    """
    folder = run.folder / 'hub'
    folder.mkdir(exist_ok=True)
    path = run.checkpoint(checkpoint)
    student = _load_student(run, path)
    state = load_checkpoint_metadata(path)
    epoch, is_ema = state.get('epoch'), state.get('state_dict_ema') is not None
    _logger.info(f'Exporting {path.name} (epoch {epoch}{", EMA weights" if is_ema else ""}) to {folder}')

    record = run.record['student']
    class_names = record.get('class_names')
    save_for_hf(
        student,
        folder,
        model_config={'label_names': class_names} if class_names else None,
        safe_serialization=True,
        data_config=record['data_config'],
    )
    names = ['model.safetensors', 'config.json', 'README.md', 'args.yaml', 'summary.csv']
    (folder / 'args.yaml').write_text(yaml.safe_dump(scrub(run.args), default_flow_style=False), encoding='utf-8')
    (folder / 'summary.csv').write_bytes((run.folder / 'summary.csv').read_bytes())
    has_curves = draw_curves(run.summary, folder / 'curves.png')
    if has_curves:
        names.append('curves.png')
    card = model_card(run, publication, epoch=epoch, is_ema=is_ema, has_curves=has_curves)
    card.save(folder / 'README.md')
    return [folder / name for name in names]


def _load_student(run: Run, checkpoint: Path) -> nn.Module:
    """The student with the checkpoint's weights (EMA if tracked), and no claim to the origin of any other."""
    record, args = run.record['student'], run.args
    model_kwargs: dict[str, Any] = dict(args.get('model_kwargs') or {})
    channels, *_ = record['data_config']['input_size']
    model_args = resolve_model_input_args(
        record['model'],
        {'img_size': args.get('img_size'), 'input_size': args.get('input_size')},
        **{
            'num_classes': record['num_classes'],
            'in_chans': channels,
            'global_pool': args.get('gp'),
            'bn_eps': args.get('bn_eps'),
            **model_kwargs,
        },
    )
    model = timm.create_model(**model_args)
    # An auxiliary batch norm (--split-bn) sees only augmented training images; the plain model has none.
    state_dict = {k: v for k, v in load_state_dict(str(checkpoint)).items() if '.aux_bn.' not in k}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())
        raise UsageError(f'{checkpoint} does not hold the student of {run.folder}: {reason}') from None
    model.pretrained_cfg = {**model.pretrained_cfg, **dict.fromkeys(_SOURCE_FACTS)}
    return model
