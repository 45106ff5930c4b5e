#!/usr/bin/env python
"""What the distillation losses cost beside cross-entropy: time and memory of forward and backward.

For each loss of `KD_LOSSES` and each shape three ways run in turn, in one process: `F.cross_entropy`, ours (the closed
form) and the plain formula (autograd through the paper's operations). Times are medians; ratios are the median of each
round's ratio.
Memory is the peak of what forward and backward allocate beyond their inputs, the resulting gradient included, in MB
and in float32 tensors of the logits' shape. The output is markdown. Run it on an idle machine.

    python benchmarks/losses.py [--device cpu] [--threads 2] [--rounds 30] [--pairs]
"""
import argparse
import platform
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Step, alternate, peak_bytes
from timm.data.mixup import mixup_target

from timm_kd.losses import KD_LOSSES, create_kd_loss

SHAPES = ((256, 1000), (256, 21841))
BARS = {'kd': 4.0, 'dkd': 5.0, 'nkd': 4.5, 'tfnkd': 2.2, 'tfkd': 2.5}


def make_steps(name: str, shape: tuple[int, int], device: str, pairs: bool) -> dict[str, Step]:
    """Return the three steps to compare, each of which goes from logits, a leaf, to their gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(shape, generator=generator).to(device) for _ in range(2))
    target = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    if pairs:
        target = mixup_target(target, shape[1], lam=0.7)
    student.requires_grad_()

    def step(loss: Callable[[], torch.Tensor]) -> Step:
        def run() -> None:
            loss().backward()
            student.grad = None
        return run

    ours, plain = create_kd_loss(name), create_kd_loss(name, double_backward=True)
    teacher = teacher if ours.needs_teacher else None
    return {
        'cross-entropy': step(lambda: F.cross_entropy(student, target)),
        'ours': step(lambda: ours(student, teacher, target)['kd_loss']),
        'plain': step(lambda: plain(student, teacher, target)['kd_loss']),
    }


def measure(steps: dict[str, Step], rounds: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of each step, and the median over the rounds of its time over cross-entropy's."""
    for step in steps.values():
        for _ in range(3):
            step()
    times = alternate(steps, rounds, device)
    medians = {way: statistics.median(values) for way, values in times.items()}
    ratios = {
        way: statistics.median(own / other for own, other in zip(values, times['cross-entropy'], strict=True))
        for way, values in times.items()
    }
    return medians, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads')
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--pairs', action='store_true', help='dense targets of Mixup instead of hard ones')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    where = torch.cuda.get_device_name() if args.device == 'cuda' else f'{platform.machine()}, {args.threads} threads'
    print(f'torch {torch.__version__}, {where}, float32, {"Mixup" if args.pairs else "hard"} targets\n')
    print('| loss | logits | cross-entropy ms | ours ms | plain ms | ours / CE | bar | plain / CE | ours MB (logits) |'
          ' plain MB (logits) |')
    print('|---|---|---|---|---|---|---|---|---|---|')
    for shape in SHAPES:
        for name in KD_LOSSES:
            steps = make_steps(name, shape, args.device, args.pairs)
            medians, ratios = measure(steps, args.rounds, args.device)
            ms = ' | '.join(f'{1e3 * medians[way]:.2f}' for way in steps)
            memory = []
            for way in ('ours', 'plain'):
                peak = peak_bytes(steps[way], args.device)
                memory.append(f'{peak / 2 ** 20:.1f} ({peak / (4 * shape[0] * shape[1]):.2f})')
            bar = f'{BARS[name]:.1f}x' if name in BARS and not args.pairs else ''
            print(f'| {name} | {list(shape)} | {ms} | {ratios["ours"]:.2f}x | {bar} | {ratios["plain"]:.2f}x | '
                  + ' | '.join(memory) + ' |', flush=True)


if __name__ == '__main__':
    main()
