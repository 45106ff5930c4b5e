#!/usr/bin/env python
"""What only a GPU can show, in one command: whether the CUDA path holds, and what it costs there.

    python benchmarks/gpu.py           # about ten minutes on one H100, no network; needs the demo extra
    python benchmarks/gpu.py --tiny    # small models on the CPU: does this command itself work?

It prints Markdown for RESULTS.md: four sections, in each a table and a verdict for each check. A check that fails does
not keep the others from running; the exit code is 1 if any did. What is judged of speed is judged on a GPU alone.
Weights are random and images synthetic, which changes no time.
"""
import argparse
import csv
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Step, alternate, peak_bytes
from loader import write_images
from losses import make_steps, measure
from teacher import make_tasks
from teacher_cache import cache_key
from timm.data import create_dataset, create_loader
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.task.task import TrainingTask
from timm.utils import NativeScaler
from torch import nn
from torch.utils.data import BatchSampler

from timm_kd import KDTask
from timm_kd.demo.digits import write_digits
from timm_kd.engine import StepSettings, train_one_epoch
from timm_kd.errors import shortened
from timm_kd.losses import KD_LOSSES, create_kd_loss
from timm_kd.meters import SkippedSteps, StepTotals
from timm_kd.process import setup_process
from timm_kd.replay import ReplayBatchSampler
from timm_kd.replay.batches import ShuffledSampler
from timm_kd.teacher_cache import CachedTeacher, CacheFolder

ROOT = Path(__file__).resolve().parents[1]
LOSS_ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # a gradient is rounded to its dtype
AMP_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Size:
    """How large everything is."""
    pairs: Sequence[tuple[str, str]] = (('resnet18', 'resnet34'), ('mobilenetv3_large_100', 'resnet50'))
    shapes: Sequence[tuple[int, int]] = ((256, 1000), (256, 21841))
    num_classes: int = 1000
    img_size: int = 224
    batch_size: int = 256
    steps: int = 8  # in a timed epoch
    rounds: int = 6
    backend: str = 'inductor'
    images: int = 512
    workers: int = os.cpu_count() or 1
    digits: Sequence[int] = (1000, 500)  # images that the teacher and the students learn from
    epochs: int = 8


TINY = Size(
    pairs=[('test_efficientnet', 'test_resnet')], shapes=[(8, 50)], num_classes=10, img_size=32, batch_size=4, steps=2,
    rounds=2, backend='aot_eager', images=16, workers=1, digits=(1200, 50), epochs=2,
)


class Report:
    """What is printed: sections, and verdicts that are counted.

    Args:
        device: 'cuda', or 'cpu', where speed and waiting are not judged.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.failed = 0

    def judge(self, what: str, holds: bool, seen: str, only_on_gpu: bool = False) -> None:
        """Print a verdict."""
        verdict = 'holds' if holds else '**FAILED**'
        if only_on_gpu and self.device != 'cuda':
            verdict = 'not judged here'
        self.failed += 'FAILED' in verdict
        print(f'- {what}: {seen}: {verdict}', flush=True)

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """Make an error of what is inside a verdict; its traceback goes to stderr."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.judge(what, False, f'{type(error).__name__}, {shortened(error)}')


def check_losses(report: Report, size: Size) -> None:
    """Compare value and gradient with the float64 formula on the CPU, and the time with cross-entropy's."""
    print('\n## The losses\n\n| loss | logits | cross-entropy ms | ours ms | plain ms | ours / CE |')
    print('|---|---|---|---|---|---|')
    added = dict.fromkeys(KD_LOSSES, 0.0)
    for shape in size.shapes:
        for name in KD_LOSSES:
            steps = make_steps(name, shape, report.device, pairs=False)
            medians, ratios = measure(steps, 5 * size.rounds, report.device)
            added[name] = max(added[name], 1e3 * (medians['ours'] - medians['cross-entropy']))
            ms = ' | '.join(f'{1e3 * seconds:.3f}' for seconds in medians.values())
            print(f'| {name} | {list(shape)} | {ms} | {ratios["ours"]:.2f}x |', flush=True)
    print()
    for name in KD_LOSSES:
        for dtype, bar in LOSS_ERRORS.items():
            what = f'{name}, {str(dtype).removeprefix("torch.")}, off the float64 formula by at most {bar:g}'
            with report.check(what):
                error = max(loss_error(name, shape, dtype, report.device) for shape in size.shapes)
                report.judge(what, error <= bar, f'{error:.1g}')
        report.judge(f'{name}, at most 1 ms over cross-entropy', added[name] <= 1, f'{added[name]:.2f} ms', True)


def loss_error(name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> float:
    """Return the largest relative error of value and gradient, with hard targets and those of Mixup."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    classes = torch.randint(shape[1], shape[:1], generator=generator)

    def results(loss: nn.Module, place: dict[str, Any], target: torch.Tensor) -> Iterator[torch.Tensor]:
        logits = student.to(**place, copy=True).requires_grad_()
        value = loss(logits, teacher.to(**place) if loss.needs_teacher else None, target)['kd_loss']
        value.backward()
        return (part.detach().cpu().double() for part in (value, logits.grad))

    errors = []
    for target in (classes, mixup_target(classes, shape[1], lam=0.7)):
        ours = results(create_kd_loss(name), {'device': device}, target.to(device))
        exact = results(create_kd_loss(name, double_backward=True), {'dtype': torch.float64}, target)
        errors += [((own - true).abs().max() / true.abs().max()).item() for own, true in zip(ours, exact, strict=True)]
    return max(errors)


class Batches:
    """A loader that takes no time: one batch, as often as the sampler of a replayable loader has one."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], sampler: ReplayBatchSampler) -> None:
        self.batch = batch
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self.batch for _ in self.sampler)


def check_steps(report: Report, size: Size, home: Path) -> dict[str, float]:
    """Train each pair in each way under both autocasts; return the images per second of each bfloat16 step."""
    rates: dict[str, float] = {}
    device = torch.device(report.device)
    for student_name, teacher_name in size.pairs:
        print(f'\n## Steps: {student_name} from {teacher_name}, {size.batch_size} images of {size.img_size} px\n')
        with report.check(f'{student_name} from {teacher_name}'):
            tasks, student = make_tasks(
                student_name, teacher_name, size.num_classes, device, channels_last=True, compile_backend=size.backend,
            )
            images = torch.randn(size.batch_size, 3, size.img_size, size.img_size, device=device)
            images = images.to(memory_format=torch.channels_last)
            target = torch.randint(size.num_classes, (size.batch_size,), device=device)
            rows = ShuffledSampler(range(size.steps * size.batch_size), num_replicas=1, rank=0)
            loader = Batches((images, target), ReplayBatchSampler(BatchSampler(rows, size.batch_size, True), seed=0))
            live = tasks['ours'].teacher
            store = partial(CacheFolder, home / teacher_name, cache_key(len(rows), size.num_classes))
            with CachedTeacher(store(), loader.sampler, device, live) as filling:
                for _ in loader:
                    filling(images)
            with CachedTeacher(store(), loader.sampler, device) as stored:
                tasks['stored'] = KDTask(student, create_kd_loss('kd'), stored, device=device, verbose=False)
                for dtype in AMP_DTYPES:
                    with report.check(f'{student_name} from {teacher_name}, {dtype}'):
                        times = run_steps(report, size, tasks, loader, dtype)
                        if dtype == torch.bfloat16:
                            names = {way: f'{student_name}, {way}' for way in times}
                            rates |= {names[way]: size.batch_size / seconds for way, seconds in times.items()}
            compiled = tasks['compiled'].teacher.describe()
            report.judge('the compiled teacher compiles', 'compiled by' in compiled, compiled)
    return rates


def run_steps(
        report: Report,
        size: Size,
        tasks: dict[str, TrainingTask],
        loader: Batches,
        dtype: torch.dtype,
) -> dict[str, float]:
    """Time an epoch of each task, see whether its steps wait for the device, and return the seconds of a step."""
    device, kind = report.device, str(dtype).removeprefix('torch.')
    settings = StepSettings(torch.device(device), autocast=partial(torch.autocast, device, dtype), channels_last=True)
    # Of an optimizer that is not fused, torch's scaler reads after each step whether its gradients were finite.
    optimizer = create_optimizer_v2(tasks['plain'].trainable_module, opt='momentum', lr=1e-4, fused=True)
    scaler = NativeScaler(device) if dtype == torch.float16 else None
    skipped = SkippedSteps(optimizer)

    def epoch(task: TrainingTask) -> StepTotals:
        totals = StepTotals(settings.device)
        train_one_epoch(
            task, loader, optimizer, 0, settings, totals, loss_scaler=scaler,
            on_update=lambda progress: skipped.count_update(),
        )
        return totals

    steps: dict[str, Step] = {way: partial(epoch, task) for way, task in tasks.items()}
    for step in steps.values():
        step()  # warm-up: the first answers are checked, kernels chosen, the teacher compiled
        step()
    medians = {way: statistics.median(each) / size.steps for way, each in alternate(steps, size.rounds, device).items()}
    added = {way: value - medians['plain'] for way, value in medians.items()}
    print(f"\n| {kind} autocast | ms | images/s | of plain | added, of timm's | peak MB |\n|---|---|---|---|---|---|")
    for way, value in medians.items():
        print(
            f'| {way} | {1e3 * value:.1f} | {size.batch_size / value:.0f} | {value / medians["plain"]:.2f} '
            f'| {added[way] / added["timm"]:.2f} | {peak_bytes(steps[way], device) / 2 ** 20:.0f} |',
            flush=True,
        )
    print()
    for way, task in tasks.items():
        loss = epoch(task).averages()['loss']
        report.judge(f'{kind}, {way}: the loss is finite', math.isfinite(loss), f'{loss:.3f}')
    for way, step in steps.items():
        if way != 'timm':  # whose task compares its means on the host in each step
            place = first_wait(step, device)
            report.judge(f'{kind}, {way}: no step waits for the device', not place, place or 'none does', True)
    report.judge(f"{kind}: ours adds no more than timm's", added['ours'] <= added['timm'],
                 f'{1e3 * added["ours"]:.1f} ms to {1e3 * added["timm"]:.1f} ms', True)
    report.judge(f'{kind}: stored logits cost at most 3 %', medians['stored'] <= 1.03 * medians['plain'],
                 f'{medians["stored"] / medians["plain"]:.3f} of a plain step', True)
    return medians


def first_wait(step: Step, device: str) -> str:
    """Return the line of the first operation in a step for which the host waits; '' where there is none."""
    if device == 'cuda':
        torch.cuda.set_sync_debug_mode('error')
        try:
            step()
        except RuntimeError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f'{shortened(error)} ({Path(last.filename).name}, line {last.lineno}: `{last.line}`)'
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return ''


def check_loader(report: Report, size: Size, home: Path, rates: dict[str, float]) -> None:
    """Time timm's loader on JPEGs beside the steps."""
    print(f'\n## The loader beside the steps: JPEGs to {size.img_size} px, {size.workers} workers\n')
    write_images(home, size.images, size.img_size * 3 // 2, size.img_size * 3 // 2)
    dataset = create_dataset('', root=str(home), split='train')
    wanted = 4 * size.workers * size.batch_size
    dataset.reader.samples *= -(-wanted // size.images)  # the same files again: every worker has several batches
    loader = create_loader(
        dataset, size.img_size, size.batch_size, is_training=True, num_workers=size.workers,
        pin_memory=report.device == 'cuda', device=torch.device(report.device), interpolation='random',
    )

    def epoch() -> None:
        for _ in loader:
            pass

    epoch()  # starts the workers
    rate = len(loader) * size.batch_size / alternate({'loader': epoch}, 1, report.device)['loader'][0]
    print('| what | images/s | the limit is |\n|---|---|---|')
    print(f'| the loader | {rate:.0f} | |')
    for name, own in rates.items():
        print(f'| {name} | {own:.0f} | {"the loader" if rate < own else "the step"} |')


def check_digits(report: Report, size: Size, home: Path) -> None:
    """Train on digits through the script: a teacher, a student that fills a cache and is resumed, one that reads."""
    print('\n## A run on the digits, to its end\n')
    write_digits(home / 'digits', *size.digits)
    base = ['--device', report.device, '--epochs', str(size.epochs), '--val-interval', '1', '--output', str(home)]
    if report.device == 'cuda':
        base += ['--amp', '--amp-dtype', 'float16', '--channels-last', '--workers', '2']
    recipe = str(ROOT / 'hparams/digits_demo.yaml')
    script = [sys.executable, str(ROOT / 'train_kd.py'), str(home / 'digits'), '-c', recipe]

    def run(name: str, *flags: str) -> str:
        """Run the script and return what it logs."""
        words = [*script, *base, '--experiment', name, *flags]
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f'{name} ended with {done.returncode}: {done.stderr[-500:]}')
        return done.stderr

    def rows(name: str) -> list[dict[str, str]]:
        with open(home / name / 'summary.csv', newline='') as file:
            return list(csv.DictReader(file))

    run('teacher', '--model', 'test_resnet', '--train-split', 'train', '--batch-size', '50')
    student = [
        '--kd-loss', 'nkd', '--teacher', str(home / 'teacher/last.pth.tar'), '--teacher-model', 'test_resnet',
        '--teacher-cache', str(home / 'cache'), '--replayable-data', '--drop', '0.1', '--model-ema',
    ]
    run('filled', *student, '--stop-epoch', str(size.epochs // 2))
    resumed = run('filled', *student, '--resume', 'auto')
    read = run('read', *student)
    print('| run | epochs | top-1 |\n|---|---|---|')
    for name in ('teacher', 'filled', 'read'):
        print(f'| {name} | {len(rows(name))} | {float(rows(name)[-1]["eval_top1"]):.1f} |')
    print()
    count = len(rows('filled'))
    report.judge('the stopped run goes on to its end', 'going on from' in resumed and count == size.epochs,
                 f'{count} epochs')
    alone = 'the teacher is not needed' in read
    report.judge('the third run reads what the first two stored', alone, 'without a teacher' if alone else 'it did not')
    losses = [[float(row['train_loss']) for row in rows(name)] for name in ('filled', 'read')]
    apart = max(abs(one - other) / other for one, other in zip(*losses, strict=True))
    # The kernels of cuDNN add in an order of their own each time, and training magnifies it.
    bar = 0.1 if report.device == 'cuda' else 0.0
    report.judge(f'filled and resumed as read in one go, losses within {bar:g}', apart <= bar, f'{apart:.1g} apart')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tiny', action='store_true', help='small models on the CPU')
    size, device = (TINY, 'cpu') if parser.parse_args().tiny else (Size(), 'cuda')
    if device == 'cuda' and not torch.cuda.is_available():
        parser.error('torch finds no GPU here: --tiny runs on the CPU.')
    logging.basicConfig(level=logging.WARNING)
    setup_process(device)  # cuDNN and TF32 as the script sets them
    report = Report(device)
    name = torch.cuda.get_device_name() if device == 'cuda' else 'CPU, tiny'
    print(f'`python benchmarks/gpu.py`: {name}, torch {torch.__version__}, {os.cpu_count()} cores')
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with report.check('the losses run'):
            check_losses(report, size)
        with report.check('the steps run'):
            rates = check_steps(report, size, home / 'caches')
        with report.check('the loader runs'):
            check_loader(report, size, home / 'jpegs', rates)
        with report.check('the digits run'):
            check_digits(report, size, home / 'runs')
    print(f'\n{report.failed or "No"} checks failed.')
    sys.exit(bool(report.failed))


if __name__ == '__main__':
    main()
