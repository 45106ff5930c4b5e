"""Which loss teaches best: every loss at its defaults, then a small grid of its own knobs, over seeds.

    python benchmarks/study.py DATA --teacher local-dir:TEACHER --out DIR [--seeds 3] [--epochs 30] \\
        [--grid-epochs 15] [-- MORE FLAGS]

The grid is trained with the first seed; the best setting of each loss there, with all of them. With `--grid-epochs` its
runs, and the defaults beside them, are of that length and go into DIR/grid, the others into DIR/train. A study can be
stopped and started again: runs that are done are left as they are. The teacher's logits are computed once for each seed
and read by all losses. The results are the reports of `python -m timm_kd.report` on the folders.
"""
import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    study = Study(parser.parse_args(words[:end]), words[end + 1:])
    options, losses = study.options, study.options.losses
    defaults = {**{loss: ['--kd-loss', loss] for loss in losses}, 'cross-entropy': []}
    for seed in range(options.seeds):  # a study that is stopped has compared all losses on the seeds so far
        study.train('train', defaults, seed, options.epochs)
    study.wait()
    folders = ['train']
    if not options.no_grid:
        folder, epochs = ('grid', options.grid_epochs) if options.grid_epochs else ('train', options.epochs)
        grids = {loss: dict(grid(loss, epochs)) for loss in losses}
        for settings in [defaults, *grids.values()]:
            study.train(folder, settings, 0, epochs)
        study.wait()
        best = {}
        for settings in grids.values():
            name = max(settings, key=lambda name: study.top1_of(folder, f'{name}-0'))
            best[name] = settings[name]
        for seed in range(1, options.seeds):
            study.train(folder, {**best, **defaults}, seed, epochs)
        study.wait()
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


class Study:
    """The runs of one study, two at a time where there are two cores."""

    def __init__(self, options: argparse.Namespace, further: list[str]):
        self.options = options
        self.further = further
        self.pool = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
        self.runs = []

    def train(self, folder: str, settings: dict[str, list[str]], seed: int, epochs: int) -> None:
        """Queue a run of each setting (name -> flags)."""
        for name, flags in settings.items():
            self.runs.append(self.pool.submit(self._run, folder, f'{name}-{seed}', flags, seed, epochs))

    def wait(self) -> None:
        """Wait for what is queued; the first run that failed ends the study."""
        for run in self.runs:
            run.result()

    def top1_of(self, folder: str, experiment: str) -> float:
        """Return the last top-1 of a run."""
        return last('eval_top1')(read_run(self.options.out / folder / experiment))

    def _run(self, folder: str, experiment: str, flags: list[str], seed: int, epochs: int) -> None:
        options = self.options
        if read_run(options.out / folder / experiment).state == 'done':
            return
        words = [
            sys.executable, 'train_kd.py', options.data, '--model', options.student,
            '--num-classes', options.num_classes, *shlex.split(STUDENT),
            '--epochs', str(epochs), '--seed', str(seed), '--replayable-data', *flags,
            '--output', str(options.out / folder), '--experiment', experiment, '--resume', 'auto', *self.further,
        ]
        if '--kd-loss' in flags and KD_LOSSES[flags[1]].needs_teacher:
            words += ['--teacher', options.teacher, '--teacher-cache', str(options.out / f'logits-{seed}')]
        log = options.out / 'logs' / folder / f'{experiment}.txt'
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, 'w') as stream:
            environment = {'OMP_NUM_THREADS': '1', **os.environ}
            code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            said = log.read_text().splitlines()[-3:]
            raise SystemExit('\n'.join([*said, f'{shlex.join(words)}: code {code}, {log}']))
        print(f'{folder}/{experiment}: top-1 {self.top1_of(folder, experiment):.2f}', flush=True)


if __name__ == '__main__':
    main()
