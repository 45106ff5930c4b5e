"""From a run to the folder that goes to the Hub, complete and loadable by timm from disk."""
import logging
from pathlib import Path

import timm
import yaml
from timm.models import load_state_dict, resolve_model_input_args, save_for_hf
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from ..errors import UsageError, shortened
from .card import Publication, model_card
from .run_files import Run, scrub

_logger = logging.getLogger(__name__)

# Facts of the weights that timm publishes for the architecture; none of them holds for the student's.
_SOURCE_FACTS = (
    'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
    'label_descriptions',
)


def export_run(run: Run, publication: Publication, checkpoint: str | None = None) -> list[Path]:
    """Write `RUN_DIR/hub/`: weights, timm's config, model card, flags, epochs and curves.

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
    has_curves = _draw_curves(run.summary, folder / 'curves.png')
    if has_curves:
        names.append('curves.png')
    model_card(run, publication, epoch, is_ema, has_curves).save(folder / 'README.md')
    return [folder / name for name in names]


def _load_student(run: Run, checkpoint: Path) -> nn.Module:
    """Return the student with the checkpoint's weights (EMA if tracked), and no claim to the origin of any other."""
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


def _draw_curves(summary: list[dict[str, float]], path: Path) -> bool:
    """Draw loss, accuracy and agreement over the epochs; return whether there is anything to draw, and matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        _logger.warning('No curves in the model card: matplotlib is not installed (pip install timm-kd[demo]).')
        return False
    panels = {
        'loss': {'train_loss': 'training', 'eval_loss': 'validation'},
        'percent': {'eval_top1': 'top-1', 'eval_top5': 'top-5', 'eval_agreement': 'agreement with the teacher'},
    }
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    for axes, (unit, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for column, label in columns.items():
            points = [(row['epoch'], row[column]) for row in summary if column in row]
            if points:
                # A single epoch is a point, which a bare line would not show.
                axes.plot(*zip(*points, strict=True), label=label, marker='o' if len(points) == 1 else None)
        axes.set(xlabel='epoch', ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    if not any(axes.lines for axes in figure.axes):
        return False
    figure.savefig(path, dpi=120)
    return True
