"""The table of groups as Markdown, CSV and an HTML page."""
import csv
import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from .groups import Row
from .runs import Run


def markdown_table(rows: list[Row]) -> str:
    """Return the table in Markdown, aligned so that a terminal shows it as well."""
    head, cells = _table(rows)
    right = _numeric(cells)
    texts = [head, *([str(cell).replace('|', r'\|') for cell in line] for line in cells)]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    padded = [
        [text.rjust(width) if numeric else text.ljust(width)
         for text, width, numeric in zip(line, widths, right, strict=True)]
        for line in texts
    ]
    padded.insert(1, ['-' * (width - 1) + (':' if numeric else '-')
                      for width, numeric in zip(widths, right, strict=True)])
    return ''.join(f'| {" | ".join(line)} |\n' for line in padded)


def csv_table(rows: list[Row]) -> str:
    """Return the table as CSV, mean and deviation of each figure in columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text)
    head, cells = _table(rows, every_figure=True)
    first = len(head) - len(rows[0].figures)  # the figures are the last columns
    writer.writerow([*head[:first], *(part for name in head[first:] for part in (name, f'{name} ±'))])
    for line in cells:
        parts = (part for cell in line[first:] for part in ((cell.mean, cell.deviation) if cell else ('', '')))
        writer.writerow([*line[:first], *parts])
    return text.getvalue()


def html_page(rows: list[Row], path: Path, title: str, note: str, problems: list[str], svg: str | None) -> str:
    """Return a page that needs nothing from elsewhere; its links to the runs are relative to its `path`."""
    head, cells = _table(rows)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )
    return environment.get_template('page.html.jinja').render(
        title=title,
        note=note,
        problems=problems,
        svg=svg,
        columns=[{'name': name, 'numeric': numeric} for name, numeric in zip(head, _numeric(cells), strict=True)],
        # The page sorts by the value of a cell: by the mean of a figure.
        rows=[[{'text': cell, 'value': getattr(cell, 'mean', cell)} for cell in line] for line in cells],
        groups=[{'label': row.group.label, 'runs': [_run_entry(run, path) for run in row.group.runs]} for row in rows],
    )


def _table(rows: list[Row], every_figure: bool = False) -> tuple[list[str], list[list[Any]]]:
    """Return the names of the columns and the cells of each row; figures that no group has only if `every_figure`.

    A cell is text, a count, or the `Spread` of a figure, '' where it is not known.
    """
    flags = list(rows[0].group.different) or ['run']
    figures = [name for name in rows[0].figures if every_figure or any(row.figures[name] for row in rows)]
    cells = []
    for row in rows:
        group = row.group
        # A group without flags to show (no group differs in any, or it ended before it wrote them) goes by its label.
        told = [*group.different.values()] if group.settings and group.different else [group.label]
        told += [''] * (len(flags) - len(told))
        cells.append([*told, len(group.runs), group.state, *(row.figures[name] or '' for name in figures)])
    return [*flags, 'seeds', 'epochs', *figures], cells


def _numeric(cells: list[list[Any]]) -> list[bool]:
    """Return which columns hold numbers, and stand to the right."""
    return [any(not isinstance(cell, str) for cell in column) for column in zip(*cells, strict=True)]


def _run_entry(run: Run, path: Path) -> dict[str, Any]:
    try:
        link = quote(os.path.relpath(run.folder.resolve(), path.resolve().parent))
    except ValueError:  # another drive on Windows
        link = run.folder.resolve().as_uri()
    return {'folder': run.folder, 'link': link, 'state': run.state, 'command': run.record.get('command')}
