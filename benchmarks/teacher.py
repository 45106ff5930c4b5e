#!/usr/bin/env python
"""What a teacher adds to a training step: the plain step, timm's own distillation and ours, with the same student.

The three steps (forward and backward; the optimizer's is the same for all) run in turn in one process. Times are
medians; the ratio is the median over rounds of what ours adds to the plain step over what timm's adds. Weights are
random unless `--pretrained`: they do not change the time. The output is markdown.

    python benchmarks/teacher.py --student resnet18 --teacher resnet34 [--device cuda --amp] [--rounds 10]
"""
import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from torch import nn

from timm_kd import KDTask, Teacher, create_kd_loss


def make_tasks(args: argparse.Namespace) -> tuple[dict[str, TrainingTask], nn.Module]:
    """The three tasks on one student and one teacher's weights; and that student."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    student = timm.create_model(args.student, num_classes=args.num_classes).to(device)
    model = timm.create_model(args.teacher, pretrained=args.pretrained, num_classes=args.num_classes).to(device)
    theirs = copy.deepcopy(model)
    cfg = student.pretrained_cfg
    teacher = Teacher(
        model, args.num_classes, mean=cfg['mean'], std=cfg['std'], device=device, dtype=args.teacher_dtype,
    )
    criterion = nn.CrossEntropyLoss()
    kd_loss = create_kd_loss('kd', temperature=4.0)
    tasks = {
        'plain': ClassificationTask(student, criterion, device=device, verbose=False),
        'timm': LogitDistillationTask(student, theirs, criterion, temperature=4.0, device=device, verbose=False),
        'ours': KDTask(student, kd_loss, teacher, criterion, device=device, verbose=False),
    }
    for task in tasks.values():
        task.train()
        if args.torchcompile:
            task.compile()
    return tasks, student


def make_step(
        task: TrainingTask,
        student: nn.Module,
        batch: tuple[torch.Tensor, torch.Tensor],
        args: argparse.Namespace,
) -> Callable[[], None]:
    """Forward and backward of a task on a batch."""
    def step() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast(args.device, torch.bfloat16) if args.amp else nullcontext():
            loss = task(*batch)['loss']
        loss.backward()
    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Wall time of one step."""
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def logit_error(tasks: dict[str, TrainingTask], images: torch.Tensor) -> float:
    """Largest difference of our teacher's logits from timm's, in float32, over the range of the latter."""
    timms = tasks['timm']
    exact = timms.teacher(timms.teacher.normalize_input(images, timms.student_mean, timms.student_std)).float()
    return ((tasks['ours'].teacher(images) - exact).abs().max() / (exact.max() - exact.min())).item()


def report(times: dict[str, list[float]], args: argparse.Namespace) -> None:
    """The table, and the ratio."""
    median = {name: statistics.median(values) for name, values in times.items()}
    print('| step | seconds | images/s | of plain | added |\n|---|---|---|---|---|')
    for name, value in median.items():
        print(
            f'| {name} | {value:.3f} | {args.batch_size / value:.1f} | {value / median["plain"]:.2f} '
            f'| {value - median["plain"]:.3f} |'
        )
    ratios = [
        (ours - plain) / (timms - plain)
        for plain, timms, ours in zip(times['plain'], times['timm'], times['ours'], strict=True)
    ]
    print(f"\nWhat the teacher adds, ours over timm's: {statistics.median(ratios):.2f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--student', default='resnet18')
    parser.add_argument('--teacher', default='resnet34')
    parser.add_argument('--pretrained', action='store_true', help="the teacher's pretrained weights")
    parser.add_argument('--num-classes', type=int, default=1000)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--teacher-dtype', default='auto')
    parser.add_argument('--amp', action='store_true', help='student, and timm\'s teacher, in bfloat16 autocast')
    parser.add_argument('--torchcompile', action='store_true')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--rounds', type=int, default=7)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tasks, student = make_tasks(args)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    target = torch.randint(args.num_classes, (args.batch_size,), device=args.device)
    steps = {name: make_step(task, student, (images, target), args) for name, task in tasks.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, args.device))
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{args.threads} threads, {platform.machine()}'
    print(f'`{args.student}` from `{args.teacher}`, {args.batch_size} images of {args.img_size} px, {device}\n')
    print(f'teacher: {tasks["ours"].teacher.describe((args.img_size, args.img_size))}\n')
    report(times, args)
    print(f"\nTeacher logits off from timm's by at most {100 * logit_error(tasks, images):.2g} % of their range.")


if __name__ == '__main__':
    main()
