"""The folder of a run, read back: of this script or of timm's, finished or not."""
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..errors import UsageError, shortened
from ..files import FolderLock

_MARKS = 'summary.csv', 'args.yaml', 'run.json'
_Loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)  # the one in C reads a hundred files of flags in a second


@dataclass(frozen=True)
class Run:
    """What a run has left so far.

    Attributes:
        folder: Where it lies.
        args: Every flag by its dest name (args.yaml); empty for a run that ended before it wrote them.
        rows: One dict an epoch (summary.csv), without the columns that are blank.
        record: run.json; empty for a run of timm's script.
    """
    folder: Path
    args: dict[str, Any]
    rows: list[dict[str, float]]
    record: dict[str, Any]

    @property
    def epochs_done(self) -> int:
        """Number of epochs that are trained and validated."""
        return int(self.rows[-1]['epoch']) + 1 if self.rows else 0

    @property
    def epochs_planned(self) -> int | None:
        """Number of epochs that the run was started for, or None where its flags are not known."""
        if 'num_epochs' in self.record:
            return self.record['num_epochs']
        if 'epochs' not in self.args:  # timm's script writes no run.json, and its schedule is one cycle by default
            return None
        scheduled = self.args['epochs'] + (self.args.get('cooldown_epochs') or 0)
        return min(scheduled, self.args.get('stop_epoch') or scheduled)

    @property
    def state(self) -> str:
        """`done`, `in progress`, `stopped`, or `empty` for a run without an epoch."""
        if self.epochs_planned is not None and self.epochs_done >= self.epochs_planned:
            return 'done'
        if FolderLock.is_held(self.folder):
            return 'in progress'
        return 'stopped' if self.rows else 'empty'

    @property
    def teacher_top1(self) -> float | None:
        """Top-1 of the teacher on the validation set in percent, the mean of several; None where it is not known."""
        known = [teacher['top1'] for teacher in self.record.get('teacher') or () if teacher.get('top1') is not None]
        return fmean(known) if known else None

    @property
    def images_per_second(self) -> float | None:
        """Training images a second over all epochs and ranks, or None where it was not recorded."""
        epochs = self.record.get('timing') or ()
        seconds = sum(epoch['train_seconds'] for epoch in epochs)
        return sum(epoch['images'] for epoch in epochs) / seconds if seconds else None

    def epoch(self, number: int | None) -> dict[str, float]:
        """Return the row of summary.csv of an epoch, empty where there is none."""
        return next((row for row in self.rows if row['epoch'] == number), {})

    def hours(self) -> dict[int, float]:
        """Return the hours of wall clock from the start of training to the end of each epoch, pauses left out."""
        total, hours = 0.0, {}
        for epoch in self.record.get('timing') or ():
            total += epoch['seconds']
            hours[epoch['epoch']] = total / 3600
        return hours


def find_runs(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """Read the runs in some folders, each of which is the folder of a run or holds such folders.

    Returns:
        The runs in the order of their paths, and a sentence on each folder that could not be read.
    """
    runs, problems = {}, []
    for path in paths:
        folders = [path] if _is_run(path) else sorted(filter(_is_run, path.glob('*')))
        if not folders:
            problems.append(f'{path}: {"no run in it" if path.is_dir() else "no such folder"}.')
        for folder in folders:
            try:
                runs.setdefault(folder.resolve(), read_run(folder))
            except UsageError as error:
                problems.append(str(error))
    return list(runs.values()), problems


def read_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        UsageError: If a file of the folder is damaged.
    """
    return Run(
        folder,
        args=_read(folder / 'args.yaml', lambda text: yaml.load(text, _Loader), dict),
        rows=_read(folder / 'summary.csv', _read_rows, list),
        record=_read(folder / 'run.json', json.loads, dict),
    )


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _MARKS)


def _read(path: Path, parse: Any, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = parse(path.read_text(encoding='utf-8'))
        if not isinstance(content, kind):
            raise ValueError(f'it holds a {type(content).__name__}')
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f'{path} is damaged: {shortened(error)}.') from error
    return content


def _read_rows(text: str) -> list[dict[str, float]]:
    reader, rows = csv.DictReader(text.splitlines()), []
    if text and 'epoch' not in reader.fieldnames:
        raise ValueError('its first line names no epoch')
    for number, row in enumerate(reader, start=2):
        if None in row or not row['epoch']:
            raise ValueError(f'line {number} has other columns than the first line')
        rows.append({column: float(value) for column, value in row.items() if value})
    return rows
