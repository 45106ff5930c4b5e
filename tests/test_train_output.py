"""Runs of the script on real digits: their evaluation, their files, and what they say."""
import contextlib
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import BASE, Run, logits_of, percent, run_script, teacher_logits
from PIL import Image

from timm_kd.train import main


@pytest.fixture(scope='module')
def nkd_run(digits: Path, digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of NKD with an EMA, which several tests look at; the student starts where the teacher ended."""
    flags = (f'--teacher {digits_teacher} --teacher-dtype float32 --kd-loss nkd --epochs 2 --lr 1e-3 --model-ema '
             f'--model-ema-decay 0.6 --save-images --initial-checkpoint {digits_teacher}/model.safetensors')
    return run_script(flags, digits, tmp_path_factory.mktemp('output'))


@pytest.fixture(scope='module')
def bfloat16_run(digits: Path, digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An epoch without EMA, of a student that starts where its teacher, in bfloat16, ended."""
    flags = (f'--teacher {digits_teacher} --teacher-dtype bfloat16 --lr 1e-3 '
             f'--initial-checkpoint {digits_teacher}/model.safetensors')
    return run_script(flags, digits, tmp_path_factory.mktemp('output'))


@pytest.mark.parametrize(('run', 'dtype'), [('nkd_run', torch.float32), ('bfloat16_run', torch.bfloat16)])
def test_teachers_top1_is_what_timm_evaluates(run, dtype, digits, digits_teacher, request):
    logits, classes = teacher_logits(digits_teacher, digits, dtype)
    result = request.getfixturevalue(run).result
    assert result['teacher'][0]['top1'] == pytest.approx(percent(logits, classes))


@pytest.mark.parametrize(('run', 'ema', 'dtype'), [
    ('nkd_run', True, torch.float32), ('bfloat16_run', False, torch.bfloat16),
])
def test_loss_top1_and_agreement_are_those_of_the_saved_model(run, ema, dtype, digits, digits_teacher, request):
    run = request.getfixturevalue(run)
    teacher, _ = teacher_logits(digits_teacher, digits, dtype)
    student = timm.create_model('test_resnet', num_classes=10)
    student.load_state_dict(run.checkpoint()['state_dict_ema' if ema else 'state_dict'])
    logits, classes = logits_of(student, digits)
    row = run.rows[-1]
    assert row['eval_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, classes).item(), rel=1e-4)
    assert row['eval_top1'] == pytest.approx(percent(logits, classes))
    assert row['eval_agreement'] == pytest.approx(percent(logits, teacher))
    assert row['eval_agreement'] not in (row['eval_top1'], 10, 100)  # a model this far along tells them apart


@pytest.mark.parametrize('cache', ['', '--teacher-cache {}/cache --replayable-data --batch-size 20'])
def test_agreement_under_tta_is_that_of_the_averaged_rows(cache, train, digits, digits_teacher, tmp_path):
    flags = (f'--teacher {digits_teacher} --teacher-dtype float32 --initial-checkpoint '
             f'{digits_teacher}/model.safetensors --lr 1e-3 --tta 4 {cache.format(tmp_path)}')
    runs = [train(flags, name) for name in (('fills', 'reads') if cache else ('run',))]
    teacher, _ = logits_of(timm.create_model(f'local-dir:{digits_teacher}', pretrained=True), digits)
    student = timm.create_model('test_resnet', num_classes=10)
    for run in runs:
        student.load_state_dict(run.checkpoint()['state_dict'])
        logits, _ = logits_of(student, digits)
        expected = percent(*(rows.unflatten(0, (-1, 4)).mean(1) for rows in (logits, teacher)))
        assert run.rows[0]['eval_agreement'] == pytest.approx(expected)
    assert expected > 50


def test_several_teachers_are_each_evaluated_and_recorded(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --teacher local-dir:{digits_teacher} --kd-loss nkd')
    first, second = run.record['teacher']
    assert [first['source'], second['source']] == [str(digits_teacher), f'local-dir:{digits_teacher}']
    assert first['top1'] == second['top1'] > 50
    assert run.result['teacher'] == [first, second]


def test_unevaluated_teacher_has_no_top1_and_the_student_no_agreement(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --no-teacher-eval')
    assert 'eval_agreement' not in run.rows[0] and 'eval_top1' in run.rows[0]
    assert (run.record['teacher'][0]['top1'], run.record['teacher'][0]['top5']) == (None, None)


def test_checkpoint_holds_the_student_alone(nkd_run):
    checkpoint = nkd_run.checkpoint()
    keys = timm.create_model('test_resnet', num_classes=10).state_dict().keys()
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys() == keys
    assert (checkpoint['arch'], checkpoint['epoch'], checkpoint['version']) == ('test_resnet', 1, 2)
    parameters = list(timm.create_model('test_resnet', num_classes=10).parameters())
    assert sum(len(group['params']) for group in checkpoint['optimizer']['param_groups']) == len(parameters)
    # student, EMA and the two moments of AdamW, four bytes each: no room for a teacher
    size = (nkd_run.folder / 'last.pth.tar').stat().st_size
    assert 4 <= size / (4 * sum(p.numel() for p in parameters)) < 4.5


def test_best_checkpoint_is_the_one_that_the_result_block_calls_best(nkd_run):
    best = max(nkd_run.rows, key=lambda row: row['eval_top1'])
    assert nkd_run.result['best']['epoch'] == best['epoch'] == nkd_run.checkpoint('model_best.pth.tar')['epoch']
    assert nkd_run.record['best'] == {'epoch': best['epoch'], 'metric': best['eval_top1']}


def test_args_yaml_is_a_config_of_the_same_run(nkd_run, digits, tmp_path):
    config = nkd_run.folder / 'args.yaml'
    with contextlib.redirect_stdout(io.StringIO()):
        main(['--config', str(config), '--output', str(tmp_path), '--experiment', 'again'])
    assert Run(tmp_path / 'again').rows == nkd_run.rows


def test_record_says_what_the_run_was_made_of(nkd_run, digits_teacher):
    record = nkd_run.record
    assert (record['timm'], record['torch']) == (timm.__version__, torch.__version__)
    assert shlex.split(record['command'])[0] == 'train-kd' and '--kd-loss nkd' in record['command']
    student, (teacher,), loss = record['student'], record['teacher'], record['loss']
    assert (student['model'], student['num_classes']) == ('test_resnet', 10)
    assert student['pretrained_source'] == f'{digits_teacher}/model.safetensors'
    assert student['class_names'] == [str(digit) for digit in range(10)]
    assert student['data_config']['input_size'] == [3, 32, 32] and student['data_config']['mean'] == [0.5] * 3
    count = sum(p.numel() for p in timm.create_model('test_resnet', num_classes=10).parameters())
    assert student['parameters'] == teacher['parameters'] == count
    assert (teacher['source'], teacher['model']) == (str(digits_teacher), 'test_resnet')
    assert (loss['name'], loss['parameters']['gamma'], loss['parameters']['temperature']) == ('nkd', 1.5, 1.0)
    assert (loss['task_loss_weight'], loss['distill_loss_weight'], record['eval_metric']) == (1.0, 1.0, 'top1')


def test_log_lines_have_timms_format(nkd_run):
    number = r'[\d.e+-]+'
    train_line = re.compile(
        rf'Train: 0 \[   2/5 \( 60%\)\]  Loss: {number} \({number}\)  Time: {number}s, +{number}/s  '
        rf'\({number}s, +{number}/s\)  LR: 1\.000e-03  Data: {number} \({number}\)  task_loss: {number} \({number}\)')
    test_line = re.compile(
        rf'Test \(EMA\): \[   2/3\]  Time: {number} \({number}\)  Loss: +{number} \( *{number}\)  '
        rf'Acc@1: +{number} \( *{number}\)  Acc@5: +{number} \( *{number}\)')
    for pattern in (train_line, test_line):
        assert any(pattern.match(line) for line in nkd_run.log), pattern.pattern
    best = nkd_run.record['best']
    assert f'*** Best metric: {best["metric"]} (epoch {best["epoch"]})' in nkd_run.log


def test_validation_lines_show_the_batch_and_the_running_average(nkd_run):
    figures = re.compile(r'(Loss|Acc@1|Acc@5): +([\d.]+) \( *([\d.]+)\)')
    lines = [{name: (float(now), float(average)) for name, now, average in figures.findall(line)}
             for line in nkd_run.log if line.startswith('Test (EMA):')]
    first, last = lines[-3], lines[-1]  # batches of 32, 32, 32 and 4 images; the third and the last are due
    assert all(now == average for now, average in first.values())
    for name, column in ('Loss', 'eval_loss'), ('Acc@1', 'eval_top1'), ('Acc@5', 'eval_top5'):
        assert last[name][1] == pytest.approx(nkd_run.rows[-1][column], abs=5e-4)
    assert last['Acc@1'][0] in (0, 25, 50, 75, 100)


def test_start_says_what_timms_script_says(train):
    run = train('--kd-loss tfnkd --opt sgd --momentum 0.8 --weight-decay 0.05 --warmup-prefix')
    for line in (
            'Model test_resnet created, param count:373658',
            'AMP not enabled. Training in torch.float32.',
            'Created SGD (sgd) optimizer: lr: 0.003, momentum: 0.8, dampening: 0, weight_decay: 0.05, nesterov: True',
            'Scheduled epochs: 1 (warmup_epochs + epochs + cooldown_epochs). Warmup added to total when '
            'warmup_prefix=True. LR stepped per epoch.',
    ):
        assert any(said.startswith(line) for said in run.log), line


def test_first_each_nth_and_last_update_of_an_epoch_are_logged(train):
    run = train('--kd-loss tfnkd --log-interval 3 --val-split ""')
    assert [line.partition('(')[0] for line in run.log if line.startswith('Train:')] == [
        'Train: 0 [   0/5 ', 'Train: 0 [   3/5 ', 'Train: 0 [   4/5 ']


def test_start_says_which_teacher_and_how_good(nkd_run):
    (line,) = [line for line in nkd_run.log if line.startswith('Teacher ')]
    assert f'top-1 {nkd_run.result["teacher"][0]["top1"]:.2f} %' in line
    assert '0.37 M parameters' in line and 'mean (0.3, 0.3, 0.3)' in line


def test_batches_are_saved_as_pictures(nkd_run):
    with Image.open(nkd_run.folder / 'train-batch-0.jpg') as picture:
        assert picture.size == (8 * 32, 4 * 32)


def test_tensorboard_shows_the_rows_of_the_summary(train):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    run = train('--kd-loss tfnkd --epochs 2 --log-tensorboard')
    events = accumulator.EventAccumulator(str(run.folder)).Reload()
    for column in ('train_loss', 'train_kd_loss', 'eval_top1', 'lr'):
        scalars = events.Scalars(column.replace('_', '/', 1))
        assert [(event.step, event.value) for event in scalars] == \
            [(row['epoch'], pytest.approx(row[column], rel=1e-6)) for row in run.rows]


def test_on_a_terminal_there_is_a_bar_and_stdout_is_the_result_alone(digits, tmp_path):
    script = Path(__file__).parent.parent / 'train_kd.py'
    flags = f'{BASE} --kd-loss tfnkd --output {tmp_path}'
    argv = [sys.executable, str(script), str(digits), *shlex.split(flags)]
    reader, terminal = pty.openpty()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        os.close(terminal)
        shown = b''
        with contextlib.suppress(OSError):  # what reading from a closed terminal ends in
            while chunk := os.read(reader, 4096):
                shown += chunk
        output = process.stdout.read()
    os.close(reader)
    assert process.returncode == 0
    assert len(json.loads(output.removeprefix('--result\n'))['all']) == 1
    assert b'Train: 0 [' in shown
    assert re.search(rb'epoch 0: +\d+%.* 5/5 \[', shown)


def test_off_a_terminal_there_are_plain_lines_alone(nkd_run):
    assert nkd_run.error == ''
