"""What the trainings came to, as a table and a figure."""
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from timm.data import create_dataset
from torchvision.transforms.functional import to_tensor

from ..report.curves import draw_curves, save_png
from ..report.groups import Group, last
from ..report.runs import Run, read_run
from ..report.table import aligned
from ..teacher import Teacher
from .training import STUDENT_MODEL, TEACHER_MODEL, teacher_file


@dataclass(frozen=True)
class Result:
    """What came out of one training.

    Attributes:
        run: Its folder, read.
        agreement: Share of the validation images, in percent, on which it and the teacher name the same class.
        seconds: Wall clock of the command, start-up included.
    """
    run: Run
    agreement: float
    seconds: float

    @property
    def top1(self) -> float:
        """Validation top-1 after the last epoch: the best epoch would be chosen by the validation images."""
        return last('eval_top1')(self.run)


def predict(checkpoint: Path, model: str, images: torch.Tensor) -> torch.Tensor:
    """Classify images by a checkpoint of the script.

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
    """Gather the results of the teacher and, by loss, of the students.

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
            Result(read_run(runs / name), agreement, run_seconds)
        )
    return results


def result_table(results: dict[str, list[Result]]) -> str:
    """Return the results as a Markdown table, with standard deviations where there are several seeds."""
    def cell(values: list[float]) -> str:
        return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')

    rows = []
    for name, runs in results.items():
        agreement = '' if name == 'teacher' else cell([run.agreement for run in runs])
        rows.append([name, cell([run.top1 for run in runs]), agreement, f'{mean(run.seconds for run in runs):.0f}'])
    return aligned(['', 'top-1, %', 'agreement with the teacher, %', 'seconds of a run'], rows)


def draw_results(results: dict[str, list[Result]], path: Path) -> None:
    """Draw loss, top-1 and agreement over the epochs: for each loss the mean of its seeds, within their range."""
    groups = [
        Group([result.run for result in students], {}, f'{name} {mean(result.top1 for result in students):.1f}', {})
        for name, students in results.items() if name != 'teacher'
    ]
    save_png(draw_curves(groups, clock=False), path)
