"""A run that is killed anywhere and started again ends as one that was never interrupted, bit for bit."""
import io
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import Process

from timm_kd import loop, train
from timm_kd.run import record

WITHOUT_REPLAY = ['--workers', '0']
WITH_REPLAY = ['--workers', '2', '--replayable-data']
WITH_CROPS = ['--workers', '1', '--crops-per-image', '4', '--epochs', '4', '--val-interval', '4']


def train_and_die(place: str, epoch: int, argv: list[str]) -> None:
    """Trains, and gets a signal at a place of an epoch."""
    {
        'nowhere': lambda epoch: None,
        'write': _kill_while_writing,
        'summary': _kill_after_summary,
        'step': lambda epoch: _signal_after_step(epoch, signal.SIGKILL),
        'sigterm': lambda epoch: _signal_after_step(epoch, signal.SIGTERM),
        'validation': _terminate_in_validation,
    }[place](epoch)
    train.main(argv)


def _kill_while_writing(epoch: int) -> None:
    save = torch.save

    def save_half(state, path):
        if state['epoch'] == epoch:
            buffer = io.BytesIO()
            save(state, buffer)
            Path(path).write_bytes(buffer.getvalue()[:buffer.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path)

    torch.save = save_half


def _kill_after_summary(epoch: int) -> None:
    append = record.Summary.append

    def append_and_die(self, current, *args, **kwargs):
        row = append(self, current, *args, **kwargs)
        if current == epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    record.Summary.append = append_and_die


def _signal_after_step(epoch: int, number: signal.Signals) -> None:
    after_update = loop.Loop._after_update

    def die_after_update(self, progress):
        if progress.epoch == epoch and progress.update_idx == 2:
            os.kill(os.getpid(), number)
        after_update(self, progress)

    loop.Loop._after_update = die_after_update


def _terminate_in_validation(epoch: int) -> None:
    validate = loop.Loop._validate_model

    def terminated_validate(self, current, *args):
        if current == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, current, *args)

    loop.Loop._validate_model = terminated_validate


class Runs:
    """Runs of one command in one output folder, by the names of their experiments."""

    def __init__(self, digits: Path, output: Path, mode: list[str]):
        self.output = output
        self.args = [
            str(digits), '--model', 'test_vit', '--num-classes', '10', '--img-size', '32', '--device', 'cpu',
            '--epochs', '3', '--batch-size', '32', '--lr', '0.05', '--warmup-epochs', '0', '--drop-path', '0.2',
            '--mixup', '0.5', '--reprob', '0.3', '--aa', 'rand-m5', '--model-ema', '--model-ema-decay', '0.9',
            '--recovery-interval', '2', '--sched-on-updates', '--output', str(output), *mode,
        ]

    def start(self, experiment: str, place: str = 'nowhere', epoch: int = 1, resume: bool = True) -> Process:
        argv = [*self.args, '--experiment', experiment, *(['--resume', 'auto'] if resume else [])]
        return Process(train_and_die, (place, epoch, argv), self.output / f'{experiment}.printed')

    def finish(self, experiment: str) -> str:
        """Starts the run again, to its end; returns what it printed."""
        run = self.start(experiment)
        assert run.wait() == 0, run.stderr
        return run.stdout

    def assert_same(self, first: str, second: str) -> None:
        assert (self.output / first / 'summary.csv').read_bytes() == (self.output / second / 'summary.csv').read_bytes()
        one, two = (self.checkpoint(name) for name in (first, second))
        for key in ('state_dict', 'state_dict_ema'):
            for name in one[key]:
                assert torch.equal(one[key][name], two[key][name]), f'{key} {name}'
        files = [sorted(path.name for path in (self.output / name).glob('[clm]*')) for name in (first, second)]
        assert files[0] == files[1]

    def checkpoint(self, experiment: str) -> dict:
        return torch.load(self.output / experiment / 'last.pth.tar', weights_only=False)


def _whole_run(digits: Path, output: Path, mode: list[str]) -> Runs:
    runs = Runs(digits, output, mode)
    runs.printed = runs.finish('whole')
    return runs


@pytest.fixture(scope='module')
def timm_draws(digits, tmp_path_factory) -> Runs:
    return _whole_run(digits, tmp_path_factory.mktemp('runs'), WITHOUT_REPLAY)


@pytest.fixture(scope='module')
def replayed(digits, tmp_path_factory) -> Runs:
    return _whole_run(digits, tmp_path_factory.mktemp('replayed'), WITH_REPLAY)


@pytest.fixture(scope='module')
def cropped(digits, tmp_path_factory) -> Runs:
    return _whole_run(digits, tmp_path_factory.mktemp('cropped'), WITH_CROPS)


@pytest.mark.parametrize('mode, place', [
    ('timm_draws', 'summary'),
    ('timm_draws', 'sigterm'),
    ('replayed', 'write'),
    ('replayed', 'step'),
    ('replayed', 'validation'),
    ('cropped', 'step'),
    pytest.param('timm_draws', 'write', marks=pytest.mark.soak),
    pytest.param('timm_draws', 'step', marks=pytest.mark.soak),
    pytest.param('timm_draws', 'validation', marks=pytest.mark.soak),
    pytest.param('replayed', 'summary', marks=pytest.mark.soak),
    pytest.param('replayed', 'sigterm', marks=pytest.mark.soak),
])
def test_interrupted_run_ends_as_the_whole_one(request, mode, place):
    runs = request.getfixturevalue(mode)
    assert runs.start(place, place).wait() == (143 if place in ('sigterm', 'validation') else -signal.SIGKILL)
    printed = runs.finish(place)
    runs.assert_same('whole', place)
    assert printed == runs.printed


def test_kill_during_the_write_leaves_the_last_good_checkpoint(timm_draws):
    timm_draws.start('half', 'write').wait()
    assert timm_draws.checkpoint('half')['epoch'] == 0


def test_finished_run_is_a_no_op(timm_draws):
    before = {path: path.stat().st_mtime_ns for path in (timm_draws.output / 'whole').iterdir()}
    assert timm_draws.finish('whole') == timm_draws.printed
    assert {path: path.stat().st_mtime_ns for path in (timm_draws.output / 'whole').iterdir()} == before


def test_replayed_recovery_goes_on_inside_its_epoch(replayed):
    replayed.start('inside', 'sigterm').wait()
    run = replayed.start('inside')
    assert run.wait() == 0
    assert 'going on from' in run.stderr and 'recovery-1-2.pth.tar' in run.stderr


def test_checkpoint_of_another_run_in_the_folder_is_passed_over(timm_draws):
    timm_draws.start('reused', 'summary', epoch=2).wait()
    assert timm_draws.start('reused', 'step', epoch=0, resume=False).wait() == -signal.SIGKILL
    run = timm_draws.start('reused')
    assert run.wait() == 0
    assert 'of another run' in run.stderr
    timm_draws.assert_same('whole', 'reused')


def test_run_that_goes_on_from_another_folder_reports_its_own_epochs_alone(train):
    train('--epochs 2 --stop-epoch 1', 'first')
    second = train('--epochs 1', 'second')
    run_id = second.record['run_id']
    forked = train(f'--epochs 2 --resume {second.folder.parent / "first" / "last.pth.tar"}', 'second')
    assert [row['epoch'] for row in forked.rows] == [1]
    assert [result['epoch'] for result in forked.result['all']] == [1]
    assert [epoch['epoch'] for epoch in forked.record['timing']] == [1]
    assert forked.record['best'] == {'epoch': 1, 'metric': forked.rows[0]['eval_top1']}
    assert forked.record['run_id'] != run_id
    assert forked.checkpoint()['saver']['checkpoint_files'] == []  # of either run: none was ranked before it


def test_times_and_results_of_the_epochs_before_a_resume_stay(train):
    train('--epochs 3 --stop-epoch 2')
    resumed = train('--epochs 3 --resume auto')
    assert [epoch['epoch'] for epoch in resumed.record['timing']] == [0, 1, 2]
    assert [result['epoch'] for result in resumed.result['all']] == [0, 1, 2]
    assert resumed.record['best']['metric'] == max(row['eval_top1'] for row in resumed.rows)


@pytest.mark.parametrize('flag, steps', [('', 10), ('--no-resume-opt', 5)])
def test_optimizer_starts_anew_where_the_flag_says(train, flag, steps):
    train('--epochs 2 --stop-epoch 1')
    state = train(f'--epochs 2 --resume auto {flag}').checkpoint()['optimizer']['state']
    assert {int(each['step']) for each in state.values()} == {steps}  # 160 images are 5 steps


def test_epoch_that_goes_on_with_another_batch_size_starts_at_a_whole_update(train):
    flags = '--replayable-data --grad-accum-steps 2 --recovery-interval 2'
    first = train(flags, 'first')
    recovery = first.folder / 'recovery-0-1.pth.tar'  # 4 of 5 batches, of which 3 of 4 would be as many
    forked = train(f'{flags} --batch-size 40 --resume {recovery}', 'second')
    assert [epoch['images'] for epoch in forked.record['timing']] == [80]


def test_resumed_bfloat16_ema_is_rounded_as_in_the_whole_run(train):
    flags = '--epochs 2 --model-dtype bfloat16 --model-ema --model-ema-decay 0.9'
    whole = train(flags, 'whole').checkpoint()['state_dict_ema']
    train(f'{flags} --stop-epoch 1', 'stopped')
    resumed = train(f'{flags} --resume auto', 'stopped').checkpoint()['state_dict_ema']
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.soak
@pytest.mark.parametrize('mode', [WITHOUT_REPLAY, WITH_REPLAY], ids=['workers-0', 'workers-2-replayable'])
def test_runs_killed_at_random_moments_end_as_the_whole_one(digits, tmp_path, capsys, mode):
    started = time.monotonic()
    runs = _whole_run(digits, tmp_path, mode)
    seconds = time.monotonic() - started
    chance, kills = random.Random(mode[1]), 0
    while kills < 10:
        name = f'killed-{kills}'
        run = runs.start(name)
        if run.wait(chance.uniform(0.05, 1.0) * seconds) is not None:
            continue  # it was done before its kill
        run.process.kill()
        run.wait()
        kills += 1
        runs.finish(name)
        runs.assert_same('whole', name)
    with capsys.disabled():
        print(f'\n{" ".join(mode)}: {kills} runs killed at random moments ended as the uninterrupted one, bit for bit')
