"""What is refused of a student that timm has built: it fails on the images, or the file had no weights for it."""
import argparse
import logging
from collections.abc import Callable

import torch
from timm.models import load_state_dict
from torch import nn

from .cli import resolve_kd
from .cli.messages import as_given
from .errors import UsageError, few, shortened
from .process import preserved_random_state

# timm leaves random what a file does not name; up to here it may be that the user wants it so.
_LARGEST_RANDOM_SHARE = 0.9

# What decides whether a model can take a batch.
_OF_THE_IMAGES = ('input_size', 'img_size', 'train_img_sizes', 'in_chans', 'gp', 'model_kwargs')


def check_forward(model: nn.Module, args: argparse.Namespace, input_size: tuple[int, int, int]) -> None:
    """Refuses a student that fails on images of the run, or whose output a loss on logits cannot read.

    A batch of blank images for each size that is trained or validated on; buffers and random streams are left as they
    were.

    With a distillation loss, a model with a distillation token (DeiT, distilled) is refused, though timm averages its
    two heads as long as nobody calls `set_distilled_training`: the second head is there to learn from the teacher
    alone, which no loss here does.

    Args:
        model: The student, before it is scripted or its batch norm synchronised.
        args: The flags, `num_classes` settled.
        input_size: Channels, height and width of an image.

    Raises:
        UsageError: If the model cannot take such images, or its output is not a tensor `[B, num_classes]`.
    """
    if hasattr(model, 'dist_token') and resolve_kd(args) is not None:
        raise UsageError(
            f'--model {args.model} has a distillation token, whose head gives a second set of logits in training, and '
            'the distillation losses are defined on one: take a model without it (deit_tiny_patch16_224, say).'
        )
    channels, *size = input_size
    training_sizes = [[side, side] for side in args.train_img_sizes or ()] or [size]
    was_training = model.training
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    with preserved_random_state(), torch.no_grad():
        for training, sides in [*((True, sides) for sides in training_sizes), (False, size)]:
            _check_batch(model.train(training), args, (channels, *sides))
        for key, value in model.named_buffers():
            value.copy_(buffers[key])
    model.train(was_training)


def _check_batch(model: nn.Module, args: argparse.Namespace, image_size: tuple[int, ...]) -> None:
    # Two images do for batch norm, if the batches of the run are as large; each split has its own.
    per_split = min(2, args.batch_size, *args.train_batch_sizes or ()) if model.training else 2
    num_images = per_split * (max(args.aug_splits, 2) if args.split_bn else 1)
    parameter = next(model.parameters())
    try:
        output = model(torch.zeros(num_images, *image_size, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
        suspects = [as_given(dest, getattr(args, dest)) for dest in _OF_THE_IMAGES if _is_given(args, dest)]
        suspects += [f'--batch-size {per_split}'] if per_split == 1 else []
        raise UsageError(
            f'--model {args.model} fails on images of {"x".join(map(str, image_size))}, change '
            f'{" or ".join(suspects or ["--img-size"])}: {shortened(error)}'
        ) from error
    if not isinstance(output, torch.Tensor):
        raise UsageError(
            f'--model {args.model} returns a {type(output).__name__} of {len(output)} outputs in training, and the '
            'losses are defined on one set of logits: take a model, or --model-kwargs, without it.'
        )
    if output.shape != (num_images, args.num_classes):
        raise UsageError(
            f'--model {args.model} returns outputs of shape {tuple(output.shape[1:])} for an image, the losses need '
            f'{args.num_classes} logits: leave --gp and --model-kwargs at their defaults.'
        )


def _is_given(args: argparse.Namespace, dest: str) -> bool:
    return getattr(args, dest) not in (None, {})


def check_pretrained(model: nn.Module, build: Callable[[], nn.Module], args: argparse.Namespace) -> None:
    """Refuses a file of `--pretrained-path` that has next to no weights for the model, which timm leaves at random.

    What a file holds is known by name only after timm's filter for the architecture, which nobody else can call; but
    whatever came from it is the same in a second model, built on other random numbers. The head does not count: timm
    never takes it from this file.

    Args:
        model: What `build` returned.
        build: Makes the model with the weights of the file.
        args: The flags.

    Raises:
        UsageError: If more than nine tenths of the model's weights are random.
    """
    logging.disable(logging.WARNING)  # all has been said of the first
    try:
        with preserved_random_state():
            second = dict(build().named_parameters())
    finally:
        logging.disable(logging.NOTSET)
    heads = model.pretrained_cfg.get('classifier') or ()
    heads = tuple(f'{head}.' for head in ([heads] if isinstance(heads, str) else heads))
    # Vectors are biases and scales, which start as constants.
    weights = {
        name: weight for name, weight in model.named_parameters()
        if weight.ndim > 1 and not name.startswith(heads)
    }
    random = [name for name, weight in weights.items() if not torch.equal(weight, second[name])]
    num_random, num_weights = (sum(weights[name].numel() for name in names) for names in (random, weights))
    if num_random > _LARGEST_RANDOM_SHARE * num_weights:
        raise UsageError(
            f'--pretrained-path {args.pretrained_path} does not fit --model {args.model}: it lacks {few(random)} '
            f'and holds {few(load_state_dict(args.pretrained_path))}; name the model that it was saved from.'
        )
