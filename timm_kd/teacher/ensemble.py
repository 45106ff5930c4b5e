"""One teacher or several behind one interface."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .locate import locate
from .module import Teacher


class TeacherEnsemble(nn.Module):
    """Several teachers as one: the mean of their probabilities at temperature 1, as log-probabilities.

    Args:
        members: The teachers, each with its own adaptation to the student's images and classes.

    Attributes:
        members: The teachers.
        source: Their sources.
        model_name: Their architectures.
        num_params: Parameters of all of them.
        num_classes: Columns of the logits.
    """

    def __init__(self, members: Sequence[Teacher]):
        super().__init__()
        self._members = nn.ModuleList(members)
        self.source = ' + '.join(m.source for m in members)
        self.model_name = ' + '.join(m.model_name for m in members)
        self.num_params = sum(m.num_params for m in members)
        self.num_classes = members[0].num_classes
        self.eval()

    @property
    def members(self) -> list[Teacher]:
        """The single teachers."""
        return list(self._members)

    def train(self, mode: bool = True) -> 'TeacherEnsemble':
        """Stays in eval mode, whatever the mode of what holds it."""
        return super().train(False)

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs) -> 'TeacherEnsemble':
        """Compiles each member's forward."""
        for member in self._members:
            member.compile(backend=backend, mode=mode, **compile_kwargs)
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, in_chans, H, W]` -> log of the mean probabilities `[B, num_classes]`, float32, no gradient."""
        return self.combine([member(images) for member in self._members])

    @staticmethod
    def combine(logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits `[B, num_classes]` of each member -> log of the mean probabilities `[B, num_classes]`."""
        log_probs = torch.stack([each.log_softmax(dim=1) for each in logits])
        return log_probs.logsumexp(dim=0) - math.log(len(logits))

    def weights_hash(self) -> str:
        """sha256 over the members' hashes, in their order."""
        return hashlib.sha256(' '.join(m.weights_hash() for m in self._members).encode()).hexdigest()

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the logits of an image, of each member by its number."""
        return {str(i): member.fingerprint() for i, member in enumerate(self._members)}

    def describe(self, image_size: tuple[int, int] | None = None) -> str:
        """One line for each member."""
        return '\n'.join(m.describe(image_size) for m in self._members)


def create_teacher(
        spec: str | Path | nn.Module | Sequence[str | Path | nn.Module],
        *args: Any,
        model: str | Sequence[str | None] | None = None,
        use_ema: bool = False,
        class_map: str | Path | Sequence[str | Path | None] | None = None,
        **kwargs: Any,
) -> Teacher | TeacherEnsemble:
    """Makes the teacher of a spec, or the ensemble of a list of specs.

    Args:
        spec: A spec of `Teacher`, or a list of them.
        *args: Further positional arguments of `Teacher`.
        model: Architecture of the weights files among the specs; a list has one entry for each spec.
        use_ema: Take the EMA weights of the weights files among the specs.
        class_map: Class map of every teacher; a list has one entry for each spec.
        **kwargs: Further arguments of `Teacher`.

    Raises:
        UsageError: If a teacher cannot be had or cannot teach this student.
    """
    specs = [spec] if isinstance(spec, str | Path | nn.Module) else list(spec)
    if len(specs) == 1:
        models, maps = _one_each(model, specs, '--teacher-model'), _one_each(class_map, specs, '--teacher-class-map')
        return Teacher(specs[0], *args, model=models[0], use_ema=use_ema, class_map=maps[0], **kwargs)
    is_file = [not isinstance(s, nn.Module) and locate(str(s))[0] == 'file' for s in specs]
    if not any(is_file) and (use_ema or model is not None):
        raise UsageError('--teacher-model and --teacher-ema are for weights files, and no --teacher is one')
    models = _one_each(model, specs, '--teacher-model')
    if isinstance(model, str):
        models = [model if file else None for file in is_file]
    maps = _one_each(class_map, specs, '--teacher-class-map')
    return TeacherEnsemble([
        Teacher(s, *args, model=m, use_ema=use_ema and file, class_map=c, **kwargs)
        for s, m, c, file in zip(specs, models, maps, is_file, strict=True)
    ])


def _one_each(value: Any, specs: list, flag: str) -> list:
    """A value for each spec: the same for all, or a list of one each."""
    if not isinstance(value, list | tuple):
        return [value] * len(specs)
    if len(value) != len(specs):
        raise UsageError(f'{flag} is given {len(value)} times, --teacher {len(specs)} times: one for all or one each')
    return list(value)
