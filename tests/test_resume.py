"""A run that is killed anywhere and started again ends as one that was never interrupted, bit for bit."""
import random
import signal
import time

import pytest
import torch
from stopped import Runs

FLAGS = (
    '--model test_vit --num-classes 10 --img-size 32 --device cpu --epochs 3 --batch-size 32 --lr 0.05 '
    '--warmup-epochs 0 --drop-path 0.2 --mixup 0.5 --reprob 0.3 --aa rand-m5 --model-ema --model-ema-decay 0.9 '
    '--recovery-interval 2 --sched-on-updates'
)
WITHOUT_REPLAY = f'{FLAGS} --workers 0'
WITH_REPLAY = f'{FLAGS} --workers 2 --replayable-data'
WITH_CROPS = f'{FLAGS} --workers 1 --crops-per-image 4 --epochs 4 --val-interval 4'
KILL, TERMINATE, SOAK = signal.SIGKILL, signal.SIGTERM, pytest.mark.soak


@pytest.mark.parametrize('flags, place, number', [
    (WITHOUT_REPLAY, 'row', KILL),
    (WITHOUT_REPLAY, 'update 2', TERMINATE),
    (WITH_REPLAY, 'save', KILL),
    (WITH_REPLAY, 'update 2', KILL),
    (WITH_REPLAY, 'Test', TERMINATE),
    (WITH_CROPS, 'update 2', KILL),
    pytest.param(WITHOUT_REPLAY, 'save', KILL, marks=SOAK),
    pytest.param(WITHOUT_REPLAY, 'update 2', KILL, marks=SOAK),
    pytest.param(WITHOUT_REPLAY, 'Test', TERMINATE, marks=SOAK),
    pytest.param(WITH_REPLAY, 'row', KILL, marks=SOAK),
    pytest.param(WITH_REPLAY, 'update 2', TERMINATE, marks=SOAK),
])
def test_interrupted_run_ends_as_the_whole_one(runs_of, flags, place, number):
    runs, name = runs_of(flags), f'{place} {number.name}'
    runs.stop(name, place, number)
    assert runs.finish(name).stdout == runs.printed('whole')
    runs.assert_same('whole', name)


def test_kill_during_the_write_leaves_the_last_good_checkpoint(runs_of):
    runs = runs_of(WITHOUT_REPLAY)
    runs.stop('half', 'save', KILL)
    assert runs.run('half').checkpoint()['epoch'] == 0


def test_finished_run_is_a_no_op(runs_of):
    runs = runs_of(WITHOUT_REPLAY)
    printed = runs.printed('whole')
    before = {path: path.stat().st_mtime_ns for path in (runs.output / 'whole').iterdir()}
    assert runs.finish('whole').stdout == printed
    assert {path: path.stat().st_mtime_ns for path in (runs.output / 'whole').iterdir()} == before


def test_replayed_recovery_goes_on_inside_its_epoch(runs_of):
    runs = runs_of(WITH_REPLAY)
    runs.stop('inside', 'update 2')
    log = runs.finish('inside').stderr
    assert 'going on from' in log and 'recovery-1-2.pth.tar' in log


def test_checkpoint_of_another_run_in_the_folder_is_passed_over(runs_of):
    runs = runs_of(WITHOUT_REPLAY)
    runs.stop('reused', 'row', KILL, epoch=2)
    runs.stop('reused', 'update 2', KILL, epoch=0, flags='--resume=')
    assert 'of another run' in runs.finish('reused').stderr
    runs.assert_same('whole', 'reused')


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
@pytest.mark.parametrize('flags', [WITHOUT_REPLAY, WITH_REPLAY], ids=['workers-0', 'workers-2-replayable'])
def test_runs_killed_at_random_moments_end_as_the_whole_one(digits, tmp_path, capsys, flags):
    runs = Runs(digits, tmp_path, flags)
    started = time.monotonic()
    runs.finish('whole')
    seconds = time.monotonic() - started
    chance, kills = random.Random(flags), 0
    while kills < 10:
        name = f'killed-{kills}'
        run, = runs.start(name)
        if run.wait(chance.uniform(0.05, 1.0) * seconds) is not None:
            continue  # it was done before its kill
        run.process.kill()
        run.wait()
        kills += 1
        runs.finish(name)
        runs.assert_same('whole', name)
    mode = flags.removeprefix(f'{FLAGS} ')
    with capsys.disabled():
        print(f'\n{mode}: {kills} runs killed at random moments ended as the uninterrupted one, bit for bit')
