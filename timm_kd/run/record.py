"""What a run writes about itself: run.json (for `--resume auto` and the model card) and summary.csv."""
import csv
import io
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..cli import KDSettings
from ..errors import UsageError
from ..files import write_atomically
from ..version import __version__

TIMM_COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr')


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


def read_timing(folder: str | Path, before: int) -> list[dict[str, float]]:
    """Return what the record of a folder says of the time that its epochs before a given one took."""
    timing = (read_record(folder) or {}).get('timing', [])
    return [epoch for epoch in timing if epoch['epoch'] < before]


def run_record(
        run_id: str,
        argv: list[str],
        student: dict[str, Any],
        task: nn.Module,
        kd: KDSettings | None,
        eval_metric: str,
        num_epochs: int,
        timing: Sequence[dict[str, float]] = (),
) -> dict[str, Any]:
    """Return what run.json says when a run starts; `timing`, the teachers' metrics and `best` are filled in later.

    Args:
        run_id: The id that the run's checkpoints bear.
        argv: The command line, without the program's name.
        student: The entry of the student: `model` (the architecture), `parameters` (how many), `num_classes`,
            `data_config` (timm's), `class_names` and `pretrained_source` (where its first weights came from), the last
            two None where there are none.
        task: The task, with the teacher and the loss where there are any.
        kd: The distillation, or None.
        eval_metric: The metric that ranks checkpoints.
        num_epochs: The epochs that the run is started for.
        timing: What the record says of the epochs that an interrupted run has done (`read_timing`).
    """
    teacher = getattr(task, 'teacher', None)
    members = [
        {
            'source': member.source,
            'model': member.model_name,
            'parameters': member.num_params,
            'top1': None,
            'top5': None,
        }
        for member in (teacher.members if teacher is not None else ())
    ]
    loss = None
    if kd is not None:
        loss = {
            'name': kd.loss,
            'parameters': {name: getattr(task.kd_loss, name) for name in task.kd_loss.hyper_parameters()},
            'task_loss_weight': kd.task_loss_weight,
            'distill_loss_weight': kd.distill_loss_weight,
            'warmup_epochs': kd.warmup_epochs,
        }
    return {
        'run_id': run_id,
        'timm_kd': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'command': shlex.join(['train-kd', *argv]),
        'student': student,
        'teacher': members or None,
        'loss': loss,
        'eval_metric': eval_metric,
        'num_epochs': num_epochs,
        'best': None,
        'timing': list(timing),
    }


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
            os.remove(self.path)

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
