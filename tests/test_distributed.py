"""Two processes on the CPU (gloo) do what one does."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import run_on_ranks
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import nn

from timm_kd import KDTask, Teacher, create_kd_loss, train

REPOSITORY = Path(__file__).parents[1]


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
    return [
        str(digits), '--model', 'test_resnet', '--num-classes', '10', '--img-size', '32', '--device', 'cpu',
        '--teacher', f'local-dir:{teacher}', '--kd-loss', 'nkd', '--batch-size', '8', '--grad-accum-steps', '2',
        '--workers', '0', '--lr', '0.05', '--warmup-epochs', '0', '--epochs', '2', '--replayable-data',
        '--teacher-dtype', teacher_dtype, '--output', str(output), '--experiment', 'run',
    ]


@pytest.fixture(scope='module', params=['float32', 'bfloat16'])
def teacher_dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(scope='module')
def two_process_run(digits, digits_teacher, teacher_dtype, tmp_path_factory) -> Path:
    """A run of 2 epochs on 2 ranks, on a validation set of odd length, so that the sampler pads it."""
    output = tmp_path_factory.mktemp('two')
    odd = output / 'digits'
    for split in ('train', 'validation'):
        for source in sorted((digits / split).rglob('*.png')):
            target = odd / source.relative_to(digits)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    next((odd / 'validation').rglob('*.png')).unlink()
    args = script_args(odd, digits_teacher, output, str(teacher_dtype).removeprefix('torch.'))
    args += ['--model-ema', '--model-ema-decay', '0.5']
    runs = run_on_ranks(train.main, (args,), output)
    (output / 'stdout').write_text(runs[0].stdout)
    assert runs[1].stdout == '' and 'Train:' not in runs[1].stderr
    return output


def evaluate_alone(model: nn.Module, data: Path, config: dict) -> tuple[float, torch.Tensor]:
    """Top-1 of a model on the validation split, by one process, and its predictions."""
    dataset = create_dataset('', root=str(data), split='validation')
    config = config | {'input_size': (3, 32, 32)}
    loader = create_loader(
        dataset, config['input_size'], 8, mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'],
        interpolation=config['interpolation'], num_workers=0, device=torch.device('cpu'))
    with torch.no_grad():
        outputs, targets = zip(*((model.eval()(input).argmax(1), target) for input, target in loader), strict=True)
    return 100 * (torch.cat(outputs) == torch.cat(targets)).double().mean().item(), torch.cat(outputs)


def test_metrics_over_ranks_are_those_of_one_process(two_process_run, digits_teacher, teacher_dtype):
    results = json.loads((two_process_run / 'stdout').read_text().split('--result\n')[1])
    checkpoint = torch.load(two_process_run / 'run' / 'last.pth.tar', weights_only=False)
    student = timm.create_model('test_resnet', num_classes=10)
    student.load_state_dict(checkpoint['state_dict_ema'])
    config = resolve_data_config(model=student)
    top1, predictions = evaluate_alone(student, two_process_run / 'digits', config)
    validation = results['all'][-1]['validation']
    assert validation['top1'] == pytest.approx(top1, abs=1e-9)
    if teacher_dtype == torch.float32:
        teacher = timm.create_model(f'local-dir:{digits_teacher}', pretrained=True)
        config.update({key: teacher.pretrained_cfg[key] for key in ('mean', 'std')})
    else:  # bfloat16 rounds the folded weights that run otherwise than timm's own
        teacher = Teacher(digits_teacher, 10, config['mean'], config['std'], dtype='bfloat16')
    teacher_top1, teacher_predictions = evaluate_alone(teacher, two_process_run / 'digits', config)
    assert results['teacher'][0]['top1'] == pytest.approx(teacher_top1, abs=1e-9)
    agreement = 100 * (predictions == teacher_predictions).double().mean().item()
    assert validation['agreement'] == pytest.approx(agreement, abs=1e-9)


def test_checkpoint_of_two_processes_holds_the_student_alone(two_process_run):
    checkpoint = torch.load(two_process_run / 'run' / 'last.pth.tar', weights_only=False)
    assert set(checkpoint['state_dict']) == set(timm.create_model('test_resnet', num_classes=10).state_dict())


def test_rank_killed_under_torchrun_is_restarted_and_ends_as_a_whole_run(digits, digits_teacher, tmp_path):
    # The shim kills rank 1 by SIGKILL in epoch 1, the first time only.
    shim = tmp_path / 'shim.py'
    shim.write_text(
        'import os, signal, sys\n'
        f'sys.path.insert(0, {str(REPOSITORY)!r})\n'
        'from timm_kd import loop, train\n'
        'after_update = loop.Loop._after_update\n'
        'def die_once(self, progress):\n'
        '    after_update(self, progress)\n'
        '    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"\n'
        '    if progress.epoch == 1 and os.environ["RANK"] == "1" and first_start:\n'
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
        'loop.Loop._after_update = die_once\n'
        'train.main()\n'
    )
    args = [*script_args(digits, digits_teacher, tmp_path), '--resume', 'auto']
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1',
        str(shim), *args,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=400)
    assert done.returncode == 0, done.stderr
    assert 'going on from' in done.stderr
    whole = tmp_path / 'whole'
    args[args.index(str(tmp_path))] = str(whole)
    run_on_ranks(train.main, (args,), whole)
    assert (tmp_path / 'run' / 'summary.csv').read_bytes() == (whole / 'run' / 'summary.csv').read_bytes()
