"""Setup -> the teacher of a run: live, or one that stores its logits and may not be needed at all."""
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from ..engine import evaluate_teacher
from ..errors import UsageError
from ..process import preserved_random_state
from ..teacher import Teacher, TeacherEnsemble, create_teacher
from ..teacher_cache import CachedTeacher, CacheFolder, RowLayout
from ..teacher_cache.cached_teacher import epoch_rows, num_predictions
from ..teacher_cache.folder import KEY_FILE, precision_of, read_members, read_precision, read_teacher
from ..teacher_cache.key import Key, OtherKey, fingerprint_dataset, fingerprint_teacher, hash_files
from .base import Setup
from .data import augmentation_settings, image_mode
from .training import count_epochs

_logger = logging.getLogger(__name__)

_PATHS = 'data', 'data_dir', 'class_map', 'teacher', 'teacher_class_map', 'pretrained_path', 'initial_checkpoint'


def open_teacher(setup: Setup, start_epoch: int) -> Teacher | TeacherEnsemble | CachedTeacher | None:
    """Load the teacher that the flags name, if they do, or open its stored logits (`--teacher-cache`).

    Args:
        setup: The set-up.
        start_epoch: The first epoch that the run will train.

    Raises:
        UsageError: If the teacher cannot be had, or its stored logits do not fit the run.
    """
    if setup.kd is None or setup.kd.teacher is None:
        return None
    if not setup.args.teacher_cache:
        return _create_teacher(setup)
    return open_cached_teacher(setup, range(start_epoch, count_epochs(setup)))


def _create_teacher(setup: Setup) -> Teacher | TeacherEnsemble:
    """Load the live teacher, without a draw from the training's random streams."""
    args = setup.args
    with setup.process.primary_first(), preserved_random_state():  # one download, which the other processes read
        return create_teacher(
            setup.kd.teacher,
            num_classes=args.num_classes,
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


def evaluate_run_teacher(setup: Setup, teacher: torch.nn.Module) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Evaluate the teacher on the validation images, or recall what is stored of that; no draw of training changes.

    Returns:
        The metrics of each member, and the classes `[N]` that the teacher predicts, in the loader's order.
    """
    args, process = setup.args, setup.process

    def evaluate() -> tuple[list[dict[str, float]], torch.Tensor]:
        with preserved_random_state():
            loader = setup.open_eval_loader(persistent_workers=False)
            return evaluate_teacher(
                teacher.members, loader, setup.steps, tta=args.tta, distributed=process.distributed,
            )

    if not args.teacher_cache:
        return evaluate()
    return teacher.validation(setup.eval_loader, process.gather, evaluate, tta=args.tta)


def open_cached_teacher(
        setup: Setup,
        epochs: Sequence[int],
        live: bool = False,
        must_store: bool = False,
) -> CachedTeacher:
    """Open `--teacher-cache`, and load the live teacher if this run needs a row that is absent.

    Args:
        setup: The set-up, with a replayable training loader.
        epochs: Epochs that the run will read.
        live: Load the live teacher in any case, to compare with what is stored, and throw nothing away.
        must_store: Whether a disk that fills up ends the run.

    Raises:
        UsageError: The cache was filled for another run's data or teacher, is damaged, or does not fit the disk.
    """
    args, process, data, eval_loader = setup.args, setup.process, setup.data, setup.eval_loader
    _check_supported(setup, epochs)
    by_position = data.mixup_active or bool(args.resplit and args.reprob)  # where rows mix or share draws
    count = len(data.loader) * args.batch_size * process.world_size if by_position else len(data.dataset)
    layout = RowLayout(args.num_classes, args.teacher_cache_dtype, args.teacher_cache_topk)
    key = _cache_key(setup, by_position, count)
    rebuild = args.teacher_cache_rebuild and not live
    # Whether rows have to be thrown away depends on what the teacher says of itself, too.
    teacher = _create_teacher(setup) if live or rebuild else None
    with process.primary_first():  # it makes the folder, or clears it
        folder = CacheFolder(
            args.teacher_cache,
            key,
            count,
            layout.row_bytes,
            rebuild=rebuild and process.primary,
            teacher=teacher.fingerprint() if teacher is not None and process.primary else None,
        )
    wanted = eval_loader is not None and not args.no_teacher_eval
    validation = _validation_key(setup) if wanted else None
    sampler = data.loader.batch_sampler

    def cached(teacher: torch.nn.Module | None, members: Sequence[Any] = ()) -> CachedTeacher:
        return CachedTeacher(
            folder, layout, sampler, by_position, process.device, teacher, members, validation, must_store,
        )

    if live:
        return cached(teacher)
    epochs = sampler.distinct(epochs)
    complete = folder.covers(epochs, lambda epoch: epoch_rows(sampler, by_position, epoch))
    members = read_members(folder.path)
    knows_validation = validation is None or bool(
        folder.load_validation(validation, num_predictions(eval_loader, args.tta)))
    if all(process.gather(complete and knows_validation and members is not None)):
        _logger.info(f'Teacher cache {folder.path}: all rows are there, the teacher is not needed.')
        return cached(None, [SimpleNamespace(**member) for member in members])
    if not complete:
        folder.check_space(epochs)
    if teacher is None:
        teacher = _create_teacher(setup)
        if process.primary:
            fingerprint = teacher.fingerprint()
            _check_precision(folder.path, setup.kd.teacher_dtype, fingerprint)
            folder.claim_teacher(fingerprint)
        process.barrier()
    if process.primary:
        names = 'source', 'model_name', 'num_params'
        folder.describe(
            [{name: getattr(member, name) for name in names} for member in teacher.members],
            _from_anywhere(setup.args_text),
        )
    return cached(teacher)


def _check_supported(setup: Setup, epochs: Sequence[int]) -> None:
    """Refuse what stored logits cannot follow."""
    args = setup.args
    distinct, off = args.teacher_cache_epochs, args.mixup_off_epoch
    cache = f'--teacher-cache {args.teacher_cache}'
    if os.name != 'posix':
        raise UsageError(f'{cache}: needs the file locks of Linux or macOS, leave it out.')
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


def _cache_key(setup: Setup, by_position: bool, count: int) -> Key:
    """Collect everything that decides the pixels a row stands for, or the logits of those pixels."""
    args, data_config, data, process = setup.args, setup.data_config, setup.data, setup.process
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
            'by': 'position' if by_position else 'sample',
            'count': count,
            'classes': args.num_classes,
            'dtype': args.teacher_cache_dtype,
            'topk': args.teacher_cache_topk,
        },
    }
    if by_position:
        key['batches'] = {'batch_size': args.batch_size, 'world_size': process.world_size}
    if data.mixup_active:
        names = ['mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_mode', 'mixup_off_epoch']
        if args.mixup and (args.cutmix or args.cutmix_minmax):
            names.append('mixup_switch_prob')
        key['mixing'] = {name: getattr(args, name) for name in names}
    return key


def _augmentation(setup: Setup) -> Key:
    """Return the settings that act: a flag that another one switches off makes no other images."""
    args = setup.args
    settings = augmentation_settings(args, setup.data_config)
    if args.no_aug:
        return {name: settings[name] for name in ('no_aug', 'interpolation')}
    settings['train_crop_mode'] = settings['train_crop_mode'] or 'rrc'  # timm's default
    return {name: value for name, value in settings.items() if args.reprob or not name.startswith('re_')}


def _teacher_key(setup: Setup) -> Key:
    args, kd = setup.args, setup.kd
    specs = [kd.teacher] if isinstance(kd.teacher, str) else list(kd.teacher)
    class_map = args.teacher_class_map
    return {
        'members': [_member_key(args.teacher_cache, number, spec) for number, spec in enumerate(specs)],
        'model': args.teacher_model,
        'kwargs': args.teacher_kwargs,
        'ema': args.teacher_ema,
        'img_size': args.teacher_img_size,
        'dtype': _requested_precision(args.teacher_cache, kd.teacher_dtype),
        'autocast': args.amp_dtype if kd.teacher_dtype == 'amp' else None,
        'class_map': hash_files(class_map) if class_map and os.path.isfile(class_map) else class_map,
        'class_map_missing': args.teacher_class_map_missing,
    }


def _requested_precision(folder: str, requested: str) -> str:
    """Return `--teacher-dtype` as the key has it: `auto` and the precision that it was at the fill are the same."""
    try:
        same = read_teacher(Path(folder, KEY_FILE)).get('dtype') == 'auto' and \
            read_precision(Path(folder)) == requested
    except OtherKey:
        same = False  # a damaged file, which opening the folder will refuse or clear
    return 'auto' if same else requested


def _check_precision(folder: Path, requested: str, teacher: Key) -> None:
    """Name the precision to give where `auto` is another one on this machine than it was on the one that filled."""
    stored, own = read_precision(folder), precision_of(teacher)
    if requested == 'auto' and stored not in (None, own):
        raise UsageError(
            f'--teacher-cache {folder} was filled by a teacher in {stored}, and --teacher-dtype auto is {own} on this '
            f'machine: add --teacher-dtype {stored}.'
        )


def _member_key(folder: str, number: int, spec: str) -> Key:
    try:
        return fingerprint_teacher(spec)
    except UsageError:
        # A complete cache stands in for a teacher that is no longer there.
        members = read_members(Path(folder)) or []
        if [member['source'] for member in members[number:number + 1]] != [spec]:
            raise
        _logger.warning(f'--teacher {spec} is not there: trusting the logits in {folder}.')
        stored = read_teacher(Path(folder, KEY_FILE)).get('members', [])
        return stored[number] if number < len(stored) else {}


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
