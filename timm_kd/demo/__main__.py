"""`python -m timm_kd.demo`: data, a teacher, students, and what they came to."""
import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..losses import KD_LOSSES
from ..report.curves import draw_curves, save_png
from ..report.groups import Group, last, tabulate
from ..report.runs import read_run
from ..report.table import markdown_table
from .digits import write_digits

TRAIN_IMAGES, FEW_IMAGES = 1000, 100  # of 1,797; the rest validates
LOSSES = ('tfnkd', 'dkd', 'nkd')
SEEDS = (0, 1, 2)
CONFIG = 'digits_demo'  # a recipe that ships with the package
TEACHER_MODEL, STUDENT_MODEL = 'test_resnet', 'test_efficientnet'
BASELINE = 'cross-entropy'
# Where the teacher's training differs from the recipe, which is that of the students.
TEACHER_FLAGS = '--model', TEACHER_MODEL, '--train-split', 'train', '--batch-size', '50', '--epochs', '12'


def main(argv: list[str] | None = None) -> None:
    """Run the demo.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: With what to do, if something is missing or in the way, or a training fails.
    """
    parser = argparse.ArgumentParser(prog='python -m timm_kd.demo', description=__doc__)
    parser.add_argument('--losses', nargs='+', choices=tuple(KD_LOSSES), default=LOSSES, help='losses to compare')
    parser.add_argument(
        '--output', type=Path, default=Path('demo_output'), metavar='DIR', help='where all of it goes',
    )
    parser.add_argument('--quick', action='store_true', help='one epoch, one seed: does everything work?')
    options = parser.parse_args(argv)
    _check_installation()
    seeds, further = (SEEDS[:1], ('--epochs', '1')) if options.quick else (SEEDS, ())
    _run(options.output, (BASELINE, *options.losses), seeds, further)


def _run(output: Path, losses: Sequence[str], seeds: Sequence[int], further: Sequence[str]) -> None:
    """Make the data, train teacher and students, with further flags for each of them, and report."""
    start = time.perf_counter()
    _clear(output)
    data, runs = output / 'digits', output / 'train'
    print('timm-kd demo: a teacher and its students on 1,797 real handwritten digits. Minutes on 2 cores.\n')

    sizes = write_digits(data, TRAIN_IMAGES, FEW_IMAGES)
    print(f'1. Images in {data}/: {", ".join(f"{size:,} in {split}/" for split, size in sizes.items())}.\n')

    print(f'2. A teacher, {TEACHER_MODEL}, learns from the {TRAIN_IMAGES:,} images of train/ by cross-entropy.')
    teacher = _command(output, 'teacher', (*TEACHER_FLAGS, *further))
    print(f'  $ {shlex.join(teacher)}', flush=True)
    train({'teacher': teacher}, runs)

    print(f'\n3. Students, {STUDENT_MODEL}, learn from the {FEW_IMAGES} images of few/ by each loss at its defaults.')
    students = {
        f'{loss}-{seed}': _command(output, f'{loss}-{seed}', (*student_flags(output, loss, seed), *further))
        for loss in losses
        for seed in seeds
    }
    for words in [*students.values()][::len(seeds)]:
        print(f'  $ {shlex.join(words)}')
    print(''.join(f'  and the same with --seed {seed}\n' for seed in seeds[1:]), end='', flush=True)
    train(students, runs)

    _report(output, losses, seeds)
    print(f'This took {time.perf_counter() - start:.0f} s.')


def _python() -> str:
    """Return the interpreter, as one would type it."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def _command(output: Path, experiment: str, flags: Sequence[str]) -> list[str]:
    """Return the command line of one training, as it can be repeated by hand."""
    return [
        _python(), '-m', 'timm_kd.train', str(output / 'digits'), '-c', CONFIG, *flags,
        '--output', str(output / 'train'), '--experiment', experiment,
    ]


def student_flags(output: Path, loss: str, seed: int) -> list[str]:
    """Return the flags of a student beyond the recipe: its loss, and the teacher where the loss needs one."""
    flags = [] if loss == BASELINE else ['--kd-loss', loss]
    if loss != BASELINE and KD_LOSSES[loss].needs_teacher:
        # The last checkpoint teaches: the best would be chosen by the validation images.
        teacher = output / 'train' / 'teacher' / 'last.pth.tar'
        flags += ['--teacher', str(teacher), '--teacher-model', TEACHER_MODEL]
    return [*flags, '--seed', str(seed)]


def train(commands: dict[str, list[str]], runs: Path) -> None:
    """Run command lines, by name, up to four at once with one thread each; what they say goes to `runs/NAME/log.txt`.

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


def _report(output: Path, losses: Sequence[str], seeds: Sequence[int]) -> None:
    runs = output / 'train'
    groups = [Group([read_run(runs / f'{loss}-{seed}') for seed in seeds], loss) for loss in losses]
    table = markdown_table(tabulate(groups, baseline=runs / f'{BASELINE}-{seeds[0]}'))
    (output / 'results.md').write_text(table)
    save_png(draw_curves(groups, clock=False), output / 'curves.png')
    push = ['-m', 'timm_kd.hub', 'push', str(runs / f'{losses[-1]}-{seeds[-1]}'), 'me/digits', '--dry-run']
    print(f'\n4. Results on validation/: mean ± standard deviation over the seeds.\n\n{table}\n'
          f'Table: {output}/results.md. Curves: {output}/curves.png. Runs: {runs}/NAME/ (summary.csv, log.txt, ...).\n'
          f'What the last student would bring to the Hugging Face Hub:\n  $ {shlex.join([_python(), *push])}')


def _check_installation() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"the demo needs {error.name}: pip install -e '.[demo]', or make demo") from error


def _clear(output: Path) -> None:
    """Empty the folder of an earlier demo, and no other."""
    marker = output / '.timm_kd_demo'
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise SystemExit(f'--output {output} holds something that no demo has made: name another folder')
    output.mkdir(parents=True, exist_ok=True)
    for path in output.iterdir():  # not the folder itself, which may be the working directory
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    marker.touch()


if __name__ == '__main__':
    main()
