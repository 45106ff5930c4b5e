"""Runs of the script in this process, and what they leave behind."""
import argparse
import contextlib
import csv
import io
import json
import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch

from timm_kd.train import main

BASE = (
    '--model test_resnet --num-classes 10 --img-size 32 --device cpu --epochs 1 --batch-size 32 --workers 0 '
    '--opt adamw --lr 3e-3 --warmup-epochs 0 --log-interval 2'
)
STILL = '--opt momentum --lr 1e-30'  # no weight moves: every loss is a function of the batch alone


@dataclass
class Run:
    """What a run leaves behind."""
    folder: Path
    result: dict = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    exit_code: int = 0
    error: str = ''

    @property
    def rows(self) -> list[dict[str, float]]:
        """summary.csv, in numbers."""
        with open(self.folder / 'summary.csv', newline='') as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    @property
    def record(self) -> dict:
        """run.json."""
        return json.loads((self.folder / 'run.json').read_text())

    def checkpoint(self, name: str = 'last.pth.tar') -> dict:
        """A checkpoint, read as anybody may read it."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(self.folder / name, weights_only=True)


def run_script(flags: str, data: Path, output: Path, name: str = 'run') -> Run:
    """Runs the script in this process."""
    run = Run(output / name)
    handler = logging.Handler()
    handler.emit = lambda record: run.log.append(record.getMessage())
    logging.root.addHandler(handler)
    argv = [str(data), *shlex.split(BASE), '--output', str(output), '--experiment', name, *shlex.split(flags)]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main(argv)
        except SystemExit as stop:
            run.exit_code = stop.code
        finally:
            logging.root.removeHandler(handler)
    run.error = stderr.getvalue()
    if not run.exit_code:
        run.result = json.loads(stdout.getvalue().removeprefix('--result\n'))
    return run
