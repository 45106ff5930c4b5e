"""Runs of the script that a signal stops at a place of their training, and that are started again."""
import io
import os
import shlex
import signal
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import torch
from helpers import Process, Run, start_on_ranks
from timm.task import ClassificationTask

from timm_kd import loop, train
from timm_kd.run.record import Summary


def at(place: str, epoch: int, act: Callable[[], None]) -> None:
    """Do something in this process at a place of an epoch.

    Args:
        place: 'update N', when it is made; 'Test' or 'Test (EMA)', before that pass of validation; 'row', when that of
            summary.csv is written; 'save', when half of a checkpoint is.
        epoch: The epoch, from 0.
        act: What to do.
    """
    after_update, validate = loop.Loop._after_update, loop.Loop._validate_model
    append, save = Summary.append, torch.save

    def reached(name, current):
        if (name, current) == (place, epoch):
            act()

    def act_after_update(self, progress):
        reached(f'update {progress.update_idx}', progress.epoch)
        after_update(self, progress)

    def act_before_validation(self, current, model, name):
        reached(name, current)
        return validate(self, current, model, name)

    def append_and_act(self, current, *args, **kwargs):
        row = append(self, current, *args, **kwargs)
        reached('row', current)
        return row

    def save_half_and_act(state, path):
        buffer = io.BytesIO()
        save(state, buffer)
        Path(path).write_bytes(buffer.getvalue()[:buffer.tell() // 2])
        reached('save', state['epoch'])
        save(state, path)

    loop.Loop._after_update, loop.Loop._validate_model = act_after_update, act_before_validation
    Summary.append = append_and_act
    if place == 'save':
        torch.save = save_half_and_act


def train_with_signal(place: str, epoch: int, number: int, ranks: tuple[int, ...], argv: list[str]) -> None:
    """Train, and get a signal at a place of an epoch, in some of the processes alone."""
    if int(os.environ.get('RANK', 0)) in ranks:
        at(place, epoch, lambda: os.kill(os.getpid(), number))
    if int(os.environ.get('WORLD_SIZE', 1)) > 2:
        # DDP lays its gradient buckets out anew after its first step, and the last bits of a sum of three or more
        # depend on the layout: with this argument, the first one stays.
        prepare = ClassificationTask.prepare_distributed
        ClassificationTask.prepare_distributed = partialmethod(prepare, find_unused_parameters=True)
    train.main(argv)


class Runs:
    """Runs of one command in one output folder, by the names of their experiments, each in as many processes."""

    def __init__(self, digits: Path, output: Path, flags: str, world_size: int = 1):
        self.output = output
        self.argv = [str(digits), '--output', str(output), '--resume', 'auto', *shlex.split(flags)]
        self.world_size = world_size

    def start(
            self,
            name: str,
            place: str = 'nowhere',
            number: int = signal.SIGTERM,
            *,
            epoch: int = 1,
            ranks: tuple[int, ...] = (0,),
            flags: str = '',
    ) -> list[Process]:
        argv = [*self.argv, '--experiment', name, *shlex.split(flags)]
        args = (place, epoch, number, ranks, argv)
        return start_on_ranks(train_with_signal, args, self.output / f'{name}.printed', self.world_size)

    def stop(self, name: str, place: str, number: int = signal.SIGTERM, **options) -> None:
        """Start a run and have all of its processes stopped by a signal."""
        runs = self.start(name, place, number, **options)
        code = 143 if number == signal.SIGTERM else -number
        assert [run.wait(300) for run in runs] == [code] * len(runs), [run.stderr for run in runs]

    def finish(self, name: str) -> Process:
        """Start a run, for the first time or again, and let it come to its end; return the primary process."""
        runs = self.start(name)
        assert [run.wait(300) for run in runs] == [0] * len(runs), [run.stderr for run in runs]
        return runs[0]

    def run(self, name: str) -> Run:
        """Return what a run has left behind."""
        return Run(self.output / name)

    def printed(self, name: str) -> str:
        """Return what the primary process of the last run of that name printed."""
        return (self.output / f'{name}.printed' / 'rank-0' / 'stdout').read_text()

    def assert_same(self, first: str, second: str) -> None:
        """Compare results, names of the files, and weights of two finished runs, to the bit."""
        assert (self.output / first / 'summary.csv').read_bytes() == (self.output / second / 'summary.csv').read_bytes()
        files = [sorted(path.name for path in (self.output / name).glob('[clm]*')) for name in (first, second)]
        assert files[0] == files[1]
        one, two = (self.run(name).checkpoint() for name in (first, second))
        assert one.keys() == two.keys()
        for key in {'state_dict', 'state_dict_ema'} & set(one):
            for name in one[key]:
                assert torch.equal(one[key][name], two[key][name]), f'{key} {name}'
