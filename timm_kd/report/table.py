"""The table of groups as Markdown, CSV and an HTML page."""
import csv
import io
import os
from collections.abc import Container
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from .groups import Row, Spread


def markdown_table(rows: list[Row]) -> str:
    """Return the table in Markdown, aligned so that a terminal shows it as well."""
    head = _columns(rows)
    right = {name for name in head if name in rows[0].figures or name == 'seeds'}
    return aligned(head, [_texts(row, head) for row in rows], right)


def aligned(head: list[str], rows: list[list[str]], right: Container[str] = ()) -> str:
    """Return a Markdown table whose columns are as wide as their widest cell.

    Args:
        head: The names of the columns.
        rows: The cells of each row.
        right: Columns whose cells stand to the right.
    """
    cells = [head, *([text.replace('|', r'\|') for text in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ['-' * (width - 1) + (':' if name in right else '-') for name, width in zip(head, widths, strict=True)]

    def line(texts: list[str]) -> str:
        padded = (text.rjust(width) if name in right else text.ljust(width)
                  for name, text, width in zip(head, texts, widths, strict=True))
        return f'| {" | ".join(padded)} |\n'

    return ''.join(map(line, [head, rule, *cells[1:]]))


def csv_table(rows: list[Row]) -> str:
    """Return the table as CSV, mean and deviation of each figure in columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text)
    parts = (part for name in rows[0].figures for part in (name, f'{name} ±'))
    writer.writerow([*_settings(rows[0]), 'seeds', 'epochs', *parts])
    for row in rows:
        numbers = [part for spread in row.figures.values() for part in _numbers(spread)]
        writer.writerow([*_differences(row), len(row.group.runs), row.group.state, *numbers])
    return text.getvalue()


def html_page(rows: list[Row], path: Path, title: str, note: str, problems: list[str], svg: str | None) -> str:
    """Return one page without scripts or styles from elsewhere.

    Args:
        rows: The table.
        path: Where the page will lie; the links to the runs' folders start there.
        title: Its title.
        note: What the figures are.
        problems: Sentences on folders that could not be read.
        svg: The curves, or None for none.
    """
    head = _columns(rows)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )
    return environment.get_template('page.html.jinja').render(
        title=title,
        note=note,
        problems=problems,
        svg=svg,
        columns=[{'name': name, 'numeric': name in rows[0].figures or name == 'seeds'} for name in head],
        rows=[
            [{'text': text, 'value': _sorted_by(row, name, text)}
             for name, text in zip(head, _texts(row, head), strict=True)]
            for row in rows
        ],
        groups=[{'label': row.group.label, 'runs': [_run_entry(run, path) for run in row.group.runs]} for row in rows],
    )


def _columns(rows: list[Row]) -> list[str]:
    """Return the names of the columns; a figure that no group has is left out."""
    known = [name for name in rows[0].figures if any(row.figures[name] for row in rows)]
    return [*_settings(rows[0]), 'seeds', 'epochs', *known]


def _settings(row: Row) -> list[str]:
    return list(row.group.different) or ['run']


def _differences(row: Row) -> list[str]:
    """Return what tells the group from the others; a run without flags has its folder's name alone."""
    if not row.group.settings or not row.group.different:
        return [row.group.label, *[''] * (len(_settings(row)) - 1)]
    return list(row.group.different.values())


def _texts(row: Row, head: list[str]) -> list[str]:
    figures = [str(row.figures[name] or '') for name in head if name in row.figures]
    return [*_differences(row), str(len(row.group.runs)), row.group.state, *figures]


def _sorted_by(row: Row, name: str, text: str) -> Any:
    """Return what the page sorts a cell by: the mean behind a figure, or the text."""
    if name not in row.figures:
        return text
    return row.figures[name].mean if row.figures[name] else ''


def _numbers(spread: Spread | None) -> tuple[Any, Any]:
    return ('', '') if spread is None else (spread.mean, '' if spread.deviation is None else spread.deviation)


def _run_entry(run: Any, path: Path) -> dict[str, Any]:
    try:
        link = quote(os.path.relpath(run.folder.resolve(), path.resolve().parent))
    except ValueError:  # another drive on Windows
        link = run.folder.resolve().as_uri()
    return {'folder': run.folder, 'link': link, 'state': run.state, 'command': run.record.get('command')}
