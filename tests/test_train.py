"""Runs of the script on real digits, from the command line to the files that it leaves."""
import argparse
import contextlib
import csv
import io
import json
import logging
import math
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_kd.losses import KD_LOSSES
from timm_kd.train import main

BASE = (
    '--model test_resnet --num-classes 10 --img-size 32 --device cpu --epochs 1 --batch-size 32 --workers 0 '
    '--opt adamw --lr 3e-3 --warmup-epochs 0 --log-interval 2'
)
STILL = '--opt momentum --lr 1e-30'  # no weight moves: every loss is a function of the batch alone
TIMM_COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
COMPONENTS = {
    'kd': [],
    'dkd': ['train_tckd', 'train_nckd'],
    'nkd': ['train_soft', 'train_distributed'],
    'tfnkd': [],
    'tfkd': [],
}
WEIGHTS = {'tfkd': (0.9, 0.1)}  # of task and distillation loss; 1 and 1 for the others


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


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> Callable[..., Run]:
    """Runs the script on the digits."""
    def run(flags: str, name: str = 'run') -> Run:
        finished = run_script(flags, digits, tmp_path, name)
        assert finished.exit_code == 0, finished.error
        return finished
    return run


@pytest.fixture(scope='module')
def nkd_run(digits: Path, digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of NKD with an EMA, which several tests look at; the student starts where the teacher ended."""
    flags = (f'--teacher {digits_teacher} --kd-loss nkd --initial-checkpoint {digits_teacher}/model.safetensors '
             '--epochs 2 --lr 1e-3 --model-ema --model-ema-decay 0.6 --save-images')
    return run_script(flags, digits, tmp_path_factory.mktemp('output'))


def logits_of(model: torch.nn.Module, digits: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model, with the preprocessing it came with, for the validation images, and their classes."""
    loader = create_loader(
        create_dataset('', digits, 'validation', is_training=False),
        batch_size=50, num_workers=0, device=torch.device('cpu'), use_prefetcher=False, persistent_workers=False,
        **{key: value for key, value in resolve_data_config({'img_size': 32}, model=model).items()
           if key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')},
    )
    with torch.no_grad():
        answers = [(model.eval()(images), target) for images, target in loader]
    return tuple(torch.cat(part) for part in zip(*answers, strict=True))


def percent(answers: torch.Tensor, others: torch.Tensor) -> float:
    """How many rows have their largest logit at a class, or at that of other logits."""
    others = others.argmax(1) if others.ndim > 1 else others
    return 100 * (answers.argmax(1) == others).float().mean().item()


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
def test_option_that_is_not_about_the_loss_leaves_it_as_it_was(options, tolerance, train, digits_teacher):
    common = f'--teacher {digits_teacher} --teacher-dtype float32 --kd-loss dkd --no-teacher-eval --val-split ""'
    model = '--model test_vit' if 'test_vit' in options else ''
    plain, run = train(f'{common} {model}', 'plain'), train(f'{common} {options}')
    assert run.rows[0].keys() == plain.rows[0].keys()
    for column, value in plain.rows[0].items():
        assert run.rows[0][column] == pytest.approx(value, rel=tolerance), column


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


def test_loss_flag_names_the_task_loss_as_its_older_switch_does(train):
    named, switched, default = (train(f'{flag} {STILL}', f'loss {flag}') for flag in ('--loss bce', '--bce-loss', ''))
    assert named.rows == switched.rows
    assert named.rows[0]['train_loss'] < 1 < default.rows[0]['train_loss']  # ln 2 and ln 10 for an untrained model


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


def test_distillation_is_faded_in_over_the_warmup_epochs(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --kd-loss dkd --epochs 3 --kd-warmup-epochs 2 --task-loss-weight 0.5 '
                '--distill-loss-weight 0.4 --val-split ""')
    ramps = [(row['train_loss'] - 0.5 * row['train_task_loss']) / (0.4 * row['train_kd_loss']) for row in run.rows]
    assert ramps == pytest.approx([0.5, 1.0, 1.0], rel=1e-5)


def test_without_validation_split_there_is_no_evaluation_and_the_train_loss_ranks(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --val-split "" --epochs 2')
    assert list(run.rows[0]) == ['epoch', 'train_loss', 'lr', 'train_task_loss', 'train_kd_loss']
    assert [epoch['validation'] for epoch in run.result['all']] == [None, None]
    assert run.result['best']['train']['loss'] == min(row['train_loss'] for row in run.rows)
    assert run.record['teacher'][0]['top1'] is None


def test_epochs_between_validations_have_no_row_but_the_last_has_one(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --val-interval 2 --epochs 3')
    assert [row['epoch'] for row in run.rows] == [1, 2]


def test_stop_epoch_ends_the_run_on_the_schedule_of_all_epochs(train):
    run = train('--kd-loss tfnkd --epochs 4 --stop-epoch 2 --val-split ""')
    cosine = [0.5 * 3e-3 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (0, 1)]
    assert [row['lr'] for row in run.rows] == pytest.approx(cosine)


def test_save_epochs_keep_a_milestone_of_their_own(train):
    run = train('--kd-loss tfnkd --epochs 3 --save-epochs 2 --val-split "" --checkpoint-hist 1')
    milestones = sorted(path.name for path in run.folder.glob('milestone-*'))
    assert milestones == ['milestone-2.pth.tar'] and run.checkpoint(milestones[0])['epoch'] == 1


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


def test_timms_own_teacher_flag_is_the_same_run_as_ours(train, digits_teacher):
    spec = f'local-dir:{digits_teacher}'
    theirs = train(f'--kd-model-name {spec}', 'theirs')
    ours = train(f'--teacher {spec} --teacher-dtype float32 --kd-loss kd --kd-temperature 4', 'ours')
    assert theirs.rows == ours.rows


def test_teachers_top1_is_what_timm_evaluates(nkd_run, digits, digits_teacher):
    logits, classes = logits_of(timm.create_model(f'local-dir:{digits_teacher}', pretrained=True), digits)
    assert nkd_run.result['teacher'][0]['top1'] == pytest.approx(percent(logits, classes))


@pytest.mark.parametrize('ema', [True, False])
def test_loss_top1_and_agreement_are_those_of_the_saved_model(ema, nkd_run, train, digits, digits_teacher):
    run = nkd_run if ema else train(
        f'--teacher {digits_teacher} --initial-checkpoint {digits_teacher}/model.safetensors --lr 1e-3')
    teacher, _ = logits_of(timm.create_model(f'local-dir:{digits_teacher}', pretrained=True), digits)
    student = timm.create_model('test_resnet', num_classes=10)
    student.load_state_dict(run.checkpoint()['state_dict_ema' if ema else 'state_dict'])
    logits, classes = logits_of(student, digits)
    row = run.rows[-1]
    assert row['eval_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, classes).item(), rel=1e-4)
    assert row['eval_top1'] == pytest.approx(percent(logits, classes))
    assert row['eval_agreement'] == pytest.approx(percent(logits, teacher))
    assert row['eval_agreement'] not in (row['eval_top1'], 10, 100)  # a model this far along tells them apart


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
        rf'Test \(EMA\): \[   2/3\]  Time: {number} \({number}\)  Loss: +{number}  Acc@1: +{number}  Acc@5: +{number}')
    for pattern in (train_line, test_line):
        assert any(pattern.match(line) for line in nkd_run.log), pattern.pattern
    best = nkd_run.record['best']
    assert f'*** Best metric: {best["metric"]} (epoch {best["epoch"]})' in nkd_run.log


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


def test_fresh_run_leaves_no_row_of_an_older_one_in_its_folder(train):
    train('--kd-loss tfnkd --epochs 2 --val-split ""')
    assert len(train('--kd-loss tfnkd --val-split ""').rows) == 1


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
