"""args -> data sets, loaders, Mixup, all of them timm's."""
import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageMode
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .errors import UsageError
from .replay import ReplayMixup, make_replayable

_logger = logging.getLogger(__name__)

DataConfig = dict[str, Any]


@dataclass
class TrainData:
    """The training side: the loader, and Mixup where the loader does not mix itself (`--no-prefetcher`)."""
    dataset: Dataset
    loader: DataLoader
    mixup_fn: Mixup | None
    mixup_active: bool

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Tells everything that counts epochs which one comes, and at which batch a replayable loader begins."""
        batch_sampler = getattr(self.loader, 'batch_sampler', None)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
        elif hasattr(batch_sampler, 'issued'):  # a replayable one
            batch_sampler.set_epoch(epoch, first_batch)
        else:
            for sampler in (batch_sampler, self.loader.sampler):
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(epoch)
                    break

    def set_mixup(self, enabled: bool) -> None:
        """Switches Mixup and CutMix, where there are any (`--mixup-off-epoch`); targets stay dense."""
        if self.mixup_active:
            mixer = self.loader if self.mixup_fn is None else self.mixup_fn
            mixer.mixup_enabled = enabled


def uses_mixup(args: argparse.Namespace) -> bool:
    """Tells whether batches are mixed, so that targets are dense."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def uses_splits(args: argparse.Namespace) -> bool:
    """Tells whether each sample comes in several augmentations (AugMix)."""
    return args.aug_splits > 1


def create_train_data(
        args: argparse.Namespace,
        data_config: DataConfig,
        device: torch.device,
        dtype: torch.dtype | None,
) -> TrainData:
    """Creates the training data set and its loader.

    Raises:
        UsageError: If the data cannot be found or does not fit the flags.
    """
    if args.aug_repeats and not args.distributed:
        raise UsageError(
            f'--aug-repeats {args.aug_repeats:g}: timm spreads the repeats over processes: start two or more with '
            'torchrun, or leave it out.')
    dataset = _create_dataset(args, data_config, training=True)
    _check_classes(dataset, args)
    mixup_active = uses_mixup(args)
    collate_fn = mixup_fn = None
    if mixup_active:
        mixup_args = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        if args.no_prefetcher:
            mixup_fn = Mixup(**mixup_args)
        else:
            collate_fn = FastCollateMixup(**mixup_args)
    augmented = AugMixDataset(dataset, num_splits=args.aug_splits) if uses_splits(args) else dataset
    try:
        loader = create_loader(
            augmented,
            batch_size=args.batch_size,
            is_training=True,
            collate_fn=collate_fn,
            **augmentation_settings(args, data_config),
            **_scheduled_sizes(args),
            **_loading(args, data_config, device, dtype),
        )
    except (ValueError, AssertionError) as error:  # timm's own sentences about --train-img-sizes and its like
        raise UsageError(f'training loader: {error}') from error
    if args.replayable_data:
        loader = make_replayable(loader, seed=args.seed, num_epochs=args.teacher_cache_epochs)
        if mixup_fn is not None:
            mixup_fn = ReplayMixup(mixup_fn, loader)
    if not isinstance(dataset, IterableDataset) and len(loader) == 0:
        raise UsageError(
            f'--batch-size {args.batch_size}: the {len(dataset)} training images do not fill one batch, and timm drops '
            'the last partial one: lower it.'
        )
    return TrainData(dataset, loader, mixup_fn, mixup_active)


def create_eval_loader(
        args: argparse.Namespace,
        data_config: DataConfig,
        device: torch.device,
        dtype: torch.dtype | None,
        persistent_workers: bool = True,
) -> DataLoader | None:
    """Creates a loader of the validation split, or returns None without one (`--val-split ''`).

    Raises:
        UsageError: If the split cannot be found or has other classes than the model.
    """
    if not args.val_split:
        return None
    dataset = _create_dataset(args, data_config, training=False)
    _check_classes(dataset, args)
    loading = _loading(args, data_config, device, dtype)
    if args.distributed and ('tfds' in args.dataset or 'wds' in args.dataset):
        loading['num_workers'] = min(2, args.workers)  # sharded readers: few workers keep the padding small
    loading.pop('use_multi_epochs_loader')
    loading.pop('worker_seeding')
    loader = create_loader(
        dataset,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        persistent_workers=persistent_workers,
        **loading,
    )
    if args.replayable_data:
        # Persistent workers draw a seed when they start, a resumed run once more: not from the stream of dropout.
        getattr(loader, 'loader', loader).generator = torch.Generator()
    return loader


def class_names(dataset: Dataset) -> list[str] | None:
    """Returns the names of a data set's classes in index order, where it knows them."""
    class_to_idx = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or \
        getattr(dataset, 'class_to_idx', None)
    return sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else None


def _create_dataset(args: argparse.Namespace, data_config: DataConfig, training: bool) -> Dataset:
    split = args.train_split if training else args.val_split
    root = args.data_dir or args.data
    if not args.dataset:
        _check_folder(root, split, '--train-split' if training else '--val-split')
    input_img_mode = image_mode(args, data_config['input_size'][0])
    options = dict(repeats=args.epoch_repeats) if training else {}
    try:
        return create_dataset(
            args.dataset,
            root=root,
            split=split,
            is_training=training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=input_img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **options,
        )
    except (RuntimeError, AssertionError, FileNotFoundError, ImportError, ValueError) as error:
        raise UsageError(f'--data-dir {root}, split {split!r}, --dataset {args.dataset!r}: {error}') from error


def image_mode(args: argparse.Namespace, channels: int) -> str:
    """Returns the PIL mode of the images, timm's default for the model's channels where no flag says."""
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


def _check_folder(root: str, split: str, flag: str) -> None:
    """Refuses a folder that timm would read as something it is not: a missing split falls back to the root."""
    if not os.path.isdir(root):
        if not os.path.isfile(root):  # a tar file is timm's business
            raise UsageError(f'data folder {root}: no such folder; it should hold a folder per split and class.')
        return
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    train, validation = {'train', 'training'}, {'val', 'valid', 'validation', 'eval', 'evaluation'}
    name = split.split('[')[0]
    synonyms = next((group for group in (train, validation) if name in group), {name})
    if not folders & {name, *synonyms} and folders & {*train, *validation}:
        found = ', '.join(sorted(folders & {*train, *validation}))
        raise UsageError(f"{flag} {split}: {root} has no such folder, but {found}; name one (--val-split '' for none).")


def _check_classes(dataset: Dataset, args: argparse.Namespace) -> None:
    names = class_names(dataset)
    if names is None:
        return
    root = args.data_dir or args.data
    if names in ([''], ['.']):
        raise UsageError(f'data folder {root}: images, but no class folders; it should hold <split>/<class>/<image>.')
    if len(names) > args.num_classes:
        raise UsageError(f'data folder {root}: {len(names)} classes, but --num-classes {args.num_classes}.')
    if len(names) < args.num_classes:
        _logger.warning(
            f'{root} has {len(names)} classes, the model {args.num_classes}: the others will never be seen '
            f'(--num-classes {len(names)}?).')


def augmentation_settings(args: argparse.Namespace, data_config: DataConfig) -> dict[str, Any]:
    """Returns the keywords of `create_loader` that decide how training images are augmented."""
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
        num_aug_splits=args.aug_splits if uses_splits(args) else 0,
        interpolation=interpolation,
    )


def _scheduled_sizes(args: argparse.Namespace) -> dict[str, Any]:
    if not args.train_img_sizes:
        return {}
    return dict(
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


def _loading(
        args: argparse.Namespace,
        data_config: DataConfig,
        device: torch.device,
        dtype: torch.dtype | None,
) -> dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        img_dtype=dtype or torch.float32,
        device=device,
        use_prefetcher=not args.no_prefetcher,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
    )
