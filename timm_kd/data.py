"""The data of a run: timm's data sets, loaders and Mixup, and what is refused of a folder of images."""
import logging
import os
import pickle
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    Mixup,
    MultiLabelTarget,
    NaFlexMixup,
    create_dataset,
    create_loader,
    create_naflex_loader,
)
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from .errors import CommandError, UsageError, few, shortened
from .replay import ReplayBatchSampler, ReplayMixup, make_replayable

_logger = logging.getLogger(__name__)

DataConfig = dict[str, Any]

# The folders of a data set in which timm looks for training and for validation images.
_SPLIT_FOLDERS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation')

# What timm's readers raise for data that they cannot find or read.
_READ_ERRORS = (
    RuntimeError, AssertionError, ImportError, LookupError, OSError, ValueError, tarfile.TarError,
    pickle.UnpicklingError,
)


class UnreadableImages(CommandError, RuntimeError):
    """Images of the data set cannot be read; training cannot go on.

    A `DataLoader` raises an error of a worker process again with the worker's traceback before its message; the message
    here is the sentence alone.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class NamedImages(ImageDataset):
    """timm's data set, with an error that names the file where timm gives up on its images.

    Args:
        dataset: The data set whose reader and settings to take.

    Raises:
        UnreadableImages: By `dataset[index]`, if this image and those after it cannot be read (timm skips up to nine),
            or if it has too many pixels to be safe.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        vars(self).update(vars(dataset))

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except Image.DecompressionBombError as error:
            raise UnreadableImages(f'{self._place(index)} cannot be read: {shortened(error)}') from error
        except RuntimeError as error:
            if 'consecutive samples' not in str(error):
                raise
            raise UnreadableImages(
                f'{self._place(index)} and the {self._max_retries - 1} images after it cannot be read: mend or remove '
                'them.'
            ) from error

    def _place(self, index: int) -> str:
        name = self.filename(index, absolute=True) or f'image {index}'  # images of hfds data sets may have no name
        return name if os.path.isabs(name) else f'{name} of {self.reader.root}'


class LabelVector(MultiLabelTarget):
    """timm's vector of an image's labels, `[C]`, with an error of one sentence.

    Raises:
        UnreadableImages: By `vector(target)`, if the target is no list of labels, or of others than there are.
    """

    def __call__(self, target: Any) -> torch.Tensor:
        try:
            return super().__call__(target)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UnreadableImages(
                f'an image has the labels {shortened(target)}: {str(error).rstrip(".")}; see `target_key`, '
                '`target_format` and `num_classes`.'
            ) from error


@dataclass
class TrainData:
    """The training side: the loader, and Mixup where the loader does not mix itself (one without prefetcher).

    `reference_batch_size` is what the automatic learning rate and the loss scale refer to: the size of a batch, or its
    average over a schedule of several image sizes. From `mixup_off_epoch` on (0: never) nothing is mixed; targets
    stay dense.
    """
    dataset: Dataset
    loader: DataLoader
    mixup_fn: Mixup | None
    mixup_active: bool
    mixup_off_epoch: int
    reference_batch_size: float

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Announce an epoch to the data set or the sampler; a replayable loader begins it at `first_batch`."""
        mixer = self.loader if self.mixup_fn is None else self.mixup_fn
        if self.mixup_active and hasattr(mixer, 'mixup_enabled'):  # NaFlexMixup counts the epochs by itself
            mixer.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
        batch_sampler = getattr(self.loader, 'batch_sampler', None)
        batching = next((each for each in (self.dataset, self.loader.dataset) if hasattr(each, 'set_epoch')), None)
        if batching is not None:  # a stream, or the data set of batches that a NaFlex loader reads
            batching.set_epoch(epoch)
        # Scheduled image sizes have both a data set and a sampler that count epochs.
        if isinstance(batch_sampler, ReplayBatchSampler):
            batch_sampler.set_epoch(epoch, first_batch)
        else:
            for sampler in (batch_sampler, self.loader.sampler):
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(epoch)
                    break


def create_datasets(
        root: str,
        *,
        num_classes: int,
        name: str = '',
        train_split: str = 'train',
        val_split: str = 'validation',
        class_map: str = '',
        train_num_samples: int | None = None,
        val_num_samples: int | None = None,
        repeats: float = 0,
        **options: Any,
) -> tuple[Dataset, Dataset | None]:
    """Create the data sets of both splits, their classes numbered alike.

    timm numbers the classes of each split by itself. Where the validation split holds images of some of the training
    classes only, it is read with training's numbers.

    Args:
        root: Folder of the data set, or a tar file.
        num_classes: Classes of the model.
        name: `--dataset` of timm: '' for folders and tar files.
        train_split: Name of the training split.
        val_split: Name of the validation split; '' for none.
        class_map: A file that numbers the classes of both splits; '' to number them in the order of their names.
        train_num_samples: Images of the training split, for streams that do not say.
        val_num_samples: The same of the validation split.
        repeats: Times that an epoch repeats the training split (streams only).
        options: Further keywords of `timm.data.create_dataset` for both splits.

    Returns:
        Training and validation data set, the second None without a split.

    Raises:
        UsageError: If a split or the class map cannot be read, both splits hold the same images, or the classes fit
            neither each other nor the model.
    """
    if not name and not os.path.exists(root):
        raise UsageError(f'data folder {root}: no such folder; it should hold a folder per split and class.')
    given_map = _read_class_map(class_map, root or '', train_split) if class_map else None
    open_split = partial(_open_split, name, root, map_file=class_map, class_map=given_map, **options)
    train = open_split(
        'train_split', train_split, is_training=True, num_samples=train_num_samples, repeats=repeats)
    _check_classes(train, root, num_classes, ordered=given_map is not None)
    if not val_split:
        _check_folders(root, train)
        return train.dataset, None
    open_validation = partial(open_split, 'val_split', val_split, is_training=False, num_samples=val_num_samples)
    validation = open_validation()
    _check_folders(root, train, validation)
    if _lacks_classes_of(train, validation):
        validation = open_validation(class_map=train.classes)
    return train.dataset, validation.dataset


def create_train_data(
        dataset: Dataset,
        *,
        mixup: dict[str, Any] | None = None,
        mixup_off_epoch: int = 0,
        replay_seed: int | None = None,
        replay_epochs: int | None = None,
        crops_per_image: int = 1,
        **options: Any,
) -> TrainData:
    """Create the training loader, with AugMix, Mixup and replay where they are asked for.

    Args:
        dataset: The training data set.
        mixup: Arguments of `timm.data.Mixup`; None to mix nothing.
        mixup_off_epoch: The epoch from which nothing is mixed; 0: never.
        replay_seed: Seed of a replayable loader; None for timm's own.
        replay_epochs: Distinct epochs of a replayable loader; None: all are distinct.
        crops_per_image: Crops that a replayable loader takes of each image it decodes.
        options: Keywords of `timm.data.create_loader`.

    Raises:
        UsageError: If the data set does not fit the settings.
    """
    if options.get('num_aug_repeats') and not options.get('distributed'):
        raise UsageError(
            f'`num_aug_repeats` {options["num_aug_repeats"]:g}: timm spreads the repeats over processes: start two or '
            'more with torchrun, or leave it out.')
    collate_fn = mixup_fn = None
    if mixup is not None:
        if options['use_prefetcher']:
            collate_fn = FastCollateMixup(**mixup)
        else:
            mixup_fn = Mixup(**mixup)
    num_splits = options.get('num_aug_splits', 0)
    augmented = AugMixDataset(dataset, num_splits=num_splits) if num_splits else dataset
    try:
        loader = create_loader(augmented, is_training=True, collate_fn=collate_fn, **options)
    except (ValueError, AssertionError) as error:  # timm's own sentences about `input_size_choices` and its like
        raise UsageError(f'training loader: {error}') from error
    reference_batch_size = options['batch_size']
    if options.get('input_size_choices'):
        schedule = loader.batch_sampler
        reference_batch_size = schedule.average_batch_size
        _logger.info(
            f'Several image sizes: batches of {", ".join(map(str, schedule.batch_sizes))} images, '
            f'{reference_batch_size:.2f} on average, {len(schedule)} batches an epoch.')
    if replay_seed is not None:
        try:
            loader = make_replayable(loader, replay_seed, replay_epochs, crops_per_image)
        except UsageError as error:
            raise UsageError(f'`replay_seed`: {error}') from error
        if mixup_fn is not None:
            mixup_fn = ReplayMixup(mixup_fn, loader.batch_sampler)
    if not isinstance(dataset, IterableDataset) and len(loader) == 0:
        raise UsageError(
            f'`batch_size` {options["batch_size"]}: the {len(dataset)} training images do not fill one batch, and timm '
            'drops the last partial one: lower it.'
        )
    return TrainData(dataset, loader, mixup_fn, mixup is not None, mixup_off_epoch, reference_batch_size)


def create_naflex_train_data(dataset: Dataset, *, mixup: dict[str, Any] | None = None, **options: Any) -> TrainData:
    """Create the NaFlex training loader: batches of patches, with a longest sequence that is drawn for each.

    Args:
        dataset: The training data set.
        mixup: Arguments of `timm.data.NaFlexMixup`; None to mix nothing.
        options: Keywords of `timm.data.create_naflex_loader`.
    """
    mixup_fn = None if mixup is None else NaFlexMixup(**mixup)
    loader = create_naflex_loader(dataset, is_training=True, mixup_fn=mixup_fn, **options)
    return TrainData(dataset, loader, None, mixup is not None, 0, options['batch_size'])


def create_eval_loader(
        dataset: Dataset,
        *,
        replayable: bool = False,
        naflex: bool = False,
        **options: Any,
) -> DataLoader:
    """Create a loader of the validation split.

    Args:
        dataset: The validation data set; several loaders may share it.
        replayable: Take nothing from torch's random stream.
        naflex: Make a NaFlex loader.
        options: Keywords of `timm.data.create_loader`, or of `create_naflex_loader`.
    """
    loader = (create_naflex_loader if naflex else create_loader)(dataset, is_training=False, **options)
    if replayable:
        # Persistent workers draw a seed when they start, and a resumed run starts them anew. Drawn from torch's global
        # stream, which dropout reads too, it would make the resumed run another one.
        getattr(loader, 'loader', loader).generator = torch.Generator()
    return loader


def class_names(dataset: Dataset) -> list[str] | None:
    """Return the names of a data set's classes in index order, where it knows one for each index."""
    numbers = _class_numbers(dataset)
    names = sorted(numbers, key=numbers.get)
    return names if names and [numbers[name] for name in names] == list(range(len(names))) else None


def _class_numbers(dataset: Dataset) -> dict[str, int]:
    """Return the index of each class name; empty where the data set does not know."""
    source = getattr(dataset, 'reader', dataset)
    return getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None) or {}  # tar files


@dataclass(frozen=True)
class _Split:
    """A split as timm reads it: the index of each class and the folder or tar file, where the data set knows them."""
    argument: str
    name: str
    dataset: Dataset
    classes: dict[str, int]
    folder: Path | None

    def __str__(self) -> str:
        return f'`{self.argument}` {self.name}'


def _open_split(
        name: str,
        root: str,
        argument: str,
        split: str,
        *,
        map_file: str,
        **options: Any,
) -> _Split:
    try:
        dataset = create_dataset(name, root=root, split=split, **options)
    except _READ_ERRORS as error:
        reasons = [f'`name` {name!r}'] if name else []
        reasons += [f"class map '{map_file}' (does it name the classes?)"] if map_file else []
        if not name and os.path.isdir(root) and any(Path(root).glob('*.tar')):
            reasons.append('a tar is a split where it is named, as in `train_split` train.tar')
        place = ', '.join([f'data folder {root}', f'split {split!r}', *reasons])
        raise UsageError(f'{place}: {shortened(error).rstrip(".")}.') from error
    dataset = NamedImages(dataset) if type(dataset) is ImageDataset else dataset
    source = getattr(dataset, 'reader', dataset)
    is_local = isinstance(source, ReaderImageFolder | ReaderImageInTar | ImageFolder)
    folder = Path(source.root).absolute() if is_local else None
    return _Split(argument, split, dataset, _class_numbers(dataset), folder)


def find_class_map(path: str, root: str, train_split: str) -> str:
    """Return where a class map is: as given, in the data folder or in the training folder; as given if nowhere."""
    places = path, os.path.join(root, path), os.path.join(root, train_split, path)
    return next(filter(os.path.isfile, places), path)


def _read_class_map(path: str, root: str, train_split: str) -> dict[str, int]:
    """Read a class map as timm does, once for both splits."""
    try:
        numbers = load_class_map(find_class_map(path, root, train_split))
        numbers.pop('', None)  # an empty line of a text file
        wrong = [value for value in numbers.values() if type(value) is not int or value < 0]
        if wrong or not numbers:
            raise ValueError(f'{wrong[0]!r} is no index' if wrong else 'it names no class')
    except Exception as error:  # a file that is no pickle makes `pickle` raise nearly anything
        raise UsageError(
            f"class map '{path}': {shortened(error).rstrip('.')}; expected a .txt file with a class name on each line, "
            'or a .pkl file of a plain dict from names to indices.'
        ) from error
    return numbers


def _check_classes(split: _Split, root: str, num_classes: int, ordered: bool) -> None:
    """Refuse classes that the model lacks, and names whose order is not certain; warn of classes without images."""
    classes = split.classes
    if not classes:
        return
    if classes.keys() <= {'', '.'}:
        raise UsageError(f'data folder {root}: images, but no class folders; it should hold <split>/<class>/<image>.')
    count = max(classes.values()) + 1
    if count > num_classes:
        raise UsageError(
            f'data folder {root}: {count} classes in {split} ({few(classes)}), but `num_classes` {num_classes}.')
    if not ordered and split.folder is not None:
        places: dict[tuple, str] = {}
        for name in classes:
            other = places.setdefault(tuple(natural_key(name)), name)
            if other != name:
                raise UsageError(
                    f'data folder {root}: to timm the classes {other} and {name} have the same place in the order of '
                    'names, so their indices may change from run to run: rename one, or number them by a class map.')
    if count < num_classes:
        _logger.warning(
            f'{split} of {root} has {count} classes, the model {num_classes}: the others will never be seen '
            f'(`num_classes` {count}?).')


def _check_folders(root: str, *splits: _Split) -> None:
    """Refuse to validate on training images by mistake: for a split that is not there, timm reads the whole folder."""
    if any(split.folder is None for split in splits):
        return
    place = Path(root).absolute()
    known = [split for split in _SPLIT_FOLDERS if os.path.isdir(os.path.join(root, split))]
    for split in splits:
        if known and split.folder == place:
            raise UsageError(
                f"{split}: {root} has no such folder, but {', '.join(known)}; name one (`val_split` '' for none).")
    if len({split.name for split in splits}) == 1:
        return
    train, validation = splits
    if not train.folder.is_relative_to(validation.folder) and not validation.folder.is_relative_to(train.folder):
        return
    if os.path.isfile(root):
        advice = 'give a folder with a tar for each split, as in `train_split` train.tar `val_split` validation.tar'
    elif place.name in _SPLIT_FOLDERS:
        advice = f'give {place.parent}'
    else:
        advice = 'give a folder with a folder for each split, train and validation'
    raise UsageError(
        f'data folder {root}: timm reads {train.folder} for {train} and {validation.folder} for {validation}, so '
        f"training images would be validated on: {advice}; or `val_split` '' for no validation.")


def _lacks_classes_of(train: _Split, validation: _Split) -> bool:
    """Return whether validation has some of the training classes only; refuse classes that training lacks."""
    if not train.classes or not validation.classes or train.classes == validation.classes:
        return False
    unknown = [name for name in validation.classes if name not in train.classes]
    absent = [name for name in train.classes if name not in validation.classes]
    if unknown or not hasattr(validation.dataset, 'reader'):  # torchvision's own data sets take no numbers
        raise UsageError(
            f'{train} and {validation} have different classes, which timm numbers separately: {few(unknown)} in '
            f'validation alone, {few(absent)} in training alone. Rename or add the folders, or leave validation out '
            "(`val_split` '').")
    _logger.info(
        f'{validation} has {len(validation.classes)} of the {len(train.classes)} classes (not {few(absent)}): they '
        'have the indices of training.')
    return True
