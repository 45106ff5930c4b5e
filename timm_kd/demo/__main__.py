"""`python -m timm_kd.demo`: data, a teacher, students, and what they came to."""
import argparse
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from ..losses import KD_LOSSES
from ..report.curves import draw_curves, save_png
from ..report.groups import Group, tabulate
from ..report.runs import read_run
from ..report.table import markdown_table
from .digits import write_digits
from .training import BASELINE, STUDENT_MODEL, TEACHER_FLAGS, TEACHER_MODEL, command, python, student_flags, train

TRAIN_IMAGES, FEW_IMAGES = 1000, 100  # of 1,797; the rest validates
LOSSES = ('tfnkd', 'dkd', 'nkd')
SEEDS = (0, 1, 2)


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
    teacher = command(output, 'teacher', (*TEACHER_FLAGS, *further))
    print(f'  $ {shlex.join(teacher)}', flush=True)
    train({'teacher': teacher}, runs)

    print(f'\n3. Students, {STUDENT_MODEL}, learn from the {FEW_IMAGES} images of few/ by each loss at its defaults.')
    students = {
        f'{loss}-{seed}': command(output, f'{loss}-{seed}', (*student_flags(output, loss, seed), *further))
        for loss in losses
        for seed in seeds
    }
    for words in [*students.values()][::len(seeds)]:
        print(f'  $ {shlex.join(words)}')
    print(''.join(f'  and the same with --seed {seed}\n' for seed in seeds[1:]), end='', flush=True)
    train(students, runs)

    _report(output, losses, seeds)
    print(f'This took {time.perf_counter() - start:.0f} s.')


def _report(output: Path, losses: Sequence[str], seeds: Sequence[int]) -> None:
    runs = output / 'train'
    groups = [Group([read_run(runs / f'{loss}-{seed}') for seed in seeds], {}, loss, {}) for loss in losses]
    table = markdown_table(tabulate(groups, baseline=runs / f'{BASELINE}-{seeds[0]}'))
    (output / 'results.md').write_text(table)
    save_png(draw_curves(groups, clock=False), output / 'curves.png')
    push = ['-m', 'timm_kd.hub', 'push', str(runs / f'{losses[-1]}-{seeds[-1]}'), 'me/digits', '--dry-run']
    print(f'\n4. Results on validation/: mean ± standard deviation over the seeds.\n\n{table}\n'
          f'Table: {output}/results.md. Curves: {output}/curves.png. Runs: {runs}/NAME/ (summary.csv, log.txt, ...).\n'
          f'What the last student would bring to the Hugging Face Hub:\n  $ {shlex.join([python(), *push])}')


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
