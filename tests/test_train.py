"""Runs of the script on real digits: what they compute."""
import argparse
import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import STILL, run_script
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_kd.cli import parse_args
from timm_kd.losses import KD_LOSSES
from timm_kd.process import Process
from timm_kd.setup.data import loading_kwargs

TIMM_COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
COMPONENTS = {
    'kd': [],
    'dkd': ['train_tckd', 'train_nckd'],
    'nkd': ['train_soft', 'train_distributed'],
    'tfnkd': [],
    'tfkd': [],
}
WEIGHTS = {'tfkd': (0.9, 0.1)}  # of task and distillation loss; 1 and 1 for the others


def kd_flags(name: str, teacher: Path) -> str:
    return f'--kd-loss {name}' + (f' --teacher {teacher}' if KD_LOSSES[name].needs_teacher else '')


@pytest.mark.parametrize('mixing', ['', '--mixup 0.8 --cutmix 1 --mixup-mode elem --mixup-prob 0.7'], ids=bool)
@pytest.mark.parametrize('name', KD_LOSSES)
def test_each_loss_trains_and_its_parts_reach_summary_log_and_result(name, mixing, train, digits_teacher):
    run = train(f'{kd_flags(name, digits_teacher)} {mixing}')
    (row,) = run.rows
    agreement = ['eval_agreement'] if KD_LOSSES[name].needs_teacher else []
    assert list(row) == [*TIMM_COLUMNS, *agreement, 'train_task_loss', 'train_kd_loss', *COMPONENTS[name]]
    task_weight, kd_weight = WEIGHTS.get(name, (1, 1))
    total = task_weight * row['train_task_loss'] + kd_weight * row['train_kd_loss']
    assert row['train_loss'] == pytest.approx(total, rel=1e-6)
    (result,) = run.result['all']
    assert result['train'] == {key[6:]: value for key, value in row.items() if key.startswith('train_')}
    assert result['validation'] == {key[5:]: value for key, value in row.items() if key.startswith('eval_')}
    line = next(line for line in run.log if line.startswith('Train:'))
    assert all(f'  {column.removeprefix("train_")}: ' in line for column in row if column.startswith('train_')
               if column != 'train_loss')


def test_tfkd_with_a_teacher_learns_from_it(train, digits_teacher):
    tfkd, kd = (train(f'--teacher {digits_teacher} --kd-loss {name} --kd-temperature 20 {STILL}', name)
                for name in ('tfkd', 'kd'))
    assert tfkd.rows[0]['train_kd_loss'] == kd.rows[0]['train_kd_loss']
    assert tfkd.rows[0]['train_loss'] != kd.rows[0]['train_loss']


@pytest.fixture(scope='module')
def dkd(digits, digits_teacher, tmp_path_factory):
    """Runs of DKD in float32 by their further flags, each done once; returns the row of the only epoch."""
    @functools.cache
    def row(flags: str) -> dict[str, float]:
        common = f'--teacher {digits_teacher} --teacher-dtype float32 --kd-loss dkd --no-teacher-eval --val-split ""'
        run = run_script(f'{common} {flags}', digits, tmp_path_factory.mktemp('dkd'))
        assert run.exit_code == 0, run.error
        return run.rows[0]
    return row


@pytest.mark.parametrize('options, tolerance', [
    ('--channels-last', 1e-3),
    ('--no-prefetcher', 1e-3),
    ('--model test_vit --grad-checkpointing', 1e-4),
    ('--amp --amp-dtype bfloat16', 0.03),
    ('--amp --amp-dtype float16', 0.03),
    ('--amp --amp-dtype bfloat16 --teacher-dtype amp', 0.03),
    ('--teacher-dtype bfloat16', 0.03),
    ('--model test_vit --model-dtype bfloat16', 0.03),
    ('--torchscript', 1e-3),
    ('--synchronize-step --pin-mem', 1e-6),
])
def test_option_that_is_not_about_the_loss_leaves_it_as_it_was(options, tolerance, dkd):
    plain, row = dkd('--model test_vit' if 'test_vit' in options else ''), dkd(options)
    assert row.keys() == plain.keys()
    for column, value in plain.items():
        assert row[column] == pytest.approx(value, rel=tolerance), column


@pytest.mark.parametrize('flags, device, pinned', [
    ('', 'cuda', True),
    ('--no-prefetcher', 'cuda', False),
    ('', 'cpu', False),
    ('--pin-mem', 'cpu', True),
])
def test_batches_for_a_gpu_come_from_pinned_memory(flags, device, pinned, digits):
    args, _ = parse_args([str(digits), '--model', 'test_resnet', *flags.split()])
    config = {name: None for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    assert loading_kwargs(args, config, Process(torch.device(device)), None)['pin_memory'] is pinned


def test_model_dtype_is_that_of_the_saved_weights(train):
    run = train('--model test_vit --model-dtype bfloat16 --kd-loss tfnkd --val-split ""')
    assert {weight.dtype for weight in run.checkpoint()['state_dict'].values()} == {torch.bfloat16}


@pytest.mark.parametrize('flags', [
    '--bce-loss --kd-loss nkd',
    '--opt adahessian --lr 1e-2 --kd-loss dkd',
    '--opt lookahead_lamb --clip-grad 0.1 --clip-mode agc',
    '--train-img-sizes 24 32 --kd-loss nkd',
    '--sched poly --sched-on-updates --lr-cycle-limit 1',
    '--mixup 0.8 --no-prefetcher --mixup-off-epoch 1 --epochs 2 --kd-loss nkd',
    '--in-chans 1 --tta 2',
    '--workers 2 --use-multi-epochs-loader --epochs 2',
    '--teacher-img-size 40',
])
def test_flags_of_timm_go_with_a_teacher(flags, train, digits_teacher):
    run = train(f'--teacher {digits_teacher} {flags}')
    assert all(math.isfinite(value) for row in run.rows for value in row.values())
    assert 'eval_agreement' in run.rows[0]


def test_ema_that_is_forced_to_the_cpu_is_saved_but_the_student_is_validated(train):
    plain = train('--kd-loss tfnkd --epochs 2', 'plain')
    run = train('--kd-loss tfnkd --epochs 2 --model-ema --model-ema-decay 0.5 --model-ema-force-cpu')
    assert run.rows == plain.rows
    assert 'state_dict_ema' in run.checkpoint()


def test_loss_flag_names_the_task_loss_as_its_older_switch_does(train):
    named, switched, default = (train(f'{flag} {STILL}', f'loss {flag}') for flag in ('--loss bce', '--bce-loss', ''))
    assert named.rows == switched.rows
    assert named.rows[0]['train_loss'] < 1 < default.rows[0]['train_loss']  # ln 2 and ln 10 for an untrained model


def test_weights_of_the_task_loss_are_made_of_class_stats(train, tmp_path):
    counts = [1, 2, 4, 5, 8, 10, 16, 20, 40, 50]
    stats, weights = tmp_path / 'stats.json', tmp_path / 'weights.txt'
    stats.write_text(json.dumps({'pos_counts': counts, 'num_samples': 160}))
    weights.write_text(' '.join(str(min(((160 - count) / count) ** 0.5, 6)) for count in counts))
    named, listed, plain = (train(f'--loss bce {STILL} {flags}', name) for name, flags in (
        ('named', f'--class-stats {stats} --loss-pos-weight neg_pos --loss-weight-power 0.5 --loss-weight-max 6'),
        ('listed', f'--loss-pos-weight {weights}'),
        ('plain', ''),
    ))
    assert named.rows == listed.rows
    assert named.rows[0]['train_loss'] > 1.1 * plain.rows[0]['train_loss']


@pytest.mark.parametrize('loss, task_loss', [
    *((loss, 'jsd') for loss in KD_LOSSES), *(('nkd', task_loss) for task_loss in ('ce', 'bce', 'asl', 'poly')),
])
def test_every_augmentation_split_is_distilled_with_its_own_labels(loss, task_loss, train, digits_teacher):
    teacher = f'--teacher {digits_teacher} --teacher-dtype float32' if KD_LOSSES[loss].needs_teacher else ''
    # Nothing is drawn for an image: three splits are three times the same, and every mean over rows stays.
    common = (f'--kd-loss {loss} {teacher} {STILL} --val-split "" --scale 1 1 --ratio 1 1 --hflip 0 --color-jitter 0 '
              '--train-interpolation bilinear')
    split = train(f'{common} --loss {task_loss} --aug-splits 3', 'split').rows[0]
    single = train(f'{common} --loss {"ce" if task_loss == "jsd" else task_loss}', 'single').rows[0]
    for name in single:  # the divergence of three equal splits is 0, which leaves jsd its cross-entropy
        assert split[name] == pytest.approx(single[name], rel=1e-5), name


def test_accumulation_takes_the_remaining_batches_as_an_update_of_their_own(train):
    plain = train(f'--kd-loss tfnkd {STILL}', 'plain')
    run = train(f'--kd-loss tfnkd {STILL} --grad-accum-steps 2 --log-interval 1')
    assert run.rows[0]['train_loss'] == pytest.approx(plain.rows[0]['train_loss'], rel=1e-6)
    updates = [line.partition(']')[0] for line in run.log if line.startswith('Train:')]
    assert updates == ['Train: 0 [   0/3 ( 33%)', 'Train: 0 [   1/3 ( 67%)', 'Train: 0 [   2/3 (100%)']


def test_batches_are_the_same_with_and_without_a_teacher(train, digits_teacher):
    common = f'{STILL} --workers 2 --epochs 2 --aa rand-m9-mstd0.5-inc1 --reprob 0.3 --mixup 0.8 --cutmix 1 --model-ema'
    plain = train(common, 'plain')
    for flags in (f'--teacher {digits_teacher} --kd-loss nkd', '--kd-loss tfnkd'):
        run = train(f'{common} {flags}', flags.split()[-1])
        losses = [row['train_task_loss'] for row in run.rows]
        assert losses == pytest.approx([row['train_loss'] for row in plain.rows], rel=1e-7)


@pytest.mark.parametrize('flags, task_weight, kd_weight, warmup_epochs, ramps', [
    ('--epochs 3 --kd-warmup-epochs 2 --task-loss-weight 0.5 --distill-loss-weight 0.4', 0.5, 0.4, 2, [0.5, 1, 1]),
    ('--epochs 24 --stop-epoch 3', 1, 1, 2, [0.5, 1, 1]),  # unless told otherwise, a twelfth of the epochs
    ('--epochs 24 --stop-epoch 3 --kd-warmup-epochs 0', 1, 1, 0, [1, 1, 1]),
])
def test_dkd_is_faded_in_over_the_warmup_epochs(
        flags, task_weight, kd_weight, warmup_epochs, ramps, train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --kd-loss dkd --val-split "" {flags}')
    assert run.record['loss']['warmup_epochs'] == warmup_epochs
    for row, ramp in zip(run.rows, ramps, strict=True):
        distilled = row['train_loss'] - task_weight * row['train_task_loss']
        assert distilled == pytest.approx(ramp * kd_weight * row['train_kd_loss'], rel=1e-5)


def test_without_validation_split_there_is_no_evaluation_and_the_train_loss_ranks(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --val-split "" --epochs 2')
    assert list(run.rows[0]) == ['epoch', 'train_loss', 'lr', 'train_task_loss', 'train_kd_loss']
    assert [epoch['validation'] for epoch in run.result['all']] == [None, None]
    assert run.result['best']['train']['loss'] == min(row['train_loss'] for row in run.rows)
    assert run.record['teacher'][0]['top1'] is None


def test_milestone_is_kept_and_its_epoch_validated_whatever_the_interval_as_the_last_one_is(train):
    run = train('--kd-loss tfnkd --val-interval 3 --epochs 6 --stop-epoch 4 --save-epochs 2 --checkpoint-hist 1')
    assert [row['epoch'] for row in run.rows] == [1, 2, 3]  # for the milestone, by the interval, and the last
    assert [path.name for path in run.folder.glob('milestone-*')] == ['milestone-2.pth.tar']
    milestone = run.checkpoint('milestone-2.pth.tar')
    assert (milestone['epoch'], milestone['metric']) == (1, run.rows[0]['eval_top1'])


@pytest.mark.parametrize('flags', ['', '--sched-on-updates'])
def test_start_epoch_begins_at_its_place_in_the_schedule(flags, train):
    run = train(f'--kd-loss tfnkd --epochs 2 --start-epoch 1 --val-split "" {flags}')
    (first,) = [line for line in run.log if line.startswith('Train: 1 [   0/5')]
    assert 'LR: 1.500e-03' in first  # half of a cosine from 3e-3


def test_stop_epoch_ends_the_run_on_the_schedule_of_all_epochs(train):
    run = train('--kd-loss tfnkd --epochs 4 --stop-epoch 2 --val-split ""')
    cosine = [0.5 * 3e-3 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (0, 1)]
    assert [row['lr'] for row in run.rows] == pytest.approx(cosine)


def test_timms_own_teacher_flag_is_the_same_run_as_ours(train, digits_teacher):
    spec = f'local-dir:{digits_teacher}'
    theirs = train(f'--kd-model-name {spec}', 'theirs')
    ours = train(f'--teacher {spec} --teacher-dtype float32 --kd-loss kd --kd-temperature 4', 'ours')
    assert theirs.rows == ours.rows


@pytest.mark.parametrize('reading', ['--log-interval 2 --recovery-interval 1', '--log-interval 50'])
def test_loss_that_is_not_finite_stops_the_run_and_nothing_is_saved_after_it(reading, digits, digits_teacher, tmp_path):
    flags = (f'--teacher {digits_teacher} --kd-loss nkd --opt momentum --lr 1e30 --epochs 3 --sched constant '
             f'--warmup-epochs 1 --warmup-lr 1e-3 --model-ema {reading}')
    run = run_script(flags, digits, tmp_path)
    assert run.exit_code == 3
    assert re.search(r'epoch 1, batch [1-3]: (soft|distributed|task_loss) is not finite', run.error), run.error
    assert '--result' not in run.error and [row['epoch'] for row in run.rows] == [0]
    assert run.checkpoint()['epoch'] == 0
    for path in run.folder.glob('*.pth.tar'):
        states = run.checkpoint(path.name)
        for weight in [*states['state_dict'].values(), *states['state_dict_ema'].values()]:
            assert weight.isfinite().all(), path


def test_checkpoint_of_timms_script_is_continued(digits, train, tmp_path):
    model = timm.create_model('test_resnet', num_classes=10)
    optimizer = create_optimizer_v2(model, 'adamw', lr=3e-3, weight_decay=2e-5)
    task = ClassificationTask(model, verbose=False)
    task.train()(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
    optimizer.step()
    args = argparse.Namespace(model='test_resnet', experiment='theirs')  # timm's script keeps its flags so
    folder = tmp_path / 'theirs'
    folder.mkdir()
    CheckpointSaver(model, optimizer, args, checkpoint_dir=str(folder), task=task).save_checkpoint(0, metric=1.0)
    run = train(f'--resume {folder / "last.pth.tar"} --epochs 2 --kd-loss tfnkd')
    assert [row['epoch'] for row in run.rows] == [1]
    assert run.checkpoint()['optimizer']['state'][0]['step'] == 6  # theirs, and five of this run


@pytest.mark.parametrize('backend', [
    'eager',  # traced, not translated: the fastest way through all of the wiring
    pytest.param('inductor', marks=[
        pytest.mark.soak,
        pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs a C++ compiler for the CPU'),
    ]),
])
def test_compiled_student_and_teacher_train_as_the_plain_ones_do(backend, train, digits_teacher):
    common = f'--model test_vit --teacher {digits_teacher} --kd-loss nkd --model-ema'
    plain, compiled = train(common, 'plain'), train(f'{common} --torchcompile {backend}', backend)
    for column in ('train_loss', 'train_distributed', 'eval_loss'):
        assert compiled.rows[0][column] == pytest.approx(plain.rows[0][column], rel=1e-3)
    assert compiled.checkpoint()['state_dict'].keys() == plain.checkpoint()['state_dict'].keys()
