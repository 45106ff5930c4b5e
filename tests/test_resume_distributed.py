"""A run of several processes that SIGTERM stops anywhere and that is started again ends as one that never stopped."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import run_on_ranks, run_torchrun
from stopped import Runs

from timm_kd import loop, process, train
from timm_kd.run.resume import restored_totals

# Batch norm, dropout and stochastic depth in the student: each rank has statistics and random streams of its own.
FLAGS = (
    '--model test_resnet --num-classes 10 --img-size 32 --device cpu --epochs 2 --batch-size 8 --lr 0.05 '
    '--warmup-epochs 0 --sched-on-updates --drop 0.2 --drop-path 0.2 --reprob 0.3 --workers 0'
)
EMA = '--model-ema --model-ema-decay 0.9'
MIXED = f'{FLAGS} --replayable-data --no-prefetcher --mixup 0.5'


@pytest.fixture(scope='module')
def stopped(runs_of) -> Runs:
    """Runs with one, `stopped`, of which SIGTERM reached a single rank in the middle of an epoch."""
    runs = runs_of(f'{MIXED} {EMA}', 2)
    runs.stop('stopped', 'update 2', ranks=(1,))
    return runs


def test_run_stopped_on_one_rank_ends_as_the_whole_one(stopped):
    shutil.copytree(stopped.output / 'stopped', stopped.output / 'resumed')
    assert 'recovery-1-3.pth.tar' in stopped.finish('resumed').stderr
    stopped.assert_same('whole', 'resumed')


def test_run_stopped_in_validation_on_one_rank_ends_as_the_whole_one(stopped):
    stopped.stop('validated', 'Test', ranks=(1,))
    stopped.finish('validated')
    stopped.assert_same('whole', 'validated')


def test_run_resumed_by_another_number_of_processes_goes_on_from_the_same_place(stopped, digits):
    shutil.copytree(stopped.output / 'stopped', stopped.output / 'alone')
    log = Runs(digits, stopped.output, f'{MIXED} {EMA} --log-interval 1').finish('alone').stderr
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
    (f'{FLAGS} --mixup 0.5 {EMA} --recovery-interval 3', 2): STOPS,  # goes on from the last finished epoch
}


@pytest.mark.soak
@pytest.mark.parametrize('flags, world_size, place, ranks', [
    (*command, *stop) for command, stops in COMMANDS.items() for stop in stops
])
def test_run_stopped_anywhere_ends_as_the_whole_one(runs_of, flags, world_size, place, ranks):
    runs = runs_of(flags, world_size)
    name = f'{place} {ranks}'
    runs.stop(name, place, ranks=ranks)
    runs.finish(name)
    runs.assert_same('whole', name)


@pytest.mark.soak
@pytest.mark.parametrize('flags', ['--val-interval 2 --epochs 4', '--dist-bn= --no-ddp-bb'])
def test_ranks_take_up_their_own_batch_norm_after_a_finished_epoch(runs_of, flags):
    # Without --replayable-data a run goes on from last.pth.tar, whose epoch left the ranks with different statistics.
    runs = runs_of(f'{FLAGS} --mixup 0.5 {EMA} {flags}', 2)
    runs.stop('stopped', 'update 2', ranks=(0, 1))
    runs.finish('stopped')
    runs.assert_same('whole', 'stopped')


def train_and_terminate_torchrun(codes: Path, argv: list[str]) -> None:
    """Train, send SIGTERM to torchrun in epoch 1, and wait for the one that it passes on; leave the exit code."""
    after_update = loop.Loop._after_update

    def terminate_torchrun(self, progress):
        if (progress.epoch, progress.update_idx) == (1, 2):
            if self.process.primary:
                os.kill(os.getppid(), signal.SIGTERM)
            while not self.stop.received:
                os.sched_yield()
        after_update(self, progress)

    loop.Loop._after_update = terminate_torchrun
    try:
        train.main(argv)
    except SystemExit as end:
        (codes / f'code-{os.environ["RANK"]}').write_text(str(end.code))
        raise


@pytest.mark.soak
@pytest.mark.parametrize('flags', [MIXED, f'{MIXED} {EMA}'], ids=['mixed', 'ema'])
def test_sigterm_to_torchrun_stops_all_ranks_with_143_and_a_recovery_file(runs_of, flags):
    runs = runs_of(flags, 2)
    argv = [*runs.argv, '--experiment', 'torchrun']
    done = run_torchrun(train_and_terminate_torchrun, (runs.output, argv), runs.output)
    assert done.returncode != 0
    assert [(runs.output / f'code-{rank}').read_text() for rank in range(2)] == ['143', '143'], done.stderr
    assert 'recovery-1-3.pth.tar' in runs.finish('torchrun').stderr
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
    shares = [restored_totals(ranks, process.Process(torch.device('cpu'), rank, world_size=4)) for rank in range(4)]
    assert shares == [{'names': ['loss'], 'sums': [20.0], 'count': 8.0}] * 4
