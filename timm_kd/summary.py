"""summary.csv: one row an epoch, timm's columns first."""
import csv
import io
import os
from pathlib import Path

from .files import write_atomically

TIMM_COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr')


class Summary:
    """The table of a run's epochs, rewritten whole with each row, so that no kill leaves half a row.

    Args:
        path: The CSV file.
        start_epoch: Rows at or after this epoch are of an interrupted or an older run, and go.
    """

    def __init__(self, path: str | Path, start_epoch: int = 0):
        self.path = Path(path)
        self.rows: list[dict[str, object]] = []
        if start_epoch and self.path.exists():
            with open(self.path, newline='') as file:
                self.rows = [row for row in csv.DictReader(file) if int(float(row['epoch'])) < start_epoch]
        elif self.path.exists():
            os.remove(self.path)

    def append(self, epoch: int, train: dict[str, float], eval: dict[str, float] | None, lr: float) -> dict:
        """Adds an epoch and returns its row, with the columns in the order of the file."""
        values = {'epoch': epoch, **{f'train_{name}': value for name, value in train.items()}}
        values.update({f'eval_{name}': value for name, value in (eval or {}).items()})
        values['lr'] = lr
        columns = [name for name in TIMM_COLUMNS if name in values]
        columns += [name for name in values if name.startswith('eval_') and name not in columns]
        columns += [name for name in values if name not in columns]
        row = {name: values[name] for name in columns}
        self.rows.append(row)
        self._write()
        return row

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in reversed(self.rows) for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=columns, restval='')
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())
