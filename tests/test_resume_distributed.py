"""A run of several processes that SIGTERM stops anywhere and that is started again ends as one that never stopped."""
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from helpers import Process, Run, run_on_ranks, start_on_ranks
from timm.task import ClassificationTask

from timm_kd import loop, process, train
from timm_kd.run.resume import restored_totals

REPOSITORY = Path(__file__).parents[1]

# Batch norm, dropout and stochastic depth in the student: each rank has statistics and random streams of its own.
BASE = (
    '--model test_resnet --num-classes 10 --img-size 32 --device cpu --epochs 2 --batch-size 8 --lr 0.05 '
    '--warmup-epochs 0 --sched-on-updates --drop 0.2 --drop-path 0.2 --reprob 0.3 --workers 0 --resume auto'
)
EMA = '--model-ema --model-ema-decay 0.9'
MIXED = '--replayable-data --no-prefetcher --mixup 0.5'


def train_and_stop(place: str, ranks: tuple[int, ...], argv: list[str]) -> None:
    """Trains, and gets SIGTERM in epoch 1, on some ranks alone, after an update or before a pass of validation."""
    def stop() -> None:
        if int(os.environ['RANK']) in ranks:
            os.kill(os.getpid(), signal.SIGTERM)

    after_update, validate = loop.Loop._after_update, loop.Loop._validate_model

    def stopped_after_update(self, progress):
        if progress.epoch == 1 and place == f'update {progress.update_idx}':
            stop()
        after_update(self, progress)

    def stopped_validate(self, epoch, model, name):
        if epoch == 1 and place == name:
            stop()
        return validate(self, epoch, model, name)

    loop.Loop._after_update, loop.Loop._validate_model = stopped_after_update, stopped_validate
    if int(os.environ['WORLD_SIZE']) > 2:
        # DDP lays its gradient buckets out anew after its first step, and the last bits of a sum of three or more
        # depend on the layout: with this argument, the first one stays.
        prepare = ClassificationTask.prepare_distributed
        ClassificationTask.prepare_distributed = partialmethod(prepare, find_unused_parameters=True)
    train.main(argv)


class Runs:
    """Runs of one command on several ranks, by the names of their experiments."""

    def __init__(self, digits: Path, output: Path, flags: str, world_size: int = 2):
        self.output = output
        self.argv = [str(digits), *BASE.split(), *flags.split(), '--output', str(output)]
        self.world_size = world_size

    def start(self, name: str, place: str = 'nowhere', ranks: tuple[int, ...] = ()) -> list[Process]:
        args = (place, ranks, [*self.argv, '--experiment', name])
        runs = start_on_ranks(train_and_stop, args, self.output / f'{name}.printed', self.world_size)
        for run in runs:
            run.wait(300)
        return runs

    def stop(self, name: str, place: str, ranks: tuple[int, ...]) -> None:
        runs = self.start(name, place, ranks)
        assert [run.wait() for run in runs] == [143] * len(runs), [run.stderr for run in runs]

    def finish(self, name: str) -> list[Process]:
        runs = self.start(name)
        assert [run.wait() for run in runs] == [0] * len(runs), [run.stderr for run in runs]
        return runs

    def copy(self, name: str, to: str) -> None:
        shutil.copytree(self.output / name, self.output / to)

    def assert_same(self, first: str, second: str) -> None:
        assert (self.output / first / 'summary.csv').read_text() == (self.output / second / 'summary.csv').read_text()
        one, two = (Run(self.output / name).checkpoint() for name in (first, second))
        assert one.keys() == two.keys()
        for key in {'state_dict', 'state_dict_ema'} & set(one):
            for name in one[key]:
                assert torch.equal(one[key][name], two[key][name]), f'{key} {name}'


@pytest.fixture(scope='module')
def runs_of(digits, tmp_path_factory) -> Callable[..., Runs]:
    """Runs with given flags, the uninterrupted one done."""
    known = {}

    def get(flags: str, world_size: int = 2) -> Runs:
        key = flags, world_size
        if key not in known:
            known[key] = Runs(digits, tmp_path_factory.mktemp('runs'), *key)
            known[key].finish('whole')
        return known[key]
    return get


@pytest.fixture(scope='module')
def stopped(runs_of) -> Runs:
    """Runs with one, `stopped`, of which SIGTERM reached a single rank in the middle of an epoch."""
    runs = runs_of(f'{MIXED} {EMA}')
    runs.stop('stopped', 'update 2', (1,))
    return runs


def test_run_stopped_on_one_rank_ends_as_the_whole_one(stopped):
    stopped.copy('stopped', 'resumed')
    assert 'recovery-1-3.pth.tar' in stopped.finish('resumed')[0].stderr
    stopped.assert_same('whole', 'resumed')


def test_run_stopped_in_validation_on_one_rank_ends_as_the_whole_one(stopped):
    stopped.stop('validated', 'Test', (1,))
    stopped.finish('validated')
    stopped.assert_same('whole', 'validated')


def test_run_resumed_by_another_number_of_processes_goes_on_from_the_same_place(stopped):
    stopped.copy('stopped', 'alone')
    alone = Runs(Path(stopped.argv[0]), stopped.output, f'{MIXED} {EMA} --log-interval 1', world_size=1)
    log = alone.finish('alone')[0].stderr
    assert 'the checkpoint is of 2 processes, this run has 1' in log
    assert 'Train: 1 [   7/20' not in log and 'Train: 1 [   8/20' in log  # 4 of 10 batches are 8 of 20


# Where epoch 1 (updates 0 to 9, then validation) gets the signal, and on which ranks.
STOPS = [('update 2', (0, 1)), ('update 8', (0,)), ('update 9', (0, 1)), ('Test', (0, 1)), ('Test (EMA)', (0,))]
COMMANDS = {
    (MIXED, 2): STOPS[:4],
    (f'{MIXED} {EMA}', 2): STOPS,
    (f'{MIXED} {EMA} --grad-accum-steps 2 --batch-size 4', 2): STOPS,
    (f'{MIXED} {EMA} --dist-bn= --no-ddp-bb', 2): STOPS,
    (f'{MIXED} --crops-per-image 2', 2): [('update 2', (1,))],
    (f'{MIXED} {EMA}', 3): [('update 2', (2,)), ('Test', (0, 1, 2)), ('Test (EMA)', (2,))],
    (f'--mixup 0.5 {EMA} --recovery-interval 3', 2): STOPS,  # goes on from the last finished epoch
}


@pytest.mark.soak
@pytest.mark.parametrize('flags, world_size, place, ranks', [
    (*command, *stop) for command, stops in COMMANDS.items() for stop in stops
])
def test_run_stopped_anywhere_ends_as_the_whole_one(runs_of, flags, world_size, place, ranks):
    runs = runs_of(flags, world_size)
    name = f'{place} {ranks}'
    runs.stop(name, place, ranks)
    runs.finish(name)
    runs.assert_same('whole', name)


@pytest.mark.soak
@pytest.mark.parametrize('flags', ['--val-interval 2 --epochs 4', '--dist-bn= --no-ddp-bb'])
def test_ranks_take_up_their_own_batch_norm_after_a_finished_epoch(runs_of, flags):
    # Without --replayable-data a run goes on from last.pth.tar, whose epoch left the ranks with different statistics.
    runs = runs_of(f'--mixup 0.5 {EMA} {flags}')
    runs.stop('stopped', 'update 2', (0, 1))
    runs.finish('stopped')
    runs.assert_same('whole', 'stopped')


@pytest.mark.soak
@pytest.mark.parametrize('flags', [MIXED, f'{MIXED} {EMA}'], ids=['mixed', 'ema'])
def test_sigterm_to_torchrun_stops_all_ranks_with_143_and_a_recovery_file(runs_of, flags):
    runs = runs_of(flags)
    shim = runs.output / 'shim.py'
    shim.write_text(
        'import os, signal, sys\n'
        f'sys.path.insert(0, {str(REPOSITORY)!r})\n'
        'from timm_kd import loop, train\n'
        'after_update = loop.Loop._after_update\n'
        'def terminate_torchrun(self, progress):\n'
        '    if progress.epoch == 1 and progress.update_idx == 2:\n'
        '        if self.process.primary:\n'
        '            os.kill(os.getppid(), signal.SIGTERM)\n'
        '        while not self.stop.received:\n'
        '            os.sched_yield()\n'
        '    after_update(self, progress)\n'
        'loop.Loop._after_update = terminate_torchrun\n'
        'try:\n'
        '    train.main()\n'
        'except SystemExit as end:\n'
        f'    open({str(runs.output)!r} + "/code-" + os.environ["RANK"], "w").write(str(end.code))\n'
        '    raise\n'
    )
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
        str(shim), *runs.argv, '--experiment', 'torchrun',
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=400)
    assert done.returncode != 0
    assert [(runs.output / f'code-{rank}').read_text() for rank in range(2)] == ['143', '143'], done.stderr
    assert 'recovery-1-3.pth.tar' in runs.finish('torchrun')[0].stderr
    runs.assert_same('whole', 'torchrun')


def check_with_a_signal(folder: Path) -> None:
    """Checks until the ranks stop; rank 1 gets SIGTERM before check 3."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    own = process.Process(torch.device('cpu'), rank, world_size=3, group=torch.distributed.new_group())
    with process.AgreedStop(own) as stop:
        number = 0
        while not stop.check():
            number += 1
            if rank == 1 and number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    (folder / f'stopped-{rank}').write_text(str(number))
    torch.distributed.destroy_process_group()


def test_ranks_stop_at_the_same_check_one_after_the_signal(tmp_path):
    run_on_ranks(check_with_a_signal, (tmp_path,), tmp_path, world_size=3)
    assert [(tmp_path / f'stopped-{rank}').read_text() for rank in range(3)] == ['4', '4', '4']


def test_totals_of_two_ranks_are_shared_by_four():
    ranks = [{'totals': {'names': ['loss'], 'sums': [total], 'count': 16}} for total in (32.0, 48.0)]
    shares = [restored_totals(ranks, rank, world_size=4) for rank in range(4)]
    assert shares == [{'names': ['loss'], 'sums': [20.0], 'count': 8.0}] * 4
