"""args -> optimizer, schedule, teacher, task: what timm's factories and ours make of the flags."""
import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TrainingTask
from timm.utils import NativeScaler
from torch import nn

from .cli import KDSettings
from .cli.messages import as_given
from .engine import StepSettings
from .errors import UsageError, shortened
from .loop import LoopSettings
from .losses import create_kd_loss
from .process import Process, preserved_random_state
from .task import KDTask
from .teacher import Teacher, TeacherEnsemble, create_teacher

_logger = logging.getLogger('train')


def model_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Returns the dtype that `--model-dtype` names, or None for the default."""
    if args.model_dtype == 'float16':
        _logger.warning('--model-dtype float16: training in pure float16 easily overflows; bfloat16 is safer.')
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Returns what makes the context that forwards run in: autocast under `--amp`."""
    if not args.amp:
        _logger.info(f'AMP not enabled. Training in torch.{args.model_dtype or "float32"}.')
        return nullcontext
    _logger.info('Using native Torch AMP. Training in mixed precision.')
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def create_loss_scaler(args: argparse.Namespace, device: torch.device) -> NativeScaler | None:
    """Returns timm's loss scaler where float16 gradients need it: under `--amp` on a GPU."""
    if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
        return NativeScaler(device=device.type)
    return None


def create_optimizer(
        args: argparse.Namespace,
        student: nn.Module,
        batch_size: float,
        world_size: int,
) -> torch.optim.Optimizer:
    """Creates timm's optimizer; without `--lr`, the rate follows from `--lr-base` and the global batch size."""
    if not args.lr:
        global_batch_size = batch_size * world_size * max(1, args.grad_accum_steps)
        ratio = global_batch_size / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
        args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        _logger.info(
            f'Learning rate ({args.lr}) calculated from base learning rate ({args.lr_base}) and effective global batch '
            f'size ({global_batch_size:g}) with {scale} scaling.')
    try:
        optimizer = create_optimizer_v2(student, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except RuntimeError as error:  # the device has not what --opt-kwargs asks for (fused=True); the rest is checked
        raise UsageError(f'{as_given("opt_kwargs", args.opt_kwargs)}: {shortened(error)}') from error
    # timm's factory puts weight decay into the parameter groups and leaves a zero among the defaults.
    defaults = {**optimizer.defaults, 'weight_decay': args.weight_decay}
    _logger.info(
        f'Created {type(optimizer).__name__} ({args.opt}) optimizer: '
        + ', '.join(f'{name}: {value}' for name, value in defaults.items()))
    return optimizer


def create_run_teacher(
        args: argparse.Namespace,
        kd: KDSettings | None,
        data_config: dict[str, Any],
        process: Process,
) -> Teacher | TeacherEnsemble | None:
    """Loads the teacher that the flags name, if they do; it draws nothing from the training's random streams."""
    if kd is None or kd.teacher is None:
        return None
    with process.primary_first(), preserved_random_state():  # one download, into the cache that the others read
        return create_teacher(
            kd.teacher,
            num_classes=args.num_classes,
            mean=data_config['mean'],
            std=data_config['std'],
            in_chans=data_config['input_size'][0],
            img_size=args.teacher_img_size,
            device=process.device,
            dtype=kd.teacher_dtype,
            model=args.teacher_model,
            model_kwargs=args.teacher_kwargs,
            use_ema=args.teacher_ema,
            class_map=args.teacher_class_map,
            class_map_missing=args.teacher_class_map_missing,
            compile_backend=args.teacher_compile,
        )


def create_task(
        args: argparse.Namespace,
        kd: KDSettings | None,
        student: nn.Module,
        teacher: Teacher | TeacherEnsemble | None,
        optimizer: torch.optim.Optimizer,
        mixup_active: bool,
        process: Process,
        dtype: torch.dtype | None,
) -> TrainingTask:
    """Makes timm's classification task, or `KDTask`, on the criterion that timm's script would use."""
    loss_type = args.loss or ('jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce')
    criterion = create_classification_loss(
        loss_type,
        smoothing=args.smoothing,
        soft_targets=mixup_active and loss_type != 'jsd',
        pos_weight=args.bce_pos_weight if loss_type == 'bce' else None,
        bce_target_thresh=args.bce_target_thresh if loss_type == 'bce' else None,
        bce_sum=args.bce_sum if loss_type == 'bce' else False,
        jsd_splits=args.aug_splits,
    )
    if kd is None:
        return ClassificationTask(student, criterion, device=process.device, dtype=dtype, verbose=process.primary)
    second_order = getattr(optimizer, 'is_second_order', False)
    kd_loss = create_kd_loss(kd.loss, double_backward=second_order, **kd.loss_parameters)
    return KDTask(
        student,
        kd_loss,
        teacher=teacher,
        criterion=criterion,
        smoothing=args.smoothing,
        task_loss_weight=kd.task_loss_weight,
        distill_loss_weight=kd.distill_loss_weight,
        warmup_epochs=kd.warmup_epochs,
        device=process.device,
        dtype=dtype,
        verbose=process.primary,
    )


def create_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        num_batches: int,
        start_epoch: int,
) -> tuple[Scheduler | None, int]:
    """Creates timm's scheduler, set to the start epoch; returns it and the epochs to train."""
    accumulation = max(1, args.grad_accum_steps)
    updates_per_epoch = (num_batches + accumulation - 1) // accumulation
    decreasing = not args.val_split or args.eval_metric == 'loss'
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=decreasing),
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:  # of wsd and rsqrt under --sched-on-updates; the rest is checked
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


def count_epochs(args: argparse.Namespace, num_batches: int) -> int:
    """Returns the epochs that the flags schedule, before there is an optimizer in the state to begin with."""
    return create_scheduler(args, torch.optim.SGD([torch.zeros(1)], lr=1.0), num_batches, start_epoch=0)[1]


def step_settings(
        args: argparse.Namespace,
        device: torch.device,
        dtype: torch.dtype | None,
        reference_batch_size: float,
) -> StepSettings:
    """Returns how a batch becomes an update."""
    return StepSettings(
        device=device,
        dtype=dtype,
        autocast=create_autocast(args, device),
        prefetched=not args.no_prefetcher,
        channels_last=args.channels_last,
        grad_accum_steps=max(1, args.grad_accum_steps),
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        synchronize=args.synchronize_step,
        batch_loss_scale=args.variable_batch_loss_scale if args.train_img_sizes else 'none',
        reference_batch_size=reference_batch_size,
    )


def loop_settings(args: argparse.Namespace, start_epoch: int, num_epochs: int, eval_metric: str) -> LoopSettings:
    """Returns what the epochs of the run are like."""
    return LoopSettings(
        num_epochs=num_epochs,
        start_epoch=start_epoch,
        val_interval=args.val_interval,
        recovery_interval=args.recovery_interval,
        mixup_off_epoch=args.mixup_off_epoch,
        save_epochs=tuple(args.save_epochs or ()),
        eval_metric=eval_metric,
        eval_ema=not args.model_ema_force_cpu,
        dist_bn=args.dist_bn,
        tta=args.tta,
    )
