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
from ..task import KDTask
from ..version import __version__

TIMM_COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr')


def read_run_id(folder: str | Path) -> str | None:
    """Return the id of the run that a folder belongs to, or None for a folder that this script has not written.

    Raises:
        UsageError: If its run.json is another program's.
    """
    path = Path(folder, 'run.json')
    try:
        return json.loads(path.read_text())['run_id'] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'--experiment: {path} is not of this script: remove it, or take another name.') from error


def read_timing(folder: str | Path, before: int) -> list[dict[str, float]]:
    """Return what the record of a folder says of the time that its epochs before a given one took."""
    path = Path(folder, 'run.json')
    timing = json.loads(path.read_text()).get('timing', []) if path.exists() else []
    return [epoch for epoch in timing if epoch['epoch'] < before]


class RunRecord:
    """The content of run.json.

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

    def __init__(
            self,
            run_id: str,
            argv: list[str],
            student: dict[str, Any],
            task: nn.Module,
            kd: KDSettings | None,
            eval_metric: str,
            num_epochs: int,
            timing: Sequence[dict[str, float]] = (),
    ):
        self.content: dict[str, Any] = {
            'run_id': run_id,
            'timm_kd': __version__,
            'timm': timm.__version__,
            'torch': torch.__version__,
            'command': shlex.join(['train-kd', *argv]),
            'student': student,
            'teacher': None,
            'loss': _loss_record(kd, task) if kd is not None else None,
            'eval_metric': eval_metric,
            'num_epochs': num_epochs,
            'best': None,
            'timing': list(timing),
        }
        teacher = getattr(task, 'teacher', None)
        if teacher is not None:
            self.content['teacher'] = [
                {
                    'source': member.source,
                    'model': member.model_name,
                    'parameters': member.num_params,
                    'top1': None,
                    'top5': None,
                }
                for member in teacher.members
            ]

    def set_teacher_metrics(self, metrics: list[dict[str, float]]) -> None:
        """Note what each teacher reaches on the validation set."""
        for teacher, result in zip(self.content['teacher'], metrics, strict=True):
            teacher.update(top1=result['top1'], top5=result['top5'])

    def add_epoch(self, epoch: int, seconds: float, train_seconds: float, images: int) -> None:
        """Note the seconds of an epoch, those of its training alone, and how many images that was on."""
        timing = {'epoch': epoch, 'seconds': round(seconds, 3), 'train_seconds': round(train_seconds, 3)}
        self.content['timing'].append({**timing, 'images': images})

    def set_best(self, epoch: int | None, metric: float | None) -> None:
        """Note the best epoch by the run's metric."""
        if metric is not None:
            self.content['best'] = {'epoch': epoch, 'metric': metric}

    def read(self, folder: str | Path) -> None:
        """Take the content that a finished run left."""
        path = Path(folder, 'run.json')
        if path.exists():
            self.content = json.loads(path.read_text())

    def write(self, folder: str | Path) -> None:
        """Write run.json."""
        write_atomically(Path(folder, 'run.json'), json.dumps(self.content, indent=2) + '\n')


def _loss_record(kd: KDSettings, task: KDTask) -> dict[str, Any]:
    return {
        'name': kd.loss,
        'parameters': {name: getattr(task.kd_loss, name) for name in task.kd_loss.hyper_parameters()},
        'task_loss_weight': kd.task_loss_weight,
        'distill_loss_weight': kd.distill_loss_weight,
        'warmup_epochs': kd.warmup_epochs,
    }


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
        """Add an epoch and returns its row, with the columns in the order of the file."""
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
