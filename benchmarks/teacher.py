#!/usr/bin/env python
"""What a teacher adds to a training step: a plain step, timm's own distillation, and ours in three ways.

The steps (forward and backward; the optimizer's is the same for all) run in turn in one process, on the same student.
Ours runs as it is by default, without folded batch norms, and compiled. Times are medians; a ratio is the median over
rounds of what one step adds to the plain one over what another adds. Weights are random unless `--pretrained`: they do
not change the time. The output is markdown, and its last lines are a verdict for each bar.

    python benchmarks/teacher.py --student resnet18 --teacher resnet34 --batch-size 16 --channels-last --rounds 20
"""
import argparse
import copy
import os
import platform
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
from common import alternate
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from torch import nn

from timm_kd import KDTask, Teacher, create_kd_loss

# What the teacher may add. In bfloat16: over what timm's task adds; in float32: over ours without folded batch norms.
BARS = {
    'bfloat16': ('timm', {'ours': 0.48, 'compiled': 0.40}),
    'float32': ('unfolded', {'ours': 0.88, 'compiled': 0.80}),
}
OURS = ('ours', 'unfolded', 'compiled')


def make_tasks(
        student_name: str,
        teacher_name: str,
        num_classes: int,
        device: torch.device,
        *,
        teacher_dtype: str = 'auto',
        pretrained: bool = False,
        channels_last: bool = False,
        compile_backend: str = 'inductor',
) -> tuple[dict[str, TrainingTask], nn.Module]:
    """Return the tasks, on one student and one teacher's weights; and that student."""
    torch.manual_seed(0)
    student = timm.create_model(student_name, num_classes=num_classes).to(device)
    if channels_last:
        student.to(memory_format=torch.channels_last)
    model = timm.create_model(teacher_name, pretrained=pretrained, num_classes=num_classes).to(device)
    cfg = student.pretrained_cfg
    criterion = nn.CrossEntropyLoss()
    tasks: dict[str, TrainingTask] = {
        'plain': ClassificationTask(student, criterion, device=device, verbose=False),
        'timm': LogitDistillationTask(
            student, copy.deepcopy(model), criterion, temperature=4.0, device=device, verbose=False,
        ),
    }
    for name in OURS:
        teacher = Teacher(
            copy.deepcopy(model), num_classes, mean=cfg['mean'], std=cfg['std'], device=device, dtype=teacher_dtype,
            fold_bn=name != 'unfolded', compile_backend=compile_backend if name == 'compiled' else None,
        )
        kd_loss = create_kd_loss('kd', temperature=4.0)
        tasks[name] = KDTask(student, kd_loss, teacher, criterion, device=device, verbose=False)
    for task in tasks.values():
        task.train()
    return tasks, student


def make_step(
        task: TrainingTask,
        student: nn.Module,
        batch: tuple[torch.Tensor, torch.Tensor],
        args: argparse.Namespace,
) -> Callable[[], None]:
    """Return the forward and backward of a task on a batch."""
    def step() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast(args.device, torch.bfloat16) if args.amp else nullcontext():
            loss = task(*batch)['loss']
        loss.backward()
    return step


@torch.no_grad()
def logit_errors(tasks: dict[str, TrainingTask], images: torch.Tensor) -> dict[str, float]:
    """Return the largest difference of our teachers' logits from timm's in float32, in percent of their range."""
    timms = tasks['timm']
    exact = timms.teacher(timms.teacher.normalize_input(images, timms.student_mean, timms.student_std)).float()
    span = exact.max() - exact.min()
    return {name: 100 * ((tasks[name].teacher(images) - exact).abs().max() / span).item() for name in OURS}


@torch.no_grad()
def convolution_share(teacher: Teacher, images: torch.Tensor) -> float:
    """Return the share of an uncompiled teacher's time on the CPU that its convolutions take, in percent.

    What folding and compiling save is at most the rest.
    """
    teacher(images)
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            teacher(images)
    seconds = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return 100 * sum(value for name, value in seconds.items() if 'conv' in name) / sum(seconds.values())


def added_ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """Return the median over rounds of what one step adds to the plain one over what another adds."""
    rounds = zip(times['plain'], times[name], times[other], strict=True)
    return statistics.median((one - plain) / (two - plain) for plain, one, two in rounds)


def report(times: dict[str, list[float]], errors: dict[str, float], args: argparse.Namespace) -> None:
    """Print the table."""
    median = {name: statistics.median(values) for name, values in times.items()}
    print("| step | seconds | images/s | of plain | added | added, of timm's | logits off |")
    print('|---|---|---|---|---|---|---|')
    for name, value in median.items():
        ratio = '' if name == 'plain' else f'{added_ratio(times, name, "timm"):.2f}'
        off = f'{errors[name]:.2g} %' if name in errors else ''
        print(
            f'| {name} | {value:.3f} | {args.batch_size / value:.1f} | {value / median["plain"]:.2f} '
            f'| {value - median["plain"]:.3f} | {ratio} | {off} |'
        )


def judge(times: dict[str, list[float]], tasks: dict[str, TrainingTask]) -> None:
    """Print a verdict for each bar."""
    teacher = tasks['compiled'].teacher
    precision = str(teacher.dtype).removeprefix('torch.')
    if precision not in BARS:
        print(f'no bar for {precision}')
        return
    other, bars = BARS[precision]
    for name, bar in bars.items():
        ratio = added_ratio(times, name, other)
        failed = name == 'compiled' and 'compiled by' not in teacher.describe()
        verdict = 'NOT COMPILED, see the warning' if failed else 'holds' if ratio <= bar else 'MISSED'
        print(f'{precision}, added by {name} over added by {other}: {ratio:.3f}, bar {bar:.2f}: {verdict}')


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
    parser.add_argument('--channels-last', action='store_true', help='student and images in channels-last layout')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--rounds', type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tasks, student = make_tasks(
        args.student, args.teacher, args.num_classes, torch.device(args.device), teacher_dtype=args.teacher_dtype,
        pretrained=args.pretrained, channels_last=args.channels_last,
    )
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    target = torch.randint(args.num_classes, (args.batch_size,), device=args.device)
    steps = {name: make_step(task, student, (images, target), args) for name, task in tasks.items()}
    for step in steps.values():
        step()  # warm-up, and compilation
    times = alternate(steps, args.rounds, args.device)
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{args.threads} threads, {platform.machine()}'
    layout = ', channels-last' if args.channels_last else ''
    print(
        f'`{args.student}` from `{args.teacher}`, {args.batch_size} images of {args.img_size} px{layout}, {device}, '
        f'torch {torch.__version__}, {args.rounds} rounds\n'
    )
    print(f'teacher: {tasks["ours"].teacher.describe()}\n')
    report(times, logit_errors(tasks, images), args)
    if args.device == 'cpu':
        share = convolution_share(tasks['ours'].teacher, images)
        print(f'\n{share:.0f} % of the time of our teacher is in its convolutions')
    print()
    judge(times, tasks)


if __name__ == '__main__':
    main()
