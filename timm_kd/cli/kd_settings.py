"""What the KD flags amount to: loss, parameters, teacher and weights, resolved once."""
import argparse
from dataclasses import dataclass

from ..losses import KD_LOSSES

# The dests of the flags that set a parameter of a loss, and the parameter.
LOSS_PARAMETERS = {
    'kd_temperature': 'temperature',
    'kd_alpha': 'alpha',
    'kd_beta': 'beta',
    'kd_gamma': 'gamma',
    'kd_correct_prob': 'correct_prob',
    'kd_logit_std': 'logit_std',
}


@dataclass(frozen=True)
class KDSettings:
    """A distillation run in the terms of `create_kd_loss`, `create_teacher` and `KDTask`.

    Attributes:
        loss: Name of the loss, a key of `KD_LOSSES`.
        loss_parameters: The parameters the user set; the rest are the loss's defaults.
        teacher: Spec of the teacher, a list of several, or None for a loss that learns without one.
        teacher_dtype: One of auto, amp, float32, bfloat16, float16.
        task_loss_weight: Weight of the task loss.
        distill_loss_weight: Weight of the distillation term.
        warmup_epochs: Epochs over which the distillation term is faded in.
    """

    loss: str
    loss_parameters: dict[str, float | bool]
    teacher: str | list[str] | None
    teacher_dtype: str
    task_loss_weight: float
    distill_loss_weight: float
    warmup_epochs: int


def resolve_kd(args: argparse.Namespace) -> KDSettings | None:
    """The distillation that the flags ask for.

    Args:
        args: The namespace of `parse_args`.

    Returns:
        The settings, or None for plain training (no loss and no teacher named).
    """
    teacher = named_teacher(args)
    if args.kd_loss is None and teacher is None:
        return None
    loss = args.kd_loss or 'kd'
    task_loss_weight, distill_loss_weight = _loss_weights(args, loss)
    warmup_epochs = args.kd_warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = KD_LOSSES[loss].default_warmup_epochs(args.epochs)
    return KDSettings(
        loss=loss,
        loss_parameters=_given_parameters(args),
        teacher=teacher,
        teacher_dtype=_teacher_dtype(args),
        task_loss_weight=task_loss_weight,
        distill_loss_weight=distill_loss_weight,
        warmup_epochs=warmup_epochs,
    )


def named_teacher(args: argparse.Namespace) -> str | list[str] | None:
    """The teacher of ``--teacher``, or of timm's ``--kd-model-name``."""
    return args.teacher or args.kd_model_name or None


def _given_parameters(args: argparse.Namespace) -> dict[str, float | bool]:
    given = {parameter: getattr(args, dest) for dest, parameter in LOSS_PARAMETERS.items()}
    return {parameter: value for parameter, value in given.items() if value is not None and value is not False}


def _loss_weights(args: argparse.Namespace, loss: str) -> tuple[float, float]:
    """timm's rule: both given, both used; one given, the task keeps 1 or the distillation gets 1 - w."""
    task, distill = args.task_loss_weight, args.distill_loss_weight
    if task is None and distill is None:
        return KD_LOSSES[loss].default_task_weight, KD_LOSSES[loss].default_distill_weight
    if distill is None:
        return task, 1.0 - task
    return 1.0 if task is None else task, distill


def _teacher_dtype(args: argparse.Namespace) -> str:
    """``--kd-model-name`` alone keeps the precision that timm's script gives its teacher."""
    if args.teacher_dtype != 'auto' or args.teacher or not args.kd_model_name:
        return args.teacher_dtype
    return 'amp' if args.amp else args.model_dtype or 'float32'
