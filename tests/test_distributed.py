"""Two processes on the CPU (gloo) do what one does."""
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from helpers import BASE, Run, logits_of, percent, run_on_ranks, run_torchrun, teacher_logits
from stopped import train_with_signal
from torch import nn

from timm_kd import KDTask, create_kd_loss, train


def make_task(loss: str) -> KDTask:
    """A student without batch norm and a teacher, the same in every process."""
    torch.manual_seed(0)
    student = timm.create_model('test_vit', num_classes=10, img_size=32)
    kd_loss = create_kd_loss(loss)
    teacher = timm.create_model('test_vit', num_classes=10, img_size=32).eval() if kd_loss.needs_teacher else None
    return KDTask(student, kd_loss, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)


def step_on_a_share(losses: tuple[str, ...], path: Path) -> None:
    """Each rank takes its half of the batch, in two accumulated steps, and rank 0 saves losses and gradients."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    results = {}
    for loss in losses:
        task = make_task(loss).prepare_distributed()
        input, target = (part.chunk(2)[rank].chunk(2) for part in make_batch())
        total = torch.zeros(())
        with task.no_sync():
            first = task(input[0], target[0])['loss'] / 2
            first.backward()
        second = task(input[1], target[1])['loss'] / 2
        second.backward()
        total += first.detach() + second.detach()
        torch.distributed.all_reduce(total)
        gradients = {name: p.grad for name, p in task.trainable_module.module.named_parameters()}
        results[loss] = (total / 2, gradients)
    if rank == 0:
        torch.save(results, path)
    torch.distributed.destroy_process_group()


def test_split_batch_gives_the_loss_and_gradient_of_the_whole(tmp_path):
    losses = ('kd', 'dkd', 'nkd', 'tfkd')  # tfnkd's mean is per process
    run_on_ranks(step_on_a_share, (losses, tmp_path / 'results.pt'), tmp_path)
    results = torch.load(tmp_path / 'results.pt')
    for loss in losses:
        task = make_task(loss)
        whole = task(*make_batch())['loss']
        whole.backward()
        split_loss, split_gradients = results[loss]
        torch.testing.assert_close(split_loss, whole.detach(), rtol=1e-5, atol=0)
        for name, parameter in task.trainable_module.named_parameters():
            torch.testing.assert_close(split_gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def script_args(digits: Path, teacher: Path, output: Path, teacher_dtype: str = 'float32') -> list[str]:
    return shlex.split(
        f'{digits} {BASE} --epochs 2 --batch-size 8 --grad-accum-steps 2 --opt sgd --lr 0.05 --replayable-data '
        f'--teacher local-dir:{teacher} --teacher-dtype {teacher_dtype} --output {output} --experiment run'
    )


@pytest.fixture(scope='module', params=['float32', 'bfloat16'])
def teacher_dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(scope='module')
def two_process_run(digits, digits_teacher, teacher_dtype, tmp_path_factory) -> Run:
    """A run of 2 epochs on 2 ranks, on a validation set of odd length, so that the sampler pads it."""
    output = tmp_path_factory.mktemp('two')
    odd = shutil.copytree(digits, output / 'digits')
    next((odd / 'validation').rglob('*.png')).unlink()
    args = script_args(odd, digits_teacher, output, str(teacher_dtype).removeprefix('torch.'))
    args += ['--model-ema', '--model-ema-decay', '0.5']
    runs = run_on_ranks(train.main, (args,), output)
    assert runs[1].stdout == '' and 'Train:' not in runs[1].stderr
    return Run(output / 'run', json.loads(runs[0].stdout.partition('--result\n')[2]))


def test_metrics_over_ranks_are_those_of_one_process(two_process_run, digits_teacher, teacher_dtype):
    data, results = two_process_run.folder.parent / 'digits', two_process_run.result
    student = timm.create_model('test_resnet', num_classes=10)
    student.load_state_dict(two_process_run.checkpoint()['state_dict_ema'])
    logits, classes = logits_of(student, data, batch_size=8)
    teacher, _ = teacher_logits(digits_teacher, data, teacher_dtype, batch_size=8)  # as the run
    validation = results['all'][-1]['validation']
    assert validation['top1'] == pytest.approx(percent(logits, classes), abs=1e-9)
    assert results['teacher'][0]['top1'] == pytest.approx(percent(teacher, classes), abs=1e-9)
    assert validation['agreement'] == pytest.approx(percent(logits, teacher), abs=1e-9)


def test_checkpoint_of_two_processes_holds_the_student_alone(two_process_run):
    keys = timm.create_model('test_resnet', num_classes=10).state_dict().keys()
    assert two_process_run.checkpoint()['state_dict'].keys() == keys


def train_and_die_once(argv: list[str]) -> None:
    """Train, and kill rank 1 in epoch 1, the first time only."""
    again = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
    train_with_signal('nowhere' if again else 'update 0', 1, signal.SIGKILL, (1,), argv)


def test_rank_killed_under_torchrun_is_restarted_and_ends_as_a_whole_run(digits, digits_teacher, tmp_path):
    args = [*script_args(digits, digits_teacher, tmp_path), '--resume', 'auto']
    done = run_torchrun(train_and_die_once, (args,), tmp_path, '--max-restarts', '1')
    assert done.returncode == 0, done.stderr
    assert 'going on from' in done.stderr
    whole = tmp_path / 'whole'
    args[args.index(str(tmp_path))] = str(whole)
    run_on_ranks(train.main, (args,), whole)
    assert (tmp_path / 'run' / 'summary.csv').read_bytes() == (whole / 'run' / 'summary.csv').read_bytes()
