"""Setup -> optimizer, schedule, task: what timm's factories and ours make of the flags for training."""
import logging
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import NativeScaler
from torch import nn

from ..cli.checks import base_optimizer
from ..cli.messages import given
from ..cli.task_loss import is_multi_label, loss_kwargs
from ..errors import UsageError, shortened
from ..losses import create_kd_loss
from ..process import preserved_random_state
from ..task import KDTask, TaskTeacher
from .base import Setup

_logger = logging.getLogger('train')


def create_optimizer(setup: Setup, task: TrainingTask) -> torch.optim.Optimizer:
    """Create timm's optimizer of the student and, where the task has one, of the projection of its features.

    Raises:
        UsageError: If the device lacks what `--opt-kwargs` asks for.
    """
    args = setup.args
    try:
        optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except RuntimeError as error:  # the device lacks what --opt-kwargs asks for (fused=True)
        raise UsageError(f'{given(args, "opt_kwargs")}: {shortened(error)}') from error
    # timm's factory puts weight decay into the parameter groups and leaves a zero among the defaults.
    defaults = {**optimizer.defaults, 'weight_decay': args.weight_decay}
    _logger.info(
        f'Created {type(optimizer).__name__} ({args.opt}) optimizer: '
        + ', '.join(f'{name}: {value}' for name, value in defaults.items()))
    return optimizer


def create_loss_scaler(setup: Setup) -> NativeScaler | None:
    """Create timm's loss scaler where float16 gradients need it: under `--amp` on a GPU."""
    args, device = setup.args, setup.process.device
    if args.amp:
        _logger.info('Using native Torch AMP. Training in mixed precision.')
    else:
        _logger.info(f'AMP not enabled. Training in torch.{args.model_dtype or "float32"}.')
    needs_one = args.amp and args.amp_dtype == 'float16' and device.type == 'cuda'
    return NativeScaler(device=device.type) if needs_one else None


def create_task(setup: Setup, teacher: nn.Module | None) -> TrainingTask:
    """Make the task of timm that the flags ask for, or `KDTask`, on the criterion of timm's script, with its EMA.

    Raises:
        UsageError: If the weights of `--loss-class-weight` or `--loss-pos-weight` are those of other classes, or the
            features of student and teacher cannot be compared.
    """
    args = setup.args
    loss = loss_kwargs(args)
    for dest, name in dict(
            loss_class_weight='class_weight', loss_pos_weight='pos_weight', class_stats='class_counts').items():
        entries = loss.get(name)
        if isinstance(entries, torch.Tensor) and len(entries) != args.num_classes:
            raise UsageError(
                f'{given(args, dest)}: has {len(entries)} entries but the model has '
                f'{args.num_classes} classes.')
    criterion = create_classification_loss(**loss)
    kd, process = setup.kd, setup.process
    common = dict(criterion=criterion, device=process.device, dtype=setup.dtype, verbose=process.primary)
    if is_multi_label(args):
        task = MultiLabelClassificationTask(setup.student, threshold=args.multilabel_threshold, **common)
    elif kd is None:
        task = ClassificationTask(setup.student, **common)
    else:
        common.update(task_loss_weight=kd.task_loss_weight, distill_loss_weight=kd.distill_loss_weight)
        if kd.loss == 'feature':
            task = _feature_task(setup, TaskTeacher(teacher, setup.dtype), **common)
        elif kd.loss == 'token':
            task = TokenDistillationTask(
                setup.student, TaskTeacher(teacher, setup.dtype), **kd.loss_parameters, **common)
        else:
            second_order = get_optimizer_info(base_optimizer(args.opt)).second_order
            task = KDTask(
                setup.student,
                create_kd_loss(kd.loss, double_backward=second_order, **kd.loss_parameters),
                teacher=teacher,
                smoothing=args.smoothing,
                warmup_epochs=kd.warmup_epochs,
                **common,
            )
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    return task


def _feature_task(setup: Setup, teacher: TaskTeacher, **options: Any) -> FeatureDistillationTask:
    """Make timm's task, which projects the student's features to the teacher's width, and try it on blank images."""
    flags = given(setup.args, 'kd_distill_type', 'kd_student_feature_dim', 'kd_teacher_feature_dim')
    try:
        task = FeatureDistillationTask(setup.student, teacher, **setup.kd.loss_parameters, **options)
        with preserved_random_state(), torch.no_grad(), setup.steps.autocast():
            images = torch.zeros(2, *setup.data_config['input_size'], device=setup.process.device, dtype=setup.dtype)
            features = task.eval().trainable_module(images)[1], teacher(images, return_features=True)
    except UsageError:
        raise
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f'{flags}: {shortened(error)}') from error
    if features[0].shape != features[1].shape:
        raise UsageError(
            f'{flags}: --model {setup.args.model} gives features of shape '
            f'{list(features[0].shape[1:])} for an image, the teacher {list(features[1].shape[1:])}; '
            '--kd-student-feature-dim and --kd-teacher-feature-dim are their widths.')
    return task


def create_scheduler(setup: Setup, optimizer: torch.optim.Optimizer, start_epoch: int) -> tuple[Scheduler | None, int]:
    """Create timm's scheduler, set to the start epoch, and return it with the number of epochs to train.

    Raises:
        UsageError: If the epoch has too few updates for the schedule.
    """
    args = setup.args
    updates_per_epoch = -(-len(setup.data.loader) // setup.steps.grad_accum_steps)
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=setup.eval_metric == 'loss'),
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:  # wsd and rsqrt under --sched-on-updates: all else was refused with the flags
        raise UsageError(
            f'--sched {args.sched} --sched-on-updates: {updates_per_epoch} updates an epoch leave less than one to '
            'decay in, raise --decay-epochs or --epochs.'
        ) from error
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            scheduler.step(start_epoch)
    if args.stop_epoch is not None:
        num_epochs = min(num_epochs, args.stop_epoch)
    return scheduler, num_epochs


def count_epochs(setup: Setup) -> int:
    """Return the number of epochs that the flags schedule; a throw-away optimizer stands in for that of the run."""
    return create_scheduler(setup, torch.optim.SGD([torch.zeros(1)], lr=1.0), start_epoch=0)[1]
