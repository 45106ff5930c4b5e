"""What a cache holds, and whether that is still what its teacher says."""
import json
import logging
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from .epoch_file import EpochFile
from .fill import TeacherRun, open_run
from .key import read_key
from .layout import RowLayout
from .store import ARGS_FILE, EPOCH_FILES, KEY_FILE, format_bytes
from .teacher_record import VALIDATION_FILES, read_members, read_validation

_logger = logging.getLogger(__name__)

# Another batch size or device orders sums differently: a few units of bfloat16's last place (2^-8).
_TOLERANCE = 0.02


def describe(folder: str | Path) -> str:
    """Return what a cache holds, in lines: its teacher, its key, and the rows present of each epoch.

    Raises:
        UsageError: The folder is no cache, or a file of it is damaged.
    """
    folder = Path(folder)
    key = read_key(folder / KEY_FILE)
    lines = [f'{folder}: teacher logits']
    for member in read_members(folder) or ():
        lines.append(f'teacher   {member["source"]} ({member["model_name"]}, {member["num_params"]} parameters)')
    for validation in map(read_validation, sorted(folder.glob(VALIDATION_FILES))):
        for metrics in json.loads(str(validation.get('metrics', '[]'))):
            lines.append(f'          top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % in validation')
    rows = key.get('rows')
    if not isinstance(rows, dict):
        raise UsageError(f'{folder / KEY_FILE} is damaged: fill the folder anew with --teacher-cache-rebuild.')
    lines.append(
        f'rows      {rows["count"]} an epoch, by {rows["by"]}, {rows["classes"]} classes as {rows["dtype"]}'
        + (f', the {rows["topk"]} largest' if rows['topk'] else '')
    )
    layout = RowLayout(rows['classes'], rows['dtype'], rows['topk'])
    total = 0
    for path in sorted(folder.glob(EPOCH_FILES)):
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
    read_key(folder / KEY_FILE)
    argv = ['--config', str(folder / ARGS_FILE), '--teacher-cache', str(folder), '--no-teacher-eval', *further]
    epochs = sorted(int(path.stem.rpartition('-')[2]) for path in folder.glob(EPOCH_FILES))
    if not epochs:
        _logger.info(f'{folder} holds no rows yet.')
        return True
    run, _ = open_run(argv, epochs, live=True)
    holds = [_verify_epoch(run, epoch, batches_per_epoch) for epoch in epochs]
    run.teacher.close()
    return all(holds)


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
