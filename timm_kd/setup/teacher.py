"""Setup -> the teacher of a run: live, or one that stores its logits and may not be needed at all."""
import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

from ..engine import evaluate_teacher
from ..errors import UsageError, shortened
from ..process import preserved_random_state
from ..teacher import Teacher, TeacherEnsemble, create_teacher
from ..teacher_cache import CachedTeacher, CacheFolder
from ..teacher_cache.folder import KEY_FILE, precision_of, read_members, read_precision, read_teacher
from ..teacher_cache.key import Key, OtherKey, fingerprint_dataset, fingerprint_teacher, hash_files
from .base import Setup
from .data import augmentation_settings, image_mode
from .student import blank_batches

_logger = logging.getLogger(__name__)

_PATHS = 'data', 'data_dir', 'class_map', 'teacher', 'teacher_class_map', 'pretrained_path', 'initial_checkpoint'


def open_teacher(
        setup: Setup,
        epochs: Sequence[int],
        live: bool = False,
) -> Teacher | TeacherEnsemble | CachedTeacher | None:
    """Load the teacher that the flags name, if they do, or open its stored logits (`--teacher-cache`).

    With stored logits the live teacher is loaded only if the run needs a row that is absent.

    Args:
        setup: The set-up, with a replayable training loader where logits are stored.
        epochs: The epochs whose stored logits the run will read.
        live: Load the live teacher in any case, to compare with what is stored, and throw nothing away.

    Raises:
        UsageError: The teacher cannot be had, or its stored logits were made for another run's data or teacher, are
            damaged, or do not fit the disk.
    """
    if setup.kd is None or setup.kd.teacher is None:
        return None
    return _open_cache(setup, epochs, live) if setup.args.teacher_cache else _create_teacher(setup)


def _create_teacher(setup: Setup) -> Teacher | TeacherEnsemble:
    """Load the live teacher, without a draw from the training's random streams."""
    args = setup.args
    with setup.process.primary_first(), preserved_random_state():  # one download, which the other processes read
        teacher = create_teacher(
            setup.kd.teacher,
            num_classes=None if setup.kd.loss == 'feature' else args.num_classes,
            mean=setup.data_config['mean'],
            std=setup.data_config['std'],
            in_chans=setup.data_config['input_size'][0],
            img_size=args.teacher_img_size,
            device=setup.process.device,
            dtype=setup.kd.teacher_dtype,
            model=args.teacher_model,
            model_kwargs=args.teacher_kwargs,
            use_ema=args.teacher_ema,
            class_map=args.teacher_class_map,
            class_map_missing=args.teacher_class_map_missing,
            compile_backend=args.teacher_compile,
        )
    if args.naflex_loader:
        for _, _, patches, what in blank_batches(args, setup.student, setup.data_config['input_size']):
            try:
                teacher(patches)
            except UsageError:
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                raise UsageError(
                    f"teacher '{teacher.source}' does not take {what} as --naflex-loader makes them: it must be a "
                    f'NaFlexViT for such patches ({shortened(error)}).'
                ) from error
    return teacher


def evaluate_run_teacher(setup: Setup, teacher: torch.nn.Module) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Evaluate the teacher on the validation images, or recall what is stored of that; no draw of training changes.

    Returns:
        The metrics of each member, and the classes `[N]` that the teacher predicts, in the loader's order.
    """
    args, process = setup.args, setup.process
    world_size = process.world_size
    if args.teacher_cache:
        count = _num_predictions(setup)
        stored = teacher.folder.load_validation(teacher.validation_key, count)
        if all(process.gather(bool(stored))):  # a rank alone would wait for the others' evaluation in vain
            for member, result in zip(teacher.members, stored['metrics'], strict=True):
                top1, top5 = result['top1'], result['top5']
                _logger.info(
                    f'Teacher {member.source}: top-1 {top1:.2f} %, top-5 {top5:.2f} % when it was evaluated')
            # Ranks are padded with the first samples to equal numbers.
            own = np.arange(process.rank, -(-count // world_size) * world_size, world_size) % count
            return stored['metrics'], torch.from_numpy(stored['predictions'][own]).to(process.device)
    with preserved_random_state():
        metrics, predictions = evaluate_teacher(
            teacher.members,
            setup.open_eval_loader(persistent_workers=False),
            setup.steps,
            tta=args.tta,
            distributed=process.distributed,
        )
    if args.teacher_cache:
        whole = torch.stack(process.gather(predictions.cpu()), dim=1).flatten()[:count]
        if process.primary:
            teacher.folder.save_validation(teacher.validation_key, metrics, whole.numpy())
    return metrics, predictions


def _num_predictions(setup: Setup) -> int:
    """Return how many predictions all ranks make for the validation set; under `--tta`, with those for padded rows."""
    count, tta, world_size = len(setup.eval_loader.dataset), setup.args.tta, setup.process.world_size
    return -(-count // world_size) // tta * world_size if tta > 1 else count


def _open_cache(setup: Setup, epochs: Sequence[int], live: bool) -> CachedTeacher:
    """Open the folder of stored logits, and load the live teacher where the run needs a row that is absent."""
    args, process, sampler = setup.args, setup.process, setup.data.loader.batch_sampler
    _check_supported(setup, epochs)
    key = _cache_key(setup)
    rebuild = args.teacher_cache_rebuild and not live
    # Whether rows have to be thrown away depends on what the teacher says of itself, too.
    teacher = _create_teacher(setup) if live or rebuild else None
    with process.primary_first():  # it makes the folder, or clears it
        folder = CacheFolder(
            args.teacher_cache,
            key,
            rebuild=rebuild and process.primary,
            teacher=teacher.fingerprint() if teacher is not None and process.primary else None,
        )
    validates = setup.eval_loader is not None and not args.no_teacher_eval
    validation = _validation_key(setup) if validates else None
    cached = partial(CachedTeacher, folder, sampler, process.device, validation_key=validation)
    if live:
        return cached(teacher)
    epochs = sampler.distinct(epochs)
    complete = folder.covers(sampler, epochs)
    members = read_members(folder.path)
    validated = validation is None or bool(folder.load_validation(validation, _num_predictions(setup)))
    if all(process.gather(complete and validated and members is not None)):
        _logger.info(f'Teacher cache {folder.path}: all rows are there, the teacher is not needed.')
        return cached(members=[SimpleNamespace(**member) for member in members])
    if not complete:
        folder.check_space(epochs)
    if teacher is None:
        teacher = _create_teacher(setup)
        if process.primary:
            _claim_teacher(setup, folder, teacher.fingerprint())
        process.barrier()
    if process.primary:
        names = 'source', 'model_name', 'num_params'
        folder.describe(
            [{name: getattr(member, name) for name in names} for member in teacher.members],
            _from_anywhere(setup.args_text),
        )
    return cached(teacher)


def _claim_teacher(setup: Setup, folder: CacheFolder, fingerprint: Key) -> None:
    """Check that the live teacher is the one that filled the folder; name the precision where only `auto` differs."""
    stored, own = read_precision(folder.path), precision_of(fingerprint)
    if setup.kd.teacher_dtype == 'auto' and stored not in (None, own):
        raise UsageError(
            f'--teacher-cache {folder.path} was filled by a teacher in {stored}, and --teacher-dtype auto is {own} on '
            f'this machine: add --teacher-dtype {stored}.'
        )
    folder.claim_teacher(fingerprint)


def _check_supported(setup: Setup, epochs: Sequence[int]) -> None:
    """Refuse what stored logits cannot follow."""
    args = setup.args
    distinct, off = args.teacher_cache_epochs, args.mixup_off_epoch
    if os.name != 'posix':
        raise UsageError(f'--teacher-cache {args.teacher_cache}: needs the file locks of Linux or macOS, leave it out.')
    if args.teacher_cache_topk and args.teacher_cache_topk >= args.num_classes:
        raise UsageError(
            f'--teacher-cache-topk {args.teacher_cache_topk}: there are {args.num_classes} classes, leave it out or '
            'take fewer.'
        )
    if args.teacher_cache_topk and args.teacher_class_map_missing == 'mask':
        raise UsageError(
            f'--teacher-cache-topk {args.teacher_cache_topk}: spreads the rest over all classes, the masked ones '
            'included: leave out this or --teacher-class-map-missing mask.'
        )
    if setup.data.mixup_active and distinct and off and distinct <= max(epochs, default=0):
        raise UsageError(
            f'--teacher-cache-epochs {distinct}: the epochs after --mixup-off-epoch {off} have other images than the '
            'stored ones, leave out one of the two.'
        )


def _cache_key(setup: Setup) -> Key:
    """Collect everything that decides the pixels a row stands for, or the logits of those pixels."""
    args, data_config, data, process = setup.args, setup.data_config, setup.data, setup.process
    by_batch = data.mixup_active or bool(args.resplit and args.reprob)  # where rows mix or share draws
    crops = args.crops_per_image
    on_device = args.reprob > 0 and not args.no_aug and not args.no_prefetcher
    key = {
        'versions': {name: version(name).split('+')[0] for name in ('timm', 'torchvision', 'pillow')},
        'seed': args.seed,
        'dataset': fingerprint_dataset(data.dataset),
        'images': {
            'input_size': data_config['input_size'],
            'mean': data_config['mean'],
            'std': data_config['std'],
            'mode': image_mode(args, data_config['input_size'][0]),
            'dtype': str(setup.dtype or torch.float32).removeprefix('torch.'),
            'prefetcher': not args.no_prefetcher,
            **_augmentation(setup),
        },
        'erasing_device': process.device.type if on_device and args.remode != 'const' else None,
        'teacher': _teacher_key(setup),
        'rows': {
            # With several crops an epoch has few of the images: the position says which, and which crop, in any batch.
            'by': 'position' if by_batch or crops > 1 else 'sample',
            'count':
                len(data.loader) * args.batch_size * process.world_size if by_batch
                else len(data.dataset) // crops * crops,
            'classes': args.num_classes,
            'dtype': args.teacher_cache_dtype,
            'topk': args.teacher_cache_topk,
        },
    }
    if crops > 1:
        key['crops_per_image'] = crops
    if by_batch:
        key['batches'] = {'batch_size': args.batch_size, 'world_size': process.world_size}
    if data.mixup_active:
        names = ['mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_mode', 'mixup_off_epoch']
        if args.mixup and (args.cutmix or args.cutmix_minmax):
            names.append('mixup_switch_prob')
        key['mixing'] = {name: getattr(args, name) for name in names}
    return key


def _augmentation(setup: Setup) -> Key:
    """Return the settings that decide the images: one that another flag switches off is none of them."""
    args = setup.args
    settings = augmentation_settings(args, setup.data_config)
    if args.no_aug:
        return {name: settings[name] for name in ('no_aug', 'interpolation')}
    settings['train_crop_mode'] = settings['train_crop_mode'] or 'rrc'  # timm's default
    return {name: value for name, value in settings.items() if args.reprob or not name.startswith('re_')}


def _teacher_key(setup: Setup) -> Key:
    args, kd, folder = setup.args, setup.kd, Path(setup.args.teacher_cache)
    specs = [kd.teacher] if isinstance(kd.teacher, str) else list(kd.teacher)
    try:
        stored, precision = read_teacher(folder / KEY_FILE), read_precision(folder)
    except OtherKey:  # a damaged file, which opening the folder will refuse or clear
        stored, precision = {}, None
    members = []
    for number, spec in enumerate(specs):
        try:
            members.append(fingerprint_teacher(spec))
        except UsageError:
            # A complete cache stands in for a teacher that is no longer there.
            known = [member['source'] for member in read_members(folder) or ()]
            if known != specs or 'members' not in stored:
                raise
            _logger.warning(f'--teacher {spec} is not there: trusting the logits in {folder}.')
            members.append(stored['members'][number])
    class_map = args.teacher_class_map
    return {
        'members': members,
        'model': args.teacher_model,
        'kwargs': args.teacher_kwargs,
        'ema': args.teacher_ema,
        'img_size': args.teacher_img_size,
        # `auto` and the precision that it was at the fill are the same.
        'dtype': 'auto' if stored.get('dtype') == 'auto' and precision == kd.teacher_dtype else kd.teacher_dtype,
        'autocast': args.amp_dtype if kd.teacher_dtype == 'amp' else None,
        'class_map': hash_files(class_map) if class_map and os.path.isfile(class_map) else class_map,
        'class_map_missing': args.teacher_class_map_missing,
    }


def _validation_key(setup: Setup) -> str:
    """Collect what the teacher's validation depends on beside the teacher, as JSON."""
    args, data_config, world_size = setup.args, setup.data_config, setup.process.world_size
    return json.dumps({
        'dataset': fingerprint_dataset(setup.eval_loader.dataset),
        'images': {name: data_config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        'crop_mode': data_config['crop_mode'],
        'mode': image_mode(args, data_config['input_size'][0]),
        'prefetcher': not args.no_prefetcher,
        # Which rows are averaged depends on how the images are dealt out to the ranks.
        **({'tta': args.tta, 'world_size': world_size} if args.tta > 1 else {}),
    })


def _from_anywhere(args_text: str) -> str:
    """Return flags that mean the same in another working directory."""
    flags = yaml.safe_load(args_text)
    flags.update({name: _absolute(flags[name]) for name in _PATHS if flags.get(name)})
    return yaml.safe_dump(flags)


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    prefix = 'local-dir:' if value.startswith('local-dir:') else ''
    path = Path(value.removeprefix(prefix)).expanduser()
    return prefix + str(path.resolve()) if path.exists() else value
