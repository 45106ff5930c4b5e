"""Which class of the teacher stands for which class of the student."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import nn

from ..errors import UsageError, few

# The name of a map, and timm's name of the list of synsets that the teacher's classes follow.
NAMED_MAPS = {
    'imagenet12k': 'imagenet-12k',
    'imagenet21k': 'imagenet-21k-goog',
    'imagenet22k': 'imagenet-22k',
    'imagenet22k_ms': 'imagenet-22k-ms',
}
_MISSING = -1


class ClassMap(nn.Module):
    """Pick, for each class of the student, the teacher's logit of that class.

    A softmax over the picked logits is the teacher's distribution given that the class is one of the student's.

    Args:
        name: What the map was given as.
        indices: The teacher's index for each class of the student; -1: the teacher does not know the class, and its
            logit is -inf.
        device: Where the indices are kept.
    """

    def __init__(self, name: str, indices: list[int], device: torch.device | None = None):
        super().__init__()
        self.name = name
        index = torch.tensor(indices, device=device)
        missing = index == _MISSING
        self.register_buffer('index', index.clamp(min=0), persistent=False)
        self.register_buffer('missing', missing if missing.any() else None, persistent=False)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, student classes]` in logits `[B, teacher classes]`."""
        logits = logits.index_select(1, self.index)
        return logits if self.missing is None else logits.masked_fill(self.missing, float('-inf'))

    def fingerprint(self) -> str:
        """Return the sha256 of the map."""
        index = self.index if self.missing is None else self.index.masked_fill(self.missing, _MISSING)
        return hashlib.sha256(json.dumps(index.tolist()).encode()).hexdigest()

    def describe(self) -> str:
        """Say in words which classes are picked."""
        lacking = '' if self.missing is None else f' ({int(self.missing.sum())} masked)'
        return f'{len(self.index)} classes by {self.name}{lacking}'


def load_class_map(spec: str | Path, num_classes: int, teacher_classes: int, missing: str = 'error') -> list[int]:
    """Read and check a class map.

    Args:
        spec: One of `NAMED_MAPS` (ImageNet-1k out of a larger ImageNet, by timm's synset lists), or a file: text with
            one index a line, a JSON list, or a JSON object from the student's index to the teacher's. -1 (null in
            JSON, a key left out of an object) is a class the teacher lacks.
        num_classes: The student's classes.
        teacher_classes: The teacher's classes.
        missing: `error` refuses a map with classes the teacher lacks, `mask` lets them through.

    Returns:
        The teacher's index for each class of the student, -1 where it lacks the class.

    Raises:
        UsageError: If the map cannot be read, or has the wrong length, an index out of range, two classes on one
            index, or classes the teacher lacks.
    """
    name = f'`class_map` {spec}'
    if missing not in ('error', 'mask'):
        raise UsageError(f"`class_map_missing` {missing!r} is neither 'error' nor 'mask'.")
    if str(spec) in NAMED_MAPS:
        classes, indices = _imagenet_map(name, NAMED_MAPS[str(spec)], num_classes, teacher_classes)
    else:
        classes, indices = range(num_classes), _read_map(Path(spec).expanduser(), name, num_classes)
    if len(indices) != num_classes:
        raise UsageError(f'{name} has {len(indices)} entries, the student {num_classes} classes: one index for each.')
    counts = Counter(i for i in indices if i != _MISSING)
    wrong = sorted(i for i in counts if not 0 <= i < teacher_classes)
    if wrong:
        raise UsageError(
            f'{name} has {few(wrong, 10)} out of range: the teacher has {teacher_classes} classes, '
            f'0 to {teacher_classes - 1}.'
        )
    repeated = sorted(i for i, count in counts.items() if count > 1)
    if repeated:
        raise UsageError(
            f'{name} gives the teacher\'s class {few(repeated, 10)} to several classes of the student: '
            'each needs one of its own.'
        )
    lacking = [student_class for student_class, i in zip(classes, indices, strict=True) if i == _MISSING]
    if lacking and missing == 'error':
        raise UsageError(
            f'{name}: the teacher lacks {len(lacking)} of the student\'s classes ({few(lacking, 10)}); '
            '`class_map_missing` mask trains them without a distillation term.'
        )
    if not counts:
        raise UsageError(f'{name}: the teacher has none of the student\'s {num_classes} classes.')
    return indices


def _imagenet_map(name: str, larger: str, num_classes: int, teacher_classes: int) -> tuple[list[str], list[int]]:
    """Return the synsets of ImageNet-1k, and the index of each in the larger ImageNet of that name."""
    student, teacher = ImageNetInfo('imagenet-1k').label_names(), ImageNetInfo(larger).label_names()
    if num_classes != len(student):
        raise UsageError(
            f'{name} is for a student of the {len(student)} classes of ImageNet-1k, this one has {num_classes}.')
    if teacher_classes != len(teacher):
        raise UsageError(f'{name} is for a teacher of {len(teacher)} classes, this one has {teacher_classes}.')
    position = {synset: i for i, synset in enumerate(teacher)}
    return student, [position.get(synset, _MISSING) for synset in student]


def _read_map(path: Path, name: str, num_classes: int) -> list[int]:
    """Return the entries of a map file."""
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{name} is neither a readable text file nor one of the names {', '.join(NAMED_MAPS)}."
        ) from error
    try:
        if path.suffix.lower() != '.json':
            return [int(line) for line in text.split()]
        entries = json.loads(text)
        if isinstance(entries, dict):
            by_class = {int(key): index for key, index in entries.items()}
            entries = [by_class.pop(student_class, None) for student_class in range(num_classes)]
            if by_class:
                raise ValueError(f'it maps class {few(sorted(by_class), 10)}, the student has 0 to {num_classes - 1}')
        if not isinstance(entries, list) or not all(entry is None or type(entry) is int for entry in entries):
            raise ValueError('it holds something else')
        return [_MISSING if entry is None else entry for entry in entries]
    except ValueError as error:
        raise UsageError(
            f'{name} is not a class map ({error}): a text file with one index a line, a JSON list of indices, '
            'or a JSON object {student index: teacher index}.'
        ) from error
