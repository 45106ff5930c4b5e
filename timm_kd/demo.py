"""The demo: a teacher and its students on real handwritten digits, by the very training script.

`make demo`, or `python -m timm_kd.demo` in a clone with the `demo` extra installed. What it prints behind a `$` can be
repeated by hand; what it makes is below `demo_output/`, and made anew by the next demo.
"""
import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from timm.data import create_dataset
from torchvision.transforms.functional import to_tensor

from .losses import KD_LOSSES
from .teacher import Teacher

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'hparams/digits_demo.yaml'

TRAIN_IMAGES, FEW_IMAGES, SPLIT_SEED = 1000, 100, 0  # of 1,797; the rest validates
TEACHER_MODEL, STUDENT_MODEL = 'test_resnet', 'test_efficientnet'
TEACHER_FLAGS = ('--model', TEACHER_MODEL, '--train-split', 'train', '--batch-size', '50')
TEACHER_EPOCHS, STUDENT_EPOCHS = 12, 60

SEEDS = (0, 1, 2)
BASELINE = 'cross-entropy'
LOSSES = ('tfnkd', 'dkd', 'nkd')


@dataclass(frozen=True)
class Result:
    """What came out of one training.

    Attributes:
        curve: Validation top-1 in percent, by the number of epochs trained.
        agreement: Share of the validation images, in percent, on which it and the teacher name the same class.
        seconds: Wall clock of the command, start-up included.
    """
    curve: dict[int, float]
    agreement: float
    seconds: float

    @property
    def top1(self) -> float:
        """Validation top-1 after the last epoch: the best epoch would be chosen by the validation images."""
        return self.curve[max(self.curve)]


def main(argv: list[str] | None = None) -> None:
    """Runs the demo.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: With what to do, if something is missing or in the way, or a training fails.
    """
    parser = argparse.ArgumentParser(prog='python -m timm_kd.demo', description=__doc__.partition('\n')[0])
    parser.add_argument('--losses', nargs='+', choices=tuple(KD_LOSSES), default=LOSSES, help='losses to compare')
    parser.add_argument('--output', type=Path, default=Path('demo_output'), metavar='DIR', help='where all of it goes')
    parser.add_argument('--quick', action='store_true', help='one epoch, one seed: does everything work?')
    options = parser.parse_args(argv)
    _check_installation()
    os.chdir(ROOT)
    seeds, epochs = (SEEDS[:1], (1, 1)) if options.quick else (SEEDS, (TEACHER_EPOCHS, STUDENT_EPOCHS))
    run(options.output, (BASELINE, *options.losses), seeds, *epochs)


def run(output: Path, losses: Sequence[str], seeds: Sequence[int], teacher_epochs: int, student_epochs: int) -> None:
    """Makes the data, trains teacher and students, and reports.

    Args:
        output: Where all of it goes.
        losses: Names of losses, `BASELINE` for none.
        seeds: Seeds of the students of each loss.
        teacher_epochs: Epochs of the teacher.
        student_epochs: Epochs of each student.
    """
    start = time.perf_counter()
    _clear(output)
    data, runs = output / 'digits', output / 'train'
    print('timm-kd demo: a teacher and its students on 1,797 real handwritten digits. Minutes on 2 cores.\n')

    sizes = write_digits(data, TRAIN_IMAGES, FEW_IMAGES)
    print(f'1. Images in {data}/: {", ".join(f"{size:,} in {split}/" for split, size in sizes.items())}.\n')

    print(f'2. A teacher, {TEACHER_MODEL}, learns from the {TRAIN_IMAGES:,} images of train/ by cross-entropy.')
    seconds = train({'teacher': command(output, 'teacher', (*TEACHER_FLAGS, '--epochs', str(teacher_epochs)))}, runs)

    print(f'\n3. Students, {STUDENT_MODEL}, learn from the {FEW_IMAGES} images of few/ by each loss at its defaults.')
    seconds |= train({
        f'{loss}-{seed}': command(output, f'{loss}-{seed}', student_flags(output, loss, seed, student_epochs))
        for loss in losses
        for seed in seeds
    }, runs)

    results = collect(data, runs, seconds)
    table = result_table(results)
    (output / 'results.md').write_text(table)
    draw_curves(results, output / 'curves.png')
    print(f'\n4. On the {sizes["validation"]} images of validation/, after the last epoch; mean ± standard deviation '
          f'where there are several seeds.\n\n{table}')
    push = ['-m', 'timm_kd.hub', 'push', str(runs / list(seconds)[-1]), 'me/digits', '--dry-run']
    print(f'Table: {output}/results.md. Curves: {output}/curves.png. Runs: {runs}/NAME/ (summary.csv, log.txt, ...).\n'
          f'What a student brings to the Hugging Face Hub:\n  $ {shlex.join([_python(), *push])}\n'
          f'This took {time.perf_counter() - start:.0f} s.')


def _check_installation() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"the demo needs {error.name}: pip install -e '.[demo]', or make demo") from error
    if not (ROOT / CONFIG).is_file():
        raise SystemExit(f'the demo runs in a clone of timm-kd, and {ROOT} has no {CONFIG}')


def _clear(output: Path) -> None:
    """Empties the folder of an earlier demo, and no other."""
    marker = output / '.timm_kd_demo'
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise SystemExit(f'--output {output} holds something that no demo has made: name another folder')
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    marker.touch()


def write_digits(folder: Path, train_images: int, few_images: int) -> dict[str, int]:
    """Writes scikit-learn's digits as an ImageFolder of 32x32 PNGs, `<split>/<class>/<index>.png`.

    Args:
        folder: Where to write.
        train_images: Size of the split `train`; the rest is `validation`.
        few_images: Size of the split `few`, a part of `train`. All splits have the classes in equal shares.

    Returns:
        The size of each split.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    pixels, labels = load_digits(return_X_y=True)
    # 8x8 pixels of 0..16, enlarged here: a random crop of the original would jump by an eighth of the image.
    images = [Image.fromarray((image.reshape(8, 8) * 15).astype('uint8')).resize((32, 32)) for image in pixels]
    draw = partial(train_test_split, random_state=SPLIT_SEED)
    train, validation = draw(range(len(images)), train_size=train_images, stratify=labels)
    few, _ = draw(train, train_size=few_images, stratify=labels[train])
    splits = {'train': train, 'few': few, 'validation': validation}
    for split, indices in splits.items():
        for index in indices:
            path = folder / split / str(labels[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            images[index].save(path)
    return {split: len(indices) for split, indices in splits.items()}


def _python() -> str:
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def command(output: Path, experiment: str, flags: Sequence[str]) -> list[str]:
    """The command line of one training, as it can be repeated by hand in the clone."""
    return [
        _python(), 'train_kd.py', str(output / 'digits'), '-c', CONFIG, *flags,
        '--output', str(output / 'train'), '--experiment', experiment,
    ]


def teacher_file(runs: Path) -> Path:
    """The checkpoint that teaches: the last one, the best would be chosen by the validation images."""
    return runs / 'teacher' / 'last.pth.tar'


def student_flags(output: Path, loss: str, seed: int, epochs: int) -> list[str]:
    """The flags of a student beyond the recipe: its loss, and the teacher where the loss needs one."""
    flags = [] if loss == BASELINE else ['--kd-loss', loss]
    if loss != BASELINE and KD_LOSSES[loss].needs_teacher:
        flags += ['--teacher', str(teacher_file(output / 'train')), '--teacher-model', TEACHER_MODEL]
    return [*flags, '--epochs', str(epochs), '--seed', str(seed)]


def train(commands: dict[str, list[str]], runs: Path) -> dict[str, float]:
    """Runs trainings, as many at a time as there are cores, each with one thread.

    Args:
        commands: Command line of each run by its name.
        runs: Folder of the runs; what one says goes to `<name>/log.txt` there.

    Returns:
        Seconds of each run by its name.

    Raises:
        SystemExit: If one fails; with the end of its log.
    """
    print('\n'.join(f'  $ {shlex.join(words)}' for words in commands.values()), flush=True)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        seconds = pool.map(partial(_train_one, runs), commands, commands.values())
        return dict(zip(commands, seconds, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _train_one(runs: Path, name: str, words: list[str]) -> float:
    log = runs / name / 'log.txt'
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, 'w') as stream:
        environment = {'OMP_NUM_THREADS': '1', **os.environ}
        code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    seconds = time.perf_counter() - start
    if code:
        raise SystemExit('\n'.join([*log.read_text().splitlines()[-5:], f'{name} failed with code {code}, see {log}']))
    curve = read_curve(log.parent)
    print(f'  {name}: top-1 {curve[max(curve)]:.1f} in {seconds:.0f} s', flush=True)
    return seconds


def read_curve(run: Path) -> dict[int, float]:
    """Reads validation top-1 in percent, by the number of epochs trained, out of a run's summary.csv."""
    with open(run / 'summary.csv', newline='') as file:
        return {int(row['epoch']) + 1: float(row['eval_top1']) for row in csv.DictReader(file)}


def predict(checkpoint: Path, model: str, images: torch.Tensor) -> torch.Tensor:
    """Classifies images by a checkpoint of the script.

    Args:
        checkpoint: The file.
        model: Its architecture.
        images: `[N, 3, H, W]` in 0..1.

    Returns:
        Classes `[N]`.
    """
    # A teacher is a frozen model that takes images as they are normalised for someone else: just what is needed.
    classifier = Teacher(str(checkpoint), mean=(0., 0., 0.), std=(1., 1., 1.), dtype='float32', model=model)
    return classifier(images).argmax(dim=1)


def collect(data: Path, runs: Path, seconds: dict[str, float]) -> dict[str, list[Result]]:
    """Gathers the results of the teacher and, by loss, of the students.

    Args:
        data: The image folder.
        runs: The folder of the runs.
        seconds: Seconds of each run by its name, `teacher` or `<loss>-<seed>`.
    """
    validation = create_dataset('', root=str(data), split='validation')
    images = torch.stack([to_tensor(image.convert('RGB')) for image, _ in validation])
    taught = predict(teacher_file(runs), TEACHER_MODEL, images)
    results: dict[str, list[Result]] = {}
    for name, run_seconds in seconds.items():
        model = TEACHER_MODEL if name == 'teacher' else STUDENT_MODEL
        said = predict(runs / name / 'last.pth.tar', model, images)
        agreement = 100 * (said == taught).float().mean().item()
        results.setdefault(name.rpartition('-')[0] or name, []).append(
            Result(read_curve(runs / name), agreement, run_seconds)
        )
    return results


def result_table(results: dict[str, list[Result]]) -> str:
    """The results as a Markdown table, with standard deviations where there are several seeds."""
    def cell(values: list[float]) -> str:
        return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')

    rows = [('', 'top-1, %', 'agreement with the teacher, %', 'seconds of a run'), ('', '', '', '')]
    for name, runs in results.items():
        agreement = '' if name == 'teacher' else cell([run.agreement for run in runs])
        rows.append((name, cell([run.top1 for run in runs]), agreement, f'{mean(run.seconds for run in runs):.0f}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows[1] = tuple('-' * width for width in widths)
    return ''.join(
        f'| {" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |\n' for row in rows
    )


def draw_curves(results: dict[str, list[Result]], path: Path) -> None:
    """Draws validation top-1 over the epochs: for each loss the mean of its seeds, within their range."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout='constrained')
    axes = figure.subplots()
    for name, runs in results.items():
        if name == 'teacher':
            axes.axhline(runs[0].top1, color='black', linestyle='--', linewidth=1, label=f'teacher {runs[0].top1:.1f}')
            continue
        epochs = sorted(runs[0].curve)
        seeds = [[run.curve[epoch] for run in runs] for epoch in epochs]
        line, = axes.plot(epochs, [*map(mean, seeds)], marker='o', label=f'{name} {mean(seeds[-1]):.1f}')
        axes.fill_between(epochs, [*map(min, seeds)], [*map(max, seeds)], color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel='epochs', ylabel='validation top-1, %', title='Mean and range of the seeds')
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    main()
