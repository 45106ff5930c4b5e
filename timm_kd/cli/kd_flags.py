"""The flags of distillation and the other ones that timm's script lacks; and the distillation that they ask for."""
import argparse
import dataclasses
from fractions import Fraction
from typing import Any

from ..losses import KD_LOSSES
from ..teacher.classmap import NAMED_MAPS
from ..teacher.fast import TEACHER_DTYPES
from .parser import Flag, count, flag, kwargs_flag, not_negative, number, one_of, switch, whole

# timm's own distillation tasks: the flags that set each, and the argument of the task that each flag is.
TIMM_DISTILLATION = {
    'feature': {'kd_student_feature_dim': 'student_feature_dim', 'kd_teacher_feature_dim': 'teacher_feature_dim'},
    'token': {'kd_token_distill_type': 'distill_type', 'kd_temperature': 'temperature'},
}


def kd_flags() -> dict[str, list[Flag]]:
    """Return the flags by group, those of the losses from what the losses in `KD_LOSSES` say of themselves."""
    return {
        'Knowledge distillation parameters': [
            flag(
                '--kd-loss', choices=tuple(KD_LOSSES),
                help='distillation loss (kd beside a teacher when unset); without it and a teacher: plain training',
            ),
            flag(
                '--teacher', action='append', metavar='SPEC',
                help='teacher: a timm name, hf-hub:org/name, local-dir:PATH, a folder, or a weights file (with '
                     '--teacher-model); given several times, the mean of their probabilities teaches',
            ),
            flag('--teacher-model', metavar='NAME', help='timm architecture of a teacher that is a weights file'),
            kwargs_flag('--teacher-kwargs', help='further keyword arguments of the teacher model'),
            flag(
                '--teacher-img-size', type=count,
                help='input size of the teacher in pixels (the student\'s when unset)',
            ),
            flag(
                '--teacher-dtype', default='auto', choices=TEACHER_DTYPES,
                help='precision of the teacher; auto: bfloat16 where it is fast; amp: inside the autocast of the '
                     'student',
            ),
            flag(
                '--teacher-compile', nargs='?', metavar='BACKEND', const='inductor',
                help='compile the teacher alone with torch.compile; the backend is inductor unless named',
            ),
            switch('--teacher-ema', help='take the moving average weights out of a checkpoint that has them'),
            flag(
                '--teacher-class-map', metavar='FILE',
                help=f'file with the teacher\'s index of each student class, or {", ".join(NAMED_MAPS)}',
            ),
            flag(
                '--teacher-class-map-missing', default='error', choices=('error', 'mask'),
                help='classes the teacher lacks: refuse them, or leave their images without distillation',
            ),
            switch('--no-teacher-eval', help='do not validate the teacher at start (and report no agreement)'),
            flag('--task-loss-weight', type=not_negative, help='weight of the task loss (unset: what suits the loss)'),
            flag(
                '--distill-loss-weight', type=not_negative,
                help='weight of the distillation loss (unset: what suits the loss)',
            ),
            *_knob_flags(),
            flag(
                '--kd-warmup-epochs', type=whole,
                help=f'epochs over which the distillation loss is faded in (unset: {_warmups()}; else 0)',
            ),
            flag('--teacher-cache', metavar='DIR', help='store the teacher\'s logits here, and read them again'),
            flag(
                '--teacher-cache-dtype', default='float16', choices=('float16', 'float32'),
                help='precision of stored logits',
            ),
            flag('--teacher-cache-epochs', type=count, help='distinct epochs to store, then round again (unset: all)'),
            flag(
                '--teacher-cache-topk', type=count,
                help='store only the k largest logits of a row, and the rest as one sum',
            ),
            switch('--teacher-cache-rebuild', help='throw away what is stored, should it not fit this run'),
            flag('--kd-model-name', type=str, help='teacher as timm\'s script takes it, with its defaults'),
            flag(
                '--kd-distill-type', default='logit', choices=('logit', *TIMM_DISTILLATION),
                help='logit, by --kd-loss; or timm\'s own: feature (squared error of the pooled features), token (the '
                     'head that distilled DeiTs have for the teacher)',
            ),
            flag(
                '--kd-loss-type', default='kl', help='kl (see --kd-loss)',
                type=one_of('kl', reason='only kl, which is --kd-loss kd; --kd-loss chooses among the others'),
            ),
            flag('--kd-student-feature-dim', type=count, help='feature: width of the student\'s (unset: looked up)'),
            flag('--kd-teacher-feature-dim', type=count, help='feature: width of the teacher\'s (unset: looked up)'),
            flag(
                '--kd-token-distill-type', default='soft', choices=('soft', 'hard'),
                help='token: learn the teacher\'s distribution at --kd-temperature (4 when unset), or its first class',
            ),
        ],
        'Additions to timm\'s script': [
            switch(
                '--replayable-data',
                help='make order, augmentation and mixing functions of seed, epoch and sample, whatever the workers: '
                     'resume is exact at any step',
            ),
            flag(
                '--crops-per-image', type=count, default=1, metavar='M',
                help='take M crops of each image that is decoded, side by side in the batch (implies '
                     '--replayable-data); an epoch has as many crops, of 1/M of the images',
            ),
            flag(
                '--push-to-hub', metavar='REPO_ID',
                help='push the best checkpoint to the Hugging Face Hub at the end (token: HF_TOKEN or hf auth login)',
            ),
            switch('--hub-private', help='make a private repository'),
            flag('--hub-license', metavar='ID', help='license that the model card names (unset: none)'),
            flag('--hub-revision', metavar='BRANCH', help='branch to push to (the main one when unset)'),
            switch('--log-tensorboard', help='log to TensorBoard, in the folder of the run'),
        ],
    }


def knob_dests() -> dict[str, str]:
    """Return the dests of the flags that set a knob of a loss, and the knob of each."""
    return {f'kd_{name}': name for loss in KD_LOSSES.values() for name in loss.hyper_parameters()}


def _knob_flags() -> list[Flag]:
    """Return a flag for each knob; it checks the bounds that all losses with this knob have in common."""
    flags = []
    for name in knob_dests().values():
        knobs = {loss: knob for loss, owner in KD_LOSSES.items() for knob in owner.knobs() if knob.name == name}
        first = next(iter(knobs.values()))
        flag_name, text = f'--kd-{name.replace("_", "-")}', first.metadata['help']
        if isinstance(first.default, bool):
            flags.append(switch(flag_name, help=f'{", ".join(knobs)}: {text}'))
            continue
        bounds = {
            bound: value for bound, value in first.metadata['bounds'].items()
            if all(knob.metadata['bounds'].get(bound) == value for knob in knobs.values())
        }
        defaults = ', '.join(f'{loss} {knob.default:g}' for loss, knob in knobs.items())
        flags.append(flag(
            flag_name, type=number(type(first.default), **bounds), help=f'{text} (unset: {defaults})'))
    return flags


def _warmups() -> str:
    shares = {name: Fraction(loss.default_warmup).limit_denominator(1000) for name, loss in KD_LOSSES.items()}
    return ', '.join(f'{name} {share} of --epochs, at least 1' for name, share in shares.items() if share)


@dataclasses.dataclass(frozen=True)
class KDSettings:
    """A distillation run in the terms of `create_kd_loss`, `create_teacher` and `KDTask`.

    Attributes:
        loss: Name of the loss, a key of `KD_LOSSES`; or of timm's task, a key of `TIMM_DISTILLATION`.
        loss_parameters: The knobs that the user set, the rest are the loss's defaults; or the arguments of timm's task.
        teacher: Spec of the teacher, a list of several, or None for a loss that learns without one.
        teacher_dtype: One of auto, amp, float32, bfloat16, float16.
        task_loss_weight: Weight of the task loss.
        distill_loss_weight: Weight of the distillation term.
        warmup_epochs: Epochs over which the distillation term is faded in.
    """

    loss: str
    loss_parameters: dict[str, Any]
    teacher: str | list[str] | None
    teacher_dtype: str
    task_loss_weight: float
    distill_loss_weight: float
    warmup_epochs: int


def resolve_kd(args: argparse.Namespace) -> KDSettings | None:
    """Return the distillation that the flags ask for.

    Args:
        args: The namespace of `parse_args`.

    Returns:
        The settings, or None for plain training (no loss and no teacher named).
    """
    teacher = args.teacher or args.kd_model_name or None
    if args.kd_loss is None and teacher is None:
        return None
    name = args.kd_loss or 'kd'
    loss = KD_LOSSES[name]
    knobs = {knob: getattr(args, dest) for dest, knob in knob_dests().items()}
    parameters = {knob: value for knob, value in knobs.items() if value is not None and value is not False}
    if args.kd_distill_type != 'logit':  # the weights and the temperature of timm's script are those of kd
        name, loss = args.kd_distill_type, KD_LOSSES['kd']
        defaults = loss.hyper_parameters()
        parameters = {
            argument: defaults.get(argument) if getattr(args, dest) is None else getattr(args, dest)
            for dest, argument in TIMM_DISTILLATION[name].items()
        }
        if parameters.get('distill_type') == 'hard':
            del parameters['temperature']
    task_loss_weight, distill_loss_weight = args.task_loss_weight, args.distill_loss_weight
    if task_loss_weight is None and distill_loss_weight is None:
        task_loss_weight, distill_loss_weight = loss.default_task_weight, loss.default_distill_weight
    elif distill_loss_weight is None:  # timm's rule, as is the next
        distill_loss_weight = 1.0 - task_loss_weight
    elif task_loss_weight is None:
        task_loss_weight = 1.0
    warmup_epochs = args.kd_warmup_epochs
    teacher_dtype = args.teacher_dtype
    if teacher_dtype == 'auto' and args.kd_model_name and not args.teacher:  # the precision in timm's script
        teacher_dtype = 'amp' if args.amp else args.model_dtype or 'float32'
    return KDSettings(
        loss=name,
        loss_parameters=parameters,
        teacher=teacher,
        teacher_dtype=teacher_dtype,
        task_loss_weight=task_loss_weight,
        distill_loss_weight=distill_loss_weight,
        warmup_epochs=loss.default_warmup_epochs(args.epochs) if warmup_epochs is None else warmup_epochs,
    )


def named_teachers(args: argparse.Namespace) -> list[str]:
    """Return the teachers of `--teacher`, or that of timm's `--kd-model-name`."""
    specs = args.teacher or args.kd_model_name or []
    return specs if isinstance(specs, list) else [specs]
