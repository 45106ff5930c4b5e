"""From a run to the folder that goes to the Hub, complete and loadable by timm from disk."""
import logging
from pathlib import Path

import timm
import yaml
from timm.models import load_state_dict, resolve_model_input_args, save_for_hf
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from ..errors import UsageError, shortened
from ..report.curves import PANELS, draw_curves, save_png
from ..report.groups import Group
from ..report.runs import Run, read_run
from .card import Publication, model_card
from .scrub import scrub

_logger = logging.getLogger(__name__)

_CURVES = {'train_loss': 'training loss', **PANELS}

# Facts of the weights that timm publishes for the architecture; none of them holds for the student's.
_SOURCE_FACTS = (
    'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
    'label_descriptions',
)


def export_run(run: Run, publication: Publication, checkpoint: str | None = None) -> list[Path]:
    """Write `RUN_DIR/hub/`: weights (the best, or those of `checkpoint`), timm's config, card, flags, curves.

    Returns:
        The files written, which are the files to upload: whatever else lies in the folder stays there.

    Raises:
        UsageError: The checkpoint is missing, or is not one of this run.
    """
    folder = run.folder / 'hub'
    folder.mkdir(exist_ok=True)
    path = _find_checkpoint(run, checkpoint)
    student = _load_student(run, path)
    state = load_checkpoint_metadata(path)
    epoch, is_ema = state.get('epoch'), state.get('state_dict_ema') is not None
    _logger.info(f'Exporting {path.name} (epoch {epoch}{", EMA weights" if is_ema else ""}) to {folder}')

    class_names = run.record['student'].get('class_names')
    save_for_hf(
        student,
        folder,
        model_config={'label_names': class_names} if class_names else None,
        safe_serialization=True,
        data_config=run.record['student']['data_config'],
    )
    names = ['model.safetensors', 'config.json', 'README.md', 'args.yaml', 'summary.csv']
    (folder / 'args.yaml').write_text(yaml.safe_dump(scrub(run.args), default_flow_style=False), encoding='utf-8')
    (folder / 'summary.csv').write_bytes((run.folder / 'summary.csv').read_bytes())
    has_curves = _draw_curves(run, folder / 'curves.png')
    if has_curves:
        names.append('curves.png')
    model_card(run, publication, epoch, is_ema, has_curves).save(folder / 'README.md')
    return [folder / name for name in names]


def _load_student(run: Run, checkpoint: Path) -> nn.Module:
    """Return the student with the checkpoint's weights (EMA if tracked), without what timm says of its own weights."""
    record, args = run.record['student'], run.args
    model = timm.create_model(**resolve_model_input_args(
        record['model'],
        {'img_size': args.get('img_size'), 'input_size': args.get('input_size')},
        **{
            'num_classes': record['num_classes'],
            'in_chans': record['data_config']['input_size'][0],
            'global_pool': args.get('gp'),
            'bn_eps': args.get('bn_eps'),
            **(args.get('model_kwargs') or {}),
        },
    ))
    # An auxiliary batch norm (--split-bn) sees only augmented training images; the plain model has none.
    state_dict = {k: v for k, v in load_state_dict(str(checkpoint)).items() if '.aux_bn.' not in k}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise UsageError(f'{checkpoint} does not hold the student of {run.folder}: {shortened(error)}.') from None
    model.pretrained_cfg = {**model.pretrained_cfg, **dict.fromkeys(_SOURCE_FACTS)}
    return model


def _draw_curves(run: Run, path: Path) -> bool:
    """Draw loss, accuracy and agreement over the epochs; return False if there is nothing to draw, or no matplotlib."""
    try:
        figure = draw_curves([Group([run], run.record['student']['model'])], _CURVES, clock=False)
    except ImportError:
        _logger.warning('No curves in the model card: matplotlib is not installed (pip install timm-kd[demo]).')
        return False
    if figure is not None:
        save_png(figure, path)
    return figure is not None


def read_finished_run(folder: str | Path) -> Run:
    """Read the files that the training script leaves in its output folder, all of which a publication needs.

    Raises:
        UsageError: A file is missing, damaged, or not what the script writes.
    """
    missing = [name for name in ('run.json', 'args.yaml', 'summary.csv') if not Path(folder, name).is_file()]
    if missing:
        raise UsageError(f'{folder} is not the output folder of a run: it has no {missing[0]}.')
    run = read_run(Path(folder))
    if not run.record.get('student'):
        raise UsageError(f'{folder} is not the output folder of a run of this script: its run.json names no student.')
    return run


def _find_checkpoint(run: Run, name: str | None) -> Path:
    """Return the checkpoint to publish: `name` (a path, or a file of the run), else the best one, else the last."""
    names = [name] if name else ['model_best.pth.tar', 'last.pth.tar']
    candidates = [folder / file for file in names for folder in (run.folder, Path())]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UsageError(f'{run.folder} has no checkpoint {" or ".join(names)}: name another one.')
    return found
