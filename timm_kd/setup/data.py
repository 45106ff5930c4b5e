"""args -> the data: the flags as keywords of timm's data sets and loaders."""
import argparse
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import ImageMode
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..cli.messages import given
from ..cli.task_loss import is_mixing, is_multi_label
from ..data import (
    DataConfig,
    LabelVector,
    TrainData,
    UnreadableImages,
    create_datasets,
    create_eval_loader,
    create_naflex_train_data,
    create_train_data,
)
from ..errors import UsageError
from ..process import Process

_logger = logging.getLogger(__name__)


def create_data(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        dtype: torch.dtype | None,
        patch_size: tuple[int, int],
) -> tuple[TrainData, Callable[..., DataLoader] | None]:
    """Create the data of both splits.

    Returns:
        The training data, and what opens a loader of the validation split (with further keywords of
        `create_eval_loader`); None without that split (`--val-split ''`).

    Raises:
        UsageError: If the data cannot be found or does not fit the flags.
    """
    train_set, eval_set = _open_datasets(args, data_config)
    loading = loading_kwargs(args, data_config, process, dtype)
    if args.naflex_loader:
        data = create_naflex_train_data(train_set, **loading, **_naflex_kwargs(args, data_config, process, patch_size))
        loading.update(naflex=True, patch_size=patch_size, max_seq_len=args.naflex_max_seq_len)
    else:
        data = create_train_data(train_set, **loading, **_train_data_kwargs(args, data_config))
    if eval_set is None:
        return data, None
    if args.tta and not isinstance(eval_set, IterableDataset):
        # timm averages the outputs of neighbours, and cannot where the last batch leaves some over.
        num_images = -(-len(eval_set) // process.world_size)
        if num_images % args.tta:
            raise UsageError(
                f'--tta {args.tta}: the {num_images} images of --val-split {args.val_split} are no multiple of it, '
                'take another number or leave it out.'
            )
    if process.distributed and ('tfds' in args.dataset or 'wds' in args.dataset):
        loading['num_workers'] = min(2, args.workers)  # sharded readers: few workers keep the padding small
    return data, partial(
        create_eval_loader,
        eval_set,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        replayable=args.replayable_data,
        **loading,
    )


def _open_datasets(args: argparse.Namespace, data_config: DataConfig) -> tuple[Dataset, Dataset | None]:
    """Open both splits, and refuse a field of the samples that is not there or holds labels of the wrong kind."""
    labels = {}
    if is_multi_label(args):
        dense = args.target_format == 'multihot'
        labels = dict(
            target_format=args.target_format or None, target_transform=LabelVector(args.num_classes, dense=dense))
    train_set, eval_set = create_datasets(
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
        **labels,
    )
    keys = [given(args, dest) for dest in ('input_key', 'target_key') if getattr(args, dest)]
    if (labels or keys) and not isinstance(train_set, IterableDataset):
        try:
            train_set[0]  # one image is enough to see it
        except LookupError as error:
            raise UsageError(
                f'{" ".join(keys) or "--target-key"}: the images of --dataset {args.dataset} have no field {error}.'
            ) from error
        except UnreadableImages as error:
            raise UsageError(str(error)) from error
    return train_set, eval_set


def _train_data_kwargs(args: argparse.Namespace, data_config: DataConfig) -> dict[str, Any]:
    """Return the keywords of `create_train_data` that are not those of `loading_kwargs`."""
    keywords = dict(
        batch_size=args.batch_size,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        replay_seed=args.seed if args.replayable_data else None,
        replay_epochs=args.teacher_cache_epochs,
        crops_per_image=args.crops_per_image,
        mixup_off_epoch=args.mixup_off_epoch,
        **augmentation_settings(args, data_config),
    )
    if is_mixing(args):
        keywords['mixup'] = dict(_mixup_kwargs(args), cutmix_minmax=args.cutmix_minmax, mode=args.mixup_mode)
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


def _naflex_kwargs(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        patch_size: tuple[int, int],
) -> dict[str, Any]:
    """Return the keywords of `create_naflex_train_data` that are not those of `loading_kwargs`."""
    keywords = dict(
        batch_size=args.batch_size,
        train_seq_lens=args.naflex_train_seq_lens,
        worker_seeding=args.worker_seeding,
        rank=process.rank,
        world_size=process.world_size,
        **augmentation_settings(args, data_config),
    )
    if args.naflex_patch_sizes:
        keywords.update(
            patch_size_choices=args.naflex_patch_sizes, patch_size_choice_probs=args.naflex_patch_size_probs)
    else:
        keywords['patch_size'] = patch_size
    if is_mixing(args):
        keywords['mixup'] = dict(_mixup_kwargs(args), mixup_off_epoch=args.mixup_off_epoch)
        if args.cutmix_minmax or args.mixup_mode != 'batch':
            _logger.warning('--cutmix-minmax and --mixup-mode: NaFlex Mixup has neither, as in timm\'s script.')
    return keywords


def _mixup_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords that timm's kinds of Mixup share."""
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=is_multi_label(args),
    )


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
    """Return the PIL mode of the images: timm's default for the channels of the model unless a flag names one.

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


def loading_kwargs(
        args: argparse.Namespace,
        data_config: DataConfig,
        process: Process,
        dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the keywords of timm's loader, `--naflex-loader` or not, that both splits share."""
    if args.naflex_loader:
        images = dict(
            channels=data_config['input_size'][0], patchify_channels_last=not args.naflex_patchify_channels_first)
    else:
        images = dict(input_size=data_config['input_size'])
    return dict(
        images,
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
