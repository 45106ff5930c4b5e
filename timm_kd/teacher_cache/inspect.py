"""What a cache holds, and whether that is still what its teacher says."""
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..errors import UsageError, shortened
from ..files import open_regular
from .epoch_file import EpochFile
from .fill import TeacherRun, open_run
from .folder import (
    ARGS_FILE,
    KEY_FILE,
    VALIDATION_FILES,
    epoch_files,
    format_bytes,
    read_members,
    read_rows,
    read_validation,
)
from .key import read_key

_logger = logging.getLogger(__name__)

# What `verify` takes from a cache's args.yaml. Whoever wrote that file could run code, write files or fetch some by the
# others: device_modules, dataset_trust_remote_code, dataset_download, the student's weights, output, wandb and hub
# flags, and the keyword arguments of models (timm has `checkpoint_path` and `cache_dir` among them). Who needs
# --teacher-kwargs or --model-kwargs gives them on the command line, as the refusal of the key says.
_DECIDE_IMAGES = (
    'data', 'data_dir', 'dataset', 'train_split', 'train_num_samples', 'class_map', 'input_key', 'target_key',
    'input_img_mode', 'epoch_repeats', 'seed', 'batch_size', 'no_prefetcher', 'model', 'num_classes', 'img_size',
    'in_chans', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'model_dtype', 'channels_last', 'no_aug',
    'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob',
    'gaussian_blur_prob', 'aa', 'train_interpolation', 'reprob', 'remode', 'recount', 'resplit', 'mixup', 'cutmix',
    'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch',
)
_DECIDE_LOGITS = (
    'teacher', 'kd_model_name', 'teacher_model', 'teacher_ema', 'teacher_img_size', 'teacher_dtype',
    'teacher_class_map', 'teacher_class_map_missing', 'amp', 'amp_dtype', 'teacher_cache_dtype', 'teacher_cache_topk',
)

# Another batch size or device orders sums differently: a few units of bfloat16's last place (2^-8).
_TOLERANCE = 0.02


def describe(folder: str | Path) -> str:
    """Return what a cache holds, in lines: its teacher, its key, and the rows present of each epoch.

    Raises:
        UsageError: The folder is no cache, or a file of it is damaged.
    """
    folder = Path(folder)
    key = read_key(folder / KEY_FILE)
    rows, layout = read_rows(folder)
    lines = [f'{folder}: teacher logits']
    for member in read_members(folder) or ():
        lines.append(f'teacher   {member["source"]} ({member["model_name"]}, {member["num_params"]} parameters)')
    for validation in map(read_validation, sorted(folder.glob(VALIDATION_FILES))):
        for metrics in json.loads(str(validation.get('metrics', '[]'))):
            lines.append(f'          top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % in validation')
    lines.append(
        f'rows      {rows["count"]} an epoch, by {rows["by"]}, {rows["classes"]} classes as {rows["dtype"]}'
        + (f', the {rows["topk"]} largest' if rows['topk'] else '')
    )
    total = 0
    for path in epoch_files(folder).values():
        file = EpochFile(path, rows['count'], layout.row_bytes, writable=False)
        present = int(np.count_nonzero(file.checksums))
        file.close()
        num_bytes = path.stat().st_blocks * 512
        total += num_bytes
        lines.append(f'{path.name}  {present} rows ({100 * present / rows["count"]:.1f} %), {format_bytes(num_bytes)}')
    lines.append(f'in all    {format_bytes(total)} on disk')
    lines.append('key       ' + json.dumps({name: value for name, value in key.items() if name != 'rows'}))
    return '\n'.join(lines)


def verify(folder: str | Path, further: list[str], batches_per_epoch: int = 2) -> bool:
    """Compute a sample of the stored rows again and compare; checksums are checked for all rows.

    Args:
        folder: The cache; the flags it was filled with lie in it.
        further: Flags that override those.
        batches_per_epoch: Batches to compute again of each stored epoch.

    Returns:
        Whether all rows hold: the checksums, and the logits within 2 % of the row's largest.

    Raises:
        UsageError: The folder is no cache, or data or teacher are not what it was filled with.
    """
    folder = Path(folder)
    read_rows(folder)
    epochs = list(epoch_files(folder))
    if not epochs:
        _logger.info(f'{folder} holds no rows yet.')
        return True
    with tempfile.TemporaryDirectory() as home:
        config = Path(home, ARGS_FILE)
        config.write_text(yaml.safe_dump(_trusted_flags(folder / ARGS_FILE)))
        argv = ['--config', str(config), '--teacher-cache', str(folder), '--val-split', '', *further]
        run, _ = open_run(argv, epochs, live=True)
    holds = [_verify_epoch(run, epoch, batches_per_epoch) for epoch in epochs]
    run.teacher.close()
    return all(holds)


def _trusted_flags(path: Path) -> dict[str, Any]:
    """Read of a cache's args.yaml the flags that decide images and logits: whoever wrote it must not run code here."""
    try:
        with open(open_regular(path, os.O_RDONLY), encoding='utf-8') as file:
            flags = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f'{path} cannot be read ({shortened(error)}): give the flags after the folder.') from error
    if not isinstance(flags, dict):
        raise UsageError(f'{path} holds no flags: give the flags after the folder.')
    return {name: value for name, value in flags.items() if name in _DECIDE_IMAGES + _DECIDE_LOGITS}


@torch.no_grad()
def _verify_epoch(run: TeacherRun, epoch: int, num_batches: int) -> bool:
    teacher = run.teacher
    file = teacher.folder.open_epoch(epoch)
    damaged = len(file.damaged())
    if damaged and file.writable:
        file.drop_damaged()  # the next run with the teacher computes them again
    present = file.has(teacher.epoch_rows(epoch)).reshape(run.num_batches, -1).all(axis=1)
    teacher.folder.close_epoch(file)
    complete = np.flatnonzero(present)
    sample = np.random.default_rng(epoch).choice(complete, min(num_batches, len(complete)), replace=False)
    worst = max((_difference(run, epoch, batch) for batch in sorted(sample.tolist())), default=0.0)
    teacher.flush()
    if worst > _TOLERANCE:
        verdict = f'DIFFERS, delete {teacher.folder.epoch_path(epoch)} to have it computed again'
    elif damaged:
        verdict = 'DAMAGED'
    else:
        verdict = 'holds' if len(sample) else 'nothing to compare'
    _logger.info(
        f'epoch {epoch}: {damaged} damaged rows; {len(sample)} of {len(complete)} batches computed again, largest '
        f'difference {worst:.2e} of the largest logit: {verdict}'
    )
    return not damaged and worst <= _TOLERANCE


def _difference(run: TeacherRun, epoch: int, batch: int) -> float:
    """Return by how much a batch computed again differs, in parts of a row's largest logit."""
    teacher = run.teacher
    images = next(iter(run.images(epoch, batch)))
    stored = teacher.stored(batch)
    with run.steps.autocast():
        computed = teacher.layout.unpack(teacher.layout.pack(teacher.teacher(images)))
    known = stored.isfinite()
    if (known != computed.isfinite()).any():
        return float('inf')
    scale = stored.where(known, 0).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    return ((stored - computed).abs() / scale).where(known, 0.0).max().item()
