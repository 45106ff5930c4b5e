"""The training curves of a run as one picture."""

import logging
from pathlib import Path

_logger = logging.getLogger(__name__)


def draw_curves(summary: list[dict[str, float]], path: Path) -> bool:
    """Draws loss, accuracy and agreement with the teacher over the epochs of `summary.csv`, as a PNG.

    Args:
        summary: One dict per epoch; columns that are absent are not drawn.
        path: Where to write the picture.

    Returns:
        Whether there is a picture: none without matplotlib, which is an optional dependency, or without an epoch.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        _logger.warning('No curves in the model card: matplotlib is not installed (pip install timm-kd[demo])')
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
