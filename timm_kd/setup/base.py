"""The set-up that training and filling a teacher cache share: from the flags to student, images and target classes."""
import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from ..cli import KDSettings, resolve_kd
from ..data import DataConfig, TrainData
from ..engine import StepSettings
from ..process import Process
from .data import create_data
from .student import create_student, get_patch_size

_logger = logging.getLogger('train')


@dataclass(frozen=True)
class Setup:
    """What a run is made of before its teacher and optimizer.

    Args:
        args: The flags, with what the set-up found out: `num_classes`, `lr`, and `dist_bn` under `--sync-bn`. Nobody
            writes to them.
        args_text: The flags as they were given, as YAML.
        process: The process that the run lives in.
        dtype: Dtype of the student and its images; None for float32.
        student: The model to train, on its device; on the CPU where it is not trained.
        data_config: timm's data config of the images: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`,
            `crop_mode`.
        kd: The distillation, or None.
        data: The training side of the data.
        eval_loader: The validation loader, or None.
        open_eval_loader: Opens another one, which takes nothing from the workers of `eval_loader`.
        steps: How a batch becomes an update.
    """
    args: argparse.Namespace
    args_text: str
    process: Process
    dtype: torch.dtype | None
    student: nn.Module
    data_config: DataConfig
    kd: KDSettings | None
    data: TrainData
    eval_loader: DataLoader | None
    open_eval_loader: Callable[..., DataLoader] | None
    steps: StepSettings

    @property
    def eval_metric(self) -> str:
        """The metric that ranks checkpoints: that of `--eval-metric`, the training loss where nothing is validated."""
        return self.args.eval_metric if self.eval_loader is not None else 'loss'


def set_up(args: argparse.Namespace, args_text: str, process: Process, trains: bool = True) -> Setup:
    """Build what the flags describe, in the order of timm's script, so that the random draws are the same.

    Args:
        args: The flags.
        args_text: The same as YAML.
        process: The process.
        trains: Whether the student is trained. A fill of a teacher cache asks it only what its images are like.

    Raises:
        UsageError: If the flags, the data or the student cannot make a run.
    """
    if args.model_dtype == 'float16':
        _logger.warning('--model-dtype float16: training in pure float16 easily overflows; bfloat16 is safer.')
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    random_seed(args.seed, process.rank)
    settled = argparse.Namespace(**vars(args))
    if trains:
        student, data_config, settled.num_classes = create_student(args, process, dtype)
    else:
        on_cpu = replace(process, device=torch.device('cpu'))
        student, data_config, settled.num_classes = create_student(args, on_cpu, None)
    if process.distributed and args.sync_bn:
        settled.dist_bn = ''  # synchronised statistics need no further distribution
    data, open_eval_loader = create_data(settled, data_config, process, dtype, get_patch_size(student))
    eval_loader = open_eval_loader() if open_eval_loader is not None else None
    amp_dtype = getattr(torch, args.amp_dtype)
    autocast = partial(torch.autocast, process.device.type, amp_dtype) if args.amp else nullcontext
    settled.lr = args.lr or _learning_rate(args, data.reference_batch_size, process.world_size)
    return Setup(
        args=settled,
        args_text=args_text,
        process=process,
        dtype=dtype,
        student=student,
        data_config=data_config,
        kd=resolve_kd(args),
        data=data,
        eval_loader=eval_loader,
        open_eval_loader=open_eval_loader,
        steps=StepSettings(
            device=process.device,
            dtype=dtype,
            autocast=autocast,
            prefetched=not args.no_prefetcher,
            channels_last=args.channels_last,
            grad_accum_steps=max(1, args.grad_accum_steps),
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            synchronize=args.synchronize_step,
            batch_loss_scale=_batch_loss_scale(args),
            reference_batch_size=data.reference_batch_size,
            uneven_ranks=process.world_size if args.naflex_loader else 1,
        ),
    )


def _batch_loss_scale(args: argparse.Namespace) -> str:
    if args.naflex_loader:
        return args.naflex_loss_scale
    return args.variable_batch_loss_scale if args.train_img_sizes else 'none'


def _learning_rate(args: argparse.Namespace, batch_size: float, world_size: int) -> float:
    """Return the rate that follows from `--lr-base` and the global batch size."""
    global_batch_size = batch_size * world_size * max(1, args.grad_accum_steps)
    ratio = global_batch_size / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    _logger.info(
        f'Learning rate ({lr}) calculated from base learning rate ({args.lr_base}) and effective global batch size '
        f'({global_batch_size:g}) with {scale} scaling.')
    return lr
