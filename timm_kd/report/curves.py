"""Curves over epochs and wall clock: a line for each group of runs, its seeds as a band."""
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .groups import Group

# Colours that colour-blind readers tell apart (Okabe and Ito, https://jfly.uni-koeln.de/color), solid, then dashed.
_COLOURS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'
_STYLES = [(colour, style) for style in ('-', '--') for colour in _COLOURS]
_REST = '#999999', '-'
PANELS = {
    'eval_loss': 'validation loss',
    'eval_top1': 'top-1, %',
    'eval_map': 'mean average precision, %',
    'eval_agreement': 'agreement, %',
}
_TEXT = '#010203'  # black to the eye in a PNG; `to_svg` finds it and puts the colour of the page's text in its place


def draw_curves(
        groups: Sequence['Group'],
        columns: dict[str, str] = PANELS,
        clock: bool = True,
) -> 'Figure | None':
    """Draw columns of summary.csv over epochs, and over hours where those were recorded.

    Args:
        groups: The groups; the first twelve have a colour and a place in the legend, the rest are grey.
        columns: Label of each column's axis.
        clock: Whether hours are wanted.

    Returns:
        The figure, or None where no run has an epoch with such a column.

    Raises:
        ImportError: Without matplotlib, which is an extra (`pip install timm-kd[demo]`).
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = {
        column: label for column, label in columns.items()
        if any(column in row for group in groups for run in group.runs for row in run.rows)
    }
    if not shown:
        return None
    timed = clock and any(run.hours() for group in groups for run in group.runs)
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'timm-kd', 'axes.titlesize': 'medium'} | {
        name: _TEXT for name in ('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color')
    }):
        figure = Figure(figsize=(4.6 * len(shown), 3.4 * (1 + timed) + 0.6), layout='constrained', facecolor='none')
        grid = figure.subplots(1 + timed, len(shown), squeeze=False)
        lines = {}
        for row, over_hours in zip(grid, (False, True), strict=False):
            for axes, (column, label) in zip(row, shown.items(), strict=True):
                for number, group in enumerate(groups):
                    line = _draw_group(axes, group, column, number, over_hours)
                    if line is not None and number < len(_STYLES):
                        lines.setdefault(number, line)
                axes.set(xlabel='hours' if over_hours else 'epoch', ylabel=label)
                axes.patch.set_alpha(0)
                axes.grid(alpha=0.3)
        handles = [lines[number] for number in sorted(lines)]
        legend = figure.legend(
            handles, [groups[number].label.replace('$', r'\$') for number in sorted(lines)],
            loc='outside lower center', ncols=1 if len(handles) > 6 else 2, fontsize='small',
        )
        legend.get_frame().set_alpha(0)
    return figure


def _draw_group(axes: 'Axes', group: 'Group', column: str, number: int, over_hours: bool) -> Any:
    """Draw the mean of the seeds that have come as far as each epoch, within their range."""
    colour, style = _STYLES[number] if number < len(_STYLES) else _REST
    values: dict[int, list[float]] = {}
    hours: dict[int, list[float]] = {}
    for run in group.runs:
        times = run.hours() if over_hours else {}
        for row in run.rows:
            epoch = int(row['epoch'])
            if column in row and (epoch in times or not over_hours):
                values.setdefault(epoch, []).append(row[column])
                hours.setdefault(epoch, []).append(times.get(epoch, 0.0))
    if not values:
        return None
    epochs = sorted(values)
    places = [fmean(hours[epoch]) if over_hours else epoch + 1 for epoch in epochs]
    line, = axes.plot(
        places,
        [fmean(values[epoch]) for epoch in epochs],
        color=colour,
        linestyle=style,
        linewidth=1.5,
        marker='o' if len(epochs) == 1 else None,  # a line of one point would not be seen
        zorder=2 if number < len(_STYLES) else 1,
    )
    axes.fill_between(
        places, [min(values[epoch]) for epoch in epochs], [max(values[epoch]) for epoch in epochs],
        color=colour, alpha=0.15, linewidth=0,
    )
    return line


def save_png(figure: 'Figure', path: Path) -> None:
    """Save a figure as a PNG on white."""
    figure.savefig(path, dpi=120, facecolor='white')


def to_svg(figure: 'Figure') -> str:
    """Return a figure as an SVG element whose text has the colour of the page around it."""
    stream = io.StringIO()
    figure.savefig(stream, format='svg', metadata={'Date': None})
    svg = stream.getvalue()
    return svg[svg.index('<svg'):].replace(_TEXT, 'currentColor')
