"""The command lines of the trainings, and running them."""
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..losses import KD_LOSSES
from ..report.groups import last
from ..report.runs import read_run

CONFIG = 'digits_demo'  # a recipe that ships with the package
TEACHER_MODEL, STUDENT_MODEL = 'test_resnet', 'test_efficientnet'
BASELINE = 'cross-entropy'
# Flags of the teacher beyond the recipe of the students.
TEACHER_FLAGS = '--model', TEACHER_MODEL, '--train-split', 'train', '--batch-size', '50', '--epochs', '12'


def python() -> str:
    """Return the interpreter, as one would type it."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def command(output: Path, experiment: str, flags: Sequence[str]) -> list[str]:
    """Return the command line of one training, as it can be repeated by hand."""
    return [
        python(), '-m', 'timm_kd.train', str(output / 'digits'), '-c', CONFIG, *flags,
        '--output', str(output / 'train'), '--experiment', experiment,
    ]


def teacher_file(runs: Path) -> Path:
    """Return the checkpoint that teaches: the last one, the best would be chosen by the validation images."""
    return runs / 'teacher' / 'last.pth.tar'


def student_flags(output: Path, loss: str, seed: int) -> list[str]:
    """Return the flags of a student beyond the recipe: its loss, and the teacher where the loss needs one."""
    flags = [] if loss == BASELINE else ['--kd-loss', loss]
    if loss != BASELINE and KD_LOSSES[loss].needs_teacher:
        flags += ['--teacher', str(teacher_file(output / 'train')), '--teacher-model', TEACHER_MODEL]
    return [*flags, '--seed', str(seed)]


def train(commands: dict[str, list[str]], runs: Path) -> None:
    """Run trainings, each with one thread, as many at a time as there are cores, up to four.

    Args:
        commands: Command line of each run by its name.
        runs: Folder of the runs; what one says goes to `<name>/log.txt` there.

    Raises:
        SystemExit: If one fails; with the end of its log.
    """
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 4))
    try:
        list(pool.map(partial(_train_one, runs), commands, commands.values()))  # raises what one has raised
    finally:
        pool.shutdown(cancel_futures=True)


def _train_one(runs: Path, name: str, words: list[str]) -> None:
    log = runs / name / 'log.txt'
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, 'w') as stream:
        environment = {'OMP_NUM_THREADS': '1', **os.environ}
        code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit('\n'.join([*log.read_text().splitlines()[-5:], f'{name} failed with code {code}, see {log}']))
    top1 = last('eval_top1')(read_run(log.parent))
    print(f'  {name}: top-1 {top1:.1f} in {time.perf_counter() - start:.0f} s', flush=True)
