"""Checkpoints that survive a kill at any moment, and the way back into the run they belong to."""
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from .errors import UsageError, shortened
from .files import load_file

_logger = logging.getLogger(__name__)

_RECOVERY_FILE = re.compile(r'recovery-(\d+)-(\d+)\.pth\.tar')


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the last good one is untouched."""


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, with files that are written aside, flushed and renamed over the old ones.

    `run_state` goes into the checkpoint's `saver` entry: what an exact resume needs beyond timm's state, in plain
    types and tensors. It holds `run_id`, `ranks` (what `gather_rank_states` returns), `ema_random`, `history` (the
    results of the epochs so far) and, in a recovery file, `batch` (batches of the epoch that are done), `batches` (how
    many it has) and `epoch_trained` (whether that is all of them).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_state: dict[str, Any] = {}
        self._bookkeeping_only = False

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """Returns timm's bookkeeping and the run state."""
        return dict(super().state_dict(epoch, metric), run_state=self.run_state)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._bookkeeping_only:
            return
        try:
            super()._save(save_path, epoch, metric)
            _flush(save_path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            Path(save_path).unlink(missing_ok=True)
            raise CheckpointWriteError(
                f'could not write the checkpoint of epoch {epoch} to {self.checkpoint_dir} ({shortened(error)}); '
                'the last good one is untouched: free some space and continue with --resume auto.'
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        if not self._bookkeeping_only:
            os.replace(src, dst)
            _flush(os.path.dirname(dst) or '.')

    def _duplicate(self, src: str, dst: str) -> None:
        # timm unlinks dst first: a kill in between would lose it.
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        super()._duplicate(src, temporary)
        os.replace(temporary, dst)

    @contextmanager
    def _without_writing(self) -> Iterator[None]:
        self._bookkeeping_only = True
        try:
            yield
        finally:
            self._bookkeeping_only = False

    def continue_from(self, checkpoint_path: str) -> None:
        """Takes up the history of the run that wrote `last` or a recovery file into this folder.

        A kill may have cut the save between writing `last` and ranking it, so the ranking is done again.
        """
        state = load_checkpoint_metadata(checkpoint_path).get('saver')
        if state is None:  # a checkpoint of an older timm
            return
        self.load_state_dict(dict(state, pending=(None, None)))
        epoch, metric = state['pending']
        if os.path.basename(checkpoint_path) == f'last{self.extension}' and epoch is not None:
            save_path = self._checkpoint_path(epoch)
            self.checkpoint_files = [file for file in self.checkpoint_files if file[0] != save_path]
            with self._without_writing():
                self.save_checkpoint(epoch, metric)
        recoveries = find_recoveries(self.recovery_dir)
        self.curr_recovery_file = str(recoveries[-1]) if recoveries else ''
        self.prev_recovery_file = str(recoveries[-2]) if len(recoveries) > 1 else ''


def find_recoveries(folder: str | Path) -> list[Path]:
    """Returns the recovery files of a folder, oldest in training first."""
    found = {path: _RECOVERY_FILE.fullmatch(path.name) for path in Path(folder).glob('recovery-*.pth.tar')}
    return sorted(
        (path for path, match in found.items() if match),
        key=lambda path: tuple(int(number) for number in found[path].groups()),
    )


def read_checkpoint(path: str | Path, flag: str = '--resume') -> dict[str, Any]:
    """Reads a training checkpoint without running any code in it; tensors stay on disk until they are used.

    Raises:
        UsageError: If there is no such file, or it is truncated, no checkpoint, or would run code.
    """
    checkpoint = load_file(path, flag, mmap=True)
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{flag} {path}: holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint


def run_state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the run state that `AtomicSaver` put into a checkpoint; empty for a checkpoint of timm's script."""
    return (checkpoint.get('saver') or {}).get('run_state') or {}


def find_resume_point(folder: str | Path, run_id: str | None, replayable: bool) -> Path | None:
    """Finds the checkpoint that is furthest into the run of this folder: `last.pth.tar` or its newest recovery file.

    Args:
        folder: The experiment's folder.
        run_id: The run that the folder belongs to; files of another run are passed over with a warning. None when
            timm's script wrote the folder.
        replayable: Whether the data of an epoch can be taken up in its middle. Where it cannot, a recovery file
            counts only if its epoch's training was complete.
    """
    def furthest(paths: list[Path]) -> tuple[Path | None, int]:
        for path in reversed(paths):
            checkpoint = read_checkpoint(path, '--resume auto:')
            state = run_state_of(checkpoint)
            if run_id and state.get('run_id') != run_id:
                _logger.warning(f'--resume auto: {path} is of another run in the same folder; passed over.')
            elif 'batch' not in state or replayable or state['epoch_trained']:
                return path, checkpoint['epoch']
        return None, -1

    last, last_epoch = furthest([path for path in [Path(folder, 'last.pth.tar')] if path.exists()])
    recovery, recovery_epoch = furthest(find_recoveries(folder))
    return recovery if recovery_epoch > last_epoch else last


def next_epoch(checkpoint: dict[str, Any]) -> int:
    """Returns the epoch that follows a checkpoint of this script or of timm's; 0 when it holds weights alone."""
    # timm's first format counted the epoch up before saving.
    return checkpoint['epoch'] + (checkpoint.get('version', 0) > 1) if 'epoch' in checkpoint else 0


def resume(
        task: TrainingTask,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        loss_scaler: Any = None,
) -> None:
    """Loads a checkpoint of this script or of timm's into the task, its EMA, the optimizer and the loss scaler.

    Raises:
        UsageError: If the checkpoint does not fit the model.
    """
    try:
        resume_task_checkpoint(task, str(path), optimizer, loss_scaler)
        if task.has_ema():
            load_task_ema_checkpoint(task, str(path))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f'--resume {path}: does not fit --model and --opt ({shortened(error)}).') from error


def ema_random_state(task: TrainingTask) -> torch.Tensor | None:
    """Returns the state of the EMA's private generator (timm rounds a bfloat16 EMA stochastically), if there is one."""
    ema = task.get_trainable_module(ema=True)
    return ema._sr_generator.get_state() if hasattr(ema, '_sr_generator') else None


def set_ema_random_state(task: TrainingTask, state: torch.Tensor | None) -> None:
    """Sets what `ema_random_state` returned."""
    ema = task.get_trainable_module(ema=True)
    if state is not None and hasattr(ema, '_sr_generator'):
        ema._sr_generator.set_state(state)
