"""What is refused of a student that timm has built: it fails on the images, or the file had no weights for it."""
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.models import load_state_dict
from torch import nn
from torch.func import functional_call

from .errors import UsageError, few, shortened
from .process import preserved_random_state

# timm leaves random what a file does not name; up to here it may be that the user wants it so.
_LARGEST_RANDOM_SHARE = 0.9


@contextmanager
def missing_keys() -> Iterator[list[str]]:
    """Collect the names of the weights that timm does not find in a pretrained file: it tells them to its log alone."""
    logger = logging.getLogger('timm.models._builder')
    own_level, threshold = logger.level, logger.getEffectiveLevel()
    missing: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        report = re.match(r'Missing keys \((.*)\) discovered', record.getMessage())
        missing.extend(report[1].split(', ') if report else ())
        return record.levelno >= threshold

    logger.addFilter(listen)
    logger.setLevel(logging.INFO)
    try:
        yield missing
    finally:
        logger.setLevel(own_level)
        logger.removeFilter(listen)


def check_pretrained(model: nn.Module, missing: Iterable[str], path: str, name: str) -> None:
    """Refuse a file of `--pretrained-path` that has next to no weights for the model.

    The head does not count: timm never takes it from such a file. Nor do vectors: they are biases and scales, which
    start as constants.

    Args:
        model: The model that timm loaded the file into.
        missing: Names of weights that the file lacks.
        path: The file.
        name: `--model`.

    Raises:
        UsageError: If more than nine tenths of the model's weights are random.
    """
    heads = model.pretrained_cfg.get('classifier') or ()
    heads = tuple(f'{head}.' for head in ([heads] if isinstance(heads, str) else heads))
    sizes = {
        name: weight.numel() for name, weight in model.named_parameters()
        if weight.ndim > 1 and not name.startswith(heads)
    }
    random = [name for name in missing if name in sizes]
    if sum(sizes[name] for name in random) > _LARGEST_RANDOM_SHARE * sum(sizes.values()):
        raise UsageError(
            f'--pretrained-path {path} does not fit --model {name}: it lacks {few(random)} and holds '
            f'{few(load_state_dict(path))}; name the model that it was saved from.'
        )


def check_forward(
        model: nn.Module,
        name: str,
        batches: Iterable[tuple[bool, Sequence[int]]],
        num_classes: int,
        remedy: str,
) -> None:
    """Refuse a student that fails on images of the run, or whose output a loss on logits cannot read.

    Parameters, buffers and random streams are left as they were; the model's mode is that of the last batch.

    Args:
        model: The student, before it is scripted or its batch norm synchronised.
        name: `--model`.
        batches: Whether the model is in training mode, and the shape `[B, C, H, W]` of a batch of blank images.
        num_classes: Classes of the data.
        remedy: What to change if the model fails.

    Raises:
        UsageError: If the model cannot take such images, or its output is not a tensor `[B, num_classes]`.
    """
    parameter = next(model.parameters())
    for training, shape in batches:
        images = torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        try:
            with preserved_random_state(), torch.no_grad():
                output = functional_call(model.train(training), buffers, images)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
            raise UsageError(
                f'--model {name} fails on images of {"x".join(map(str, shape[1:]))}, change {remedy}: '
                f'{shortened(error)}'
            ) from error
        if not isinstance(output, torch.Tensor):
            raise UsageError(
                f'--model {name} returns a {type(output).__name__} of {len(output)} outputs in training, and the '
                'losses are defined on one set of logits: take a model, or --model-kwargs, without it.'
            )
        if output.shape != (len(images), num_classes):
            raise UsageError(
                f'--model {name} returns outputs of shape {tuple(output.shape[1:])} for an image, the losses need '
                f'{num_classes} logits: leave --gp and --model-kwargs at their defaults.'
            )
