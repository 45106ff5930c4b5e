"""What a run writes about itself: run.json (for `--resume auto` and the model card) and summary.csv."""
import csv
import io
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_atomically

TIMM_COLUMNS = (
    'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'eval_map', 'eval_micro_f1', 'eval_macro_f1',
    'eval_sample_f1', 'lr',
)


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Return the run.json of a folder, or None for a folder that this script has not written.

    Raises:
        UsageError: If its run.json is another program's.
    """
    path = Path(folder, 'run.json')
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or 'run_id' not in record:
        raise UsageError(f'--experiment: {path} is not of this script: remove it, or take another name.')
    return record


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    write_atomically(Path(folder, 'run.json'), json.dumps(record, indent=2) + '\n')


class Summary:
    """The table of a run's epochs; the file is written anew with each row, so that no kill leaves half a row.

    Args:
        path: The CSV file.
        start_epoch: The first epoch that the run trains. Rows of it and of later epochs were written by an interrupted
            or an older run, and are dropped.
    """

    def __init__(self, path: str | Path, start_epoch: int = 0):
        self.path = Path(path)
        self.rows: list[dict[str, object]] = []
        if start_epoch and self.path.exists():
            with open(self.path, newline='') as file:
                self.rows = [row for row in csv.DictReader(file) if int(float(row['epoch'])) < start_epoch]
        elif self.path.exists():
            self.path.unlink()

    def append(self, epoch: int, train: dict[str, float], eval: dict[str, float] | None, lr: float) -> dict:
        """Add an epoch and return its row, with the columns in the order of the file."""
        values = {'epoch': epoch, **{f'train_{name}': value for name, value in train.items()}}
        values.update({f'eval_{name}': value for name, value in (eval or {}).items()})
        values['lr'] = lr
        columns = [name for name in TIMM_COLUMNS if name in values]
        columns += [name for name in values if name.startswith('eval_') and name not in columns]
        columns += [name for name in values if name not in columns]
        row = {name: values[name] for name in columns}
        self.rows.append(row)
        text = io.StringIO()
        fieldnames = list(dict.fromkeys(name for row in reversed(self.rows) for name in row))
        writer = csv.DictWriter(text, fieldnames, restval='')
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())
        return row
