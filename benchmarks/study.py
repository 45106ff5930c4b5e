"""Which loss teaches best: every loss at its defaults, then a small grid of its own knobs, over seeds.

    python benchmarks/study.py DATA --teacher local-dir:TEACHER --out DIR [--seeds 3] [--epochs 30] \\
        [--grid-epochs 15] [-- MORE FLAGS]

The grid is trained with the first seed; the best setting of each loss there, with all of them. With `--grid-epochs` its
runs, and the defaults beside them, are of that length and go into DIR/grid, the others into DIR/train. A study can be
stopped and started again: runs that are done are left as they are. The teacher's logits are computed once for each seed
and read by all losses. The results are the reports of `python -m timm_kd.report` on the folders.
"""
import argparse
import itertools
import shlex
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from timm_kd.demo.__main__ import train
from timm_kd.losses import KD_LOSSES
from timm_kd.report.__main__ import main as report
from timm_kd.report.groups import last
from timm_kd.report.runs import read_run

# One at a time, beside the defaults of a loss with a teacher, which takes those that it has a knob for.
GRID = {
    'temperature': ('1', '2', '4'),
    'beta': ('0.5', '2', '4'),
    'gamma': ('0.5', '1', '3.5'),
    'logit-std': (None,),
}
# For every loss: the share of the epochs over which it is faded in, and its weight beside the task's.
WARM_UPS = {'none': 0, 'third': 1 / 3}
WEIGHTS = ('0.5', '2')
STUDENT = (
    '--img-size 64 --opt adamw --lr 2e-3 --weight-decay 0.05 --warmup-epochs 1 --smoothing 0 --color-jitter 0 -b 64 '
    '--channels-last'
)


def main() -> None:
    """Train what is missing, stage by stage, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', metavar='DATA')
    parser.add_argument('--teacher', required=True, metavar='SPEC')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR')
    parser.add_argument('--losses', nargs='+', choices=[*KD_LOSSES], default=[*KD_LOSSES])
    parser.add_argument('--seeds', type=int, default=3, metavar='N')
    parser.add_argument('--epochs', type=int, default=30, metavar='N')
    parser.add_argument('--grid-epochs', type=int, metavar='N', help='of a run of the grid (as many as the others)')
    parser.add_argument('--student', default='mobilenetv3_small_050', metavar='NAME')
    parser.add_argument('--num-classes', default='10', metavar='N')
    parser.add_argument('--no-grid', action='store_true', help='the losses at their defaults alone')
    words = sys.argv[1:]
    end = words.index('--') if '--' in words else len(words)
    options = parser.parse_args(words[:end])
    stage = partial(train_missing, options, words[end + 1:])
    defaults = {**{loss: ['--kd-loss', loss] for loss in options.losses}, 'cross-entropy': []}
    stage('train', options.epochs, defaults, seeds=range(options.seeds))
    folders = ['train']
    if not options.no_grid:
        folder, epochs = ('grid', options.grid_epochs) if options.grid_epochs else ('train', options.epochs)
        grids = {loss: dict(grid(loss, epochs)) for loss in options.losses}
        every = dict(defaults)
        for settings in grids.values():
            every.update(settings)
        stage(folder, epochs, every, seeds=[0])
        best = {}
        for settings in grids.values():
            name = max(settings, key=lambda name: last('eval_top1')(read_run(options.out / folder / f'{name}-0')))
            best[name] = settings[name]
        stage(folder, epochs, {**best, **defaults}, seeds=range(1, options.seeds))
        folders = sorted({'train', folder})
    raise SystemExit(max(
        report([str(options.out / folder), '--html', str(options.out / f'{folder}.html')]) for folder in folders
    ))


def grid(loss: str, epochs: int) -> Iterable[tuple[str, list[str]]]:
    """Yield name and flags of each setting of a loss beside its defaults, for a run of `epochs`."""
    kd_loss, base = KD_LOSSES[loss], ['--kd-loss', loss]
    own = kd_loss.hyper_parameters() if kd_loss.needs_teacher else {}
    for knob, values in GRID.items():
        default = own.get(knob.replace('-', '_'), ...)
        for value in values if default is not ... else ():
            if value is None or float(value) != default:
                yield f'{loss}-{knob}-{value or "on"}', [*base, f'--kd-{knob}', *([value] if value else [])]
    for name, share in WARM_UPS.items():
        if share != kd_loss.default_warmup:
            yield f'{loss}-warmup-{name}', [*base, '--kd-warmup-epochs', str(round(share * epochs))]
    for weight in WEIGHTS:
        yield f'{loss}-weight-{weight}', [*base, '--distill-loss-weight', weight]


def train_missing(
        options: argparse.Namespace,
        further: list[str],
        folder: str,
        epochs: int,
        settings: dict[str, list[str]],
        seeds: Iterable[int],
) -> None:
    """Train each setting (name -> flags) with each seed, seed by seed, where that is not done yet."""
    commands = {}
    for seed, (name, flags) in itertools.product(seeds, settings.items()):
        experiment = f'{name}-{seed}'
        if read_run(options.out / folder / experiment).state == 'done':
            continue
        commands[experiment] = [
            sys.executable, 'train_kd.py', options.data, '--model', options.student,
            '--num-classes', options.num_classes, *shlex.split(STUDENT),
            '--epochs', str(epochs), '--seed', str(seed), '--replayable-data', *flags,
            '--output', str(options.out / folder), '--experiment', experiment, '--resume', 'auto', *further,
        ]
        if '--kd-loss' in flags and KD_LOSSES[flags[1]].needs_teacher:
            commands[experiment] += [
                '--teacher', options.teacher, '--teacher-cache', str(options.out / f'logits-{seed}')]
    train(commands, options.out / folder)


if __name__ == '__main__':
    main()
