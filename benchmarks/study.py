"""Which loss teaches best: every loss at its defaults, then a small grid of its own knobs, over seeds.

    python benchmarks/study.py DATA --teacher local-dir:TEACHER --out DIR [--seeds 3] [--epochs 30] [-- MORE FLAGS]

It can be stopped and started again: runs that are done are left as they are. The teacher's logits are computed once for
each seed and read by all losses. The result is the report of `python -m timm_kd.report DIR/train`.
"""
import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from timm_kd.losses import KD_LOSSES
from timm_kd.report.__main__ import main as report
from timm_kd.report.groups import last
from timm_kd.report.runs import read_run

# One at a time, beside the defaults of the loss. Losses take those that they have a knob for.
GRID = {
    'temperature': ('1', '2', '4', '8'),
    'alpha': ('0.5', '2'),
    'beta': ('0.5', '2', '4'),
    'gamma': ('0.5', '1', '3.5'),
    'correct-prob': ('0.9', '0.95'),
    'logit-std': (None,),
}
# For every loss: the share of the epochs over which it is faded in, and its weight beside the task's.
WARM_UPS, WEIGHTS = (0, 1 / 3), (0.5, 2.0)
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
    parser.add_argument('--student', default='mobilenetv3_small_050', metavar='NAME')
    parser.add_argument('--num-classes', default='10', metavar='N')
    parser.add_argument('--no-grid', action='store_true', help='the losses at their defaults alone')
    words = sys.argv[1:]
    end = words.index('--') if '--' in words else len(words)
    study = Study(parser.parse_args(words[:end]), words[end + 1:])
    for seed in study.seeds:  # a study that is stopped has compared all losses on the seeds so far
        study.train('cross-entropy', [], [seed])
        for loss in study.options.losses:
            study.train(loss, ['--kd-loss', loss], [seed])
    study.wait()
    if not study.options.no_grid:
        grids = {loss: dict(study.grid(loss)) for loss in study.options.losses}
        for loss, settings in grids.items():
            for name, flags in settings.items():
                study.train(f'{loss}-{name}', flags, study.seeds[:1])
        study.wait()
        for loss, settings in grids.items():
            best = max(settings, key=partial(study.top1_of, loss), default=None)
            if best is not None:
                study.train(f'{loss}-{best}', settings[best], study.seeds)
        study.wait()
    runs = study.options.out / 'train'
    raise SystemExit(report([str(runs), '--html', str(runs.parent / 'report.html')]))


class Study:
    """The runs of one study, two at a time where there are two cores."""

    def __init__(self, options: argparse.Namespace, further: list[str]):
        self.options = options
        self.further = further
        self.seeds = list(range(options.seeds))
        self.pool = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
        self.started = {}

    def grid(self, loss: str) -> Iterable[tuple[str, list[str]]]:
        """Yield name and flags of each setting of a loss beside its defaults."""
        base = ['--kd-loss', loss]
        own = KD_LOSSES[loss].hyper_parameters()
        for knob, values in GRID.items():
            default = own.get(knob.replace('-', '_'), ...)
            for value in values if default is not ... else ():
                if value is None or float(value) != default:
                    yield f'{knob}-{value or "on"}', [*base, f'--kd-{knob}', *([value] if value else [])]
        for share in WARM_UPS:
            epochs = str(round(share * self.options.epochs))
            if float(epochs) != KD_LOSSES[loss].default_warmup_epochs(self.options.epochs):
                yield f'warmup-{epochs}', [*base, '--kd-warmup-epochs', epochs]
        for weight in WEIGHTS:
            yield f'weight-{weight:g}', [*base, '--distill-loss-weight', f'{weight:g}']

    def train(self, name: str, flags: list[str], seeds: list[int]) -> None:
        """Queue a setting for some seeds."""
        for seed in seeds:
            experiment = f'{name}-{seed}'
            if experiment not in self.started:
                self.started[experiment] = self.pool.submit(self._run, experiment, flags, seed)

    def wait(self) -> None:
        """Wait for what is queued; the first run that failed ends the study."""
        for run in self.started.values():
            run.result()

    def top1_of(self, loss: str, setting: str) -> float:
        """Return the last top-1 of a setting's first seed."""
        return last('eval_top1')(read_run(self.options.out / 'train' / f'{loss}-{setting}-0'))

    def _run(self, experiment: str, flags: list[str], seed: int) -> None:
        options = self.options
        words = [
            sys.executable, 'train_kd.py', options.data, '--model', options.student,
            '--num-classes', options.num_classes, *shlex.split(STUDENT),
            '--epochs', str(options.epochs), '--seed', str(seed), '--replayable-data', *flags,
            '--output', str(options.out / 'train'), '--experiment', experiment, '--resume', 'auto', *self.further,
        ]
        if '--kd-loss' in flags and KD_LOSSES[flags[1]].needs_teacher:
            words += ['--teacher', options.teacher, '--teacher-cache', str(options.out / f'logits-{seed}')]
        log = options.out / 'logs' / f'{experiment}.txt'
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, 'w') as stream:
            environment = {'OMP_NUM_THREADS': '1', **os.environ}
            code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            said = log.read_text().splitlines()[-3:]
            raise SystemExit('\n'.join([*said, f'{shlex.join(words)}: code {code}, {log}']))
        print(f'{experiment}: top-1 {last("eval_top1")(read_run(options.out / "train" / experiment)):.2f}', flush=True)


if __name__ == '__main__':
    main()
