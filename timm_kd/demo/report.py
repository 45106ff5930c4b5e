"""What the trainings came to, as a table and a figure."""
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from timm.data import create_dataset
from torchvision.transforms.functional import to_tensor

from ..teacher import Teacher
from .training import STUDENT_MODEL, TEACHER_MODEL, read_curve, teacher_file


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
    axes.set(xlabel='epochs', ylabel='validation top-1, %', title='Students on few digits: mean and range of the seeds')
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    figure.savefig(path, dpi=150)
