"""Compare runs: `python -m timm_kd.report output/train [RUN ...] [--html PAGE] [--png FILE] [--csv FILE]`."""
import argparse
import sys
from pathlib import Path

from ..errors import ExitCode, UsageError
from ..files import print_out
from .curves import draw_curves, save_png, to_svg
from .groups import group_runs, tabulate
from .runs import Run, find_runs
from .table import csv_table, html_page, markdown_table


def main(argv: list[str] | None = None) -> int:
    """Print the table, write what is asked for, and return the exit code: 2 where a folder could not be read."""
    parser = argparse.ArgumentParser(prog='python -m timm_kd.report', description=__doc__, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run, or of several')
    parser.add_argument(
        '--metric', help='column of summary.csv to compare in (eval_top1, or what ranked the checkpoints without it)',
    )
    parser.add_argument(
        '--baseline', type=Path, metavar='RUN',
        help='run of the group to compare with (the group without distillation that is otherwise equal)',
    )
    parser.add_argument('--html', type=Path, metavar='PAGE', help='write one page: table, curves, commands')
    parser.add_argument('--png', type=Path, metavar='FILE', help='write the curves as a picture')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the table as CSV')
    options = parser.parse_args(argv)
    try:
        problems = _report(options)
    except (UsageError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f'timm_kd.report: error: {problem}', file=sys.stderr)
    return ExitCode.USAGE if problems else ExitCode.DONE


def _report(options: argparse.Namespace) -> list[str]:
    runs, problems = find_runs(options.runs)
    if not runs:
        return problems
    metric = options.metric or _usual_metric(runs)
    rows = tabulate(group_runs(runs), metric, options.baseline)
    note = ('Mean ± standard deviation over the seeds of a group; the difference to the baseline ± its standard error. '
            f'Best and last are of the epochs in {metric}.')
    print_out(f'{markdown_table(rows)}\n{note}')
    if options.csv:
        options.csv.write_text(csv_table(rows))
    if options.png or options.html:
        svg = _write_curves(options, rows)
    if options.html:
        title = f'{len(runs)} run{"" if len(runs) == 1 else "s"} compared'
        options.html.write_text(html_page(rows, options.html, title, note, problems, svg), encoding='utf-8')
    return problems


def _usual_metric(runs: list[Run]) -> str:
    columns = {column for run in runs for row in run.rows for column in row}
    own = f'eval_{runs[0].args.get("eval_metric")}'  # of a multi-label run
    return own if 'eval_top1' not in columns and own in columns else 'eval_top1'


def _write_curves(options: argparse.Namespace, rows: list) -> str | None:
    """Write the PNG that is asked for and return the SVG; without matplotlib, say how to get them."""
    try:
        figure = draw_curves([row.group for row in rows])
    except ImportError:
        print("No curves: matplotlib is not installed (pip install 'timm-kd[demo]').", file=sys.stderr)
        return None
    if figure is None:
        print('No curves: no run has an epoch yet.', file=sys.stderr)
        return None
    if options.png:
        save_png(figure, options.png)
    return to_svg(figure) if options.html else None


if __name__ == '__main__':
    sys.exit(main())
