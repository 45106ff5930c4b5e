"""args -> objects: what the flags amount to in the terms of timm's factories and ours."""
import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import ImageMode
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, load_checkpoint, resolve_model_input_args
from timm.utils import set_jit_fuser
from torch import nn
from torch.utils.data import DataLoader

from .cli import resolve_kd
from .cli.messages import as_given
from .data import DataConfig, TrainData, create_datasets, create_eval_loader, create_train_data
from .errors import UsageError, explain, shortened
from .files import load_file
from .process import Process
from .student import check_forward, check_pretrained, missing_keys
from .teacher.spec import nearest_model

_logger = logging.getLogger(__name__)

# What timm, torch, safetensors and the Hub client raise for a model or a file of weights that cannot be had.
_BUILD_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError, EOFError,
    SafetensorError,
)


@dataclass(frozen=True)
class Student:
    """The model to train and what it decides for the run.

    Args:
        model: The model, on its device.
        data_config: timm's data config of its images: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`,
            `crop_mode`.
        num_classes: `--num-classes`, or the model's own where the flag leaves it to the model.
    """
    model: nn.Module
    data_config: DataConfig
    num_classes: int


def create_student(
        args: argparse.Namespace,
        process: Process,
        dtype: torch.dtype | None,
) -> Student:
    """Create the student as timm's script does, checked on images like those of the run.

    Raises:
        UsageError: If timm cannot build the model that the flags describe, or it cannot take the images.
    """
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    try:
        model = _create_model(args)
        _scale_head(model, args.head_init_scale, args.head_init_bias)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        if process.primary:
            _logger.info(f'Model {args.model} created, param count:{sum(p.numel() for p in model.parameters())}')
        data_config = resolve_input_data_config(model, vars(args), verbose=process.primary)
    except UsageError:
        raise
    except _BUILD_ERRORS as error:
        raise UsageError(_why_not_built(args, error)) from error
    num_classes = model.num_classes if args.num_classes is None else args.num_classes
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=process.device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if hasattr(model, 'dist_token') and resolve_kd(args) is not None:
        # timm averages the two heads as long as nobody calls `set_distilled_training`, but the second is there to learn
        # from the teacher alone, which no loss here does.
        raise UsageError(
            f'--model {args.model} has a distillation token, whose head gives a second set of logits in training, and '
            'the distillation losses are defined on one: take a model without it (deit_tiny_patch16_224, say).'
        )
    _check_forward(args, model, data_config['input_size'], num_classes)
    if process.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        model = torch.jit.script(model)
    return Student(model, data_config, num_classes)


def settled(args: argparse.Namespace, student: Student, process: Process) -> argparse.Namespace:
    """Return the flags with what the student decides, as timm's script stores them in checkpoints."""
    decided = dict(num_classes=student.num_classes)
    if process.distributed and args.sync_bn:
        decided['dist_bn'] = ''  # synchronised statistics need no further distribution
    return argparse.Namespace(**{**vars(args), **decided})


def _create_model(args: argparse.Namespace) -> nn.Module:
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else None
    factory_args = resolve_model_input_args(
        args.model,
        vars(args),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        pretrained_cfg_overlay=overlay,
        **args.model_kwargs,
    )
    with missing_keys() as missing:
        model = create_model(
            pretrained=args.pretrained,
            pretrained_cfg_overlay=overlay,
            scriptable=args.torchscript or None,
            **factory_args,
        )
    if args.pretrained_path:
        check_pretrained(model, missing, args.pretrained_path, args.model)
    if args.initial_checkpoint:
        try:
            load_checkpoint(model, args.initial_checkpoint)
        except _BUILD_ERRORS as error:
            _check_readable(args.initial_checkpoint, '--initial-checkpoint')
            other_head = '--pretrained --pretrained-path takes all but the head of a file; '
            raise UsageError(
                f'--initial-checkpoint {args.initial_checkpoint} does not fit --model {args.model}: '
                f'{other_head if "size mismatch" in str(error) else ""}{shortened(error)}'
            ) from error
    return model


def _scale_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    if scale is None and bias is None:
        return
    head = model.get_classifier()
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            head.bias.mul_(scale)
        if bias is not None:
            nn.init.constant_(head.bias, bias)


def _check_forward(
        args: argparse.Namespace,
        model: nn.Module,
        input_size: tuple[int, int, int],
        num_classes: int,
) -> None:
    """Show the student a batch of blank images for each size that is validated or trained on."""
    splits = max(args.aug_splits, 2) if args.split_bn else 1
    # Two images do for batch norm, if the batches of the run are as large; each split has its own.
    smallest = min(2, args.batch_size, *args.train_batch_sizes or ())
    channels, *size = input_size
    training_sizes = [[side, side] for side in args.train_img_sizes or ()] or [size]
    batches = [(False, (2 * splits, channels, *size))]
    batches += [(True, (smallest * splits, channels, *sides)) for sides in training_sizes]
    suspects = [
        as_given(dest, getattr(args, dest))
        for dest in ('input_size', 'img_size', 'train_img_sizes', 'in_chans', 'gp', 'model_kwargs')
        if getattr(args, dest) not in (None, {})
    ]
    suspects += ['--batch-size 1'] if smallest == 1 else []
    check_forward(model, args.model, batches, num_classes, remedy=' or '.join(suspects or ['--img-size']))


def _why_not_built(args: argparse.Namespace, error: Exception) -> str:
    """Tell the user what an error of timm, torch, safetensors or the Hub client means."""
    if str(error).startswith('Unknown model'):
        return f'--model {args.model} is no model of timm {timm.__version__}{nearest_model(args.model)}.'
    if args.pretrained_path:
        _check_readable(args.pretrained_path, '--pretrained-path')
    elif isinstance(error, OSError) and not args.model.startswith('local-dir:'):
        return f'--model {args.model}{" --pretrained" if args.pretrained else ""}: {explain(error, args.model)}'
    source = f' --pretrained-path {args.pretrained_path}' if args.pretrained_path else ''
    return f'--model {args.model}{source}: {shortened(error)}'


def _check_readable(path: str, flag: str) -> None:
    if Path(path).suffix in ('.npz', '.npy'):  # timm reads those by itself, without pickles
        return
    content = load_file(path, f'{flag} {path}')
    if not isinstance(content, dict):
        raise UsageError(f'{flag} {path} holds a {type(content).__name__}, not a checkpoint or a state dict.')


def create_data(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        dtype: torch.dtype | None,
) -> tuple[TrainData, DataLoader | None]:
    """Create the training data and the validation loader, None without a validation split (`--val-split ''`).

    Raises:
        UsageError: If the data cannot be found or does not fit the flags.
    """
    train_set, eval_set = create_datasets(**dataset_kwargs(args, data_config))
    data = create_train_data(train_set, **train_data_kwargs(args, data_config, process, dtype))
    if eval_set is None:
        return data, None
    return data, create_eval_loader(eval_set, **eval_loader_kwargs(args, data_config, process, dtype))


def dataset_kwargs(args: argparse.Namespace, data_config: DataConfig) -> dict[str, Any]:
    """Return the keywords of `create_datasets`."""
    return dict(
        name=args.dataset,
        root=args.data_dir or args.data,
        num_classes=args.num_classes,
        train_split=args.train_split,
        val_split=args.val_split,
        class_map=args.class_map,
        train_num_samples=args.train_num_samples,
        val_num_samples=args.val_num_samples,
        repeats=args.epoch_repeats,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=image_mode(args, data_config['input_size'][0]),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )


def train_data_kwargs(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the keywords of `create_train_data`."""
    keywords = dict(
        batch_size=args.batch_size,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        replay_seed=args.seed if args.replayable_data else None,
        replay_epochs=args.teacher_cache_epochs,
        **augmentation_settings(args, data_config),
        **_loading_kwargs(args, data_config, process, dtype),
    )
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        keywords['mixup'] = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
    if args.train_img_sizes:
        keywords.update(
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=args.epochs,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
        )
    return keywords


def eval_loader_kwargs(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the keywords of `create_eval_loader`."""
    keywords = dict(
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        replayable=args.replayable_data,
        **_loading_kwargs(args, data_config, process, dtype),
    )
    if process.distributed and ('tfds' in args.dataset or 'wds' in args.dataset):
        keywords['num_workers'] = min(2, args.workers)  # sharded readers: few workers keep the padding small
    return keywords


def augmentation_settings(args: argparse.Namespace, data_config: DataConfig) -> dict[str, Any]:
    """Return the keywords of `timm.data.create_loader` that decide how training images are augmented."""
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    return dict(
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=interpolation,
    )


def image_mode(args: argparse.Namespace, channels: int) -> str:
    """Return the PIL mode of the images, timm's default for the model's channels where no flag says.

    Raises:
        UsageError: If PIL knows no such mode, or the model takes other channels.
    """
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError as error:
        raise UsageError(f'--input-img-mode {mode}: PIL knows no such mode; RGB, L, RGBA, ... are needed.') from error
    if bands != channels:
        raise UsageError(
            f'images of mode {mode} have {bands} channels, --model {args.model} takes {channels}: set --in-chans or '
            '--input-img-mode.')
    return mode


def _loading_kwargs(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the keywords of `timm.data.create_loader` that both splits share."""
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=process.distributed,
        # From pageable memory the host waits for each copy to the GPU; where a batch lies changes no number.
        pin_memory=args.pin_mem or (process.device.type == 'cuda' and not args.no_prefetcher),
        img_dtype=dtype or torch.float32,
        device=process.device,
        use_prefetcher=not args.no_prefetcher,
    )
