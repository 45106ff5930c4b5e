"""Checkpoints that survive a kill at any moment."""
import os
import re
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..errors import CommandError, shortened

_RECOVERY_FILE = re.compile(r'recovery-(\d+)-(\d+)\.pth\.tar')
_DEVICE_ERRORS = torch.OutOfMemoryError, getattr(torch, 'AcceleratorError', torch.OutOfMemoryError)  # torch 2.8


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, with files that are written aside, flushed and renamed over the old ones.

    The `saver` entry of a checkpoint also keeps the `run_state`: what an exact resume needs beyond timm's state, in
    plain types and tensors. It holds `run_id`, `ranks` (what `gather_rank_states` returns), `ema_random`, `history`
    (the results of the epochs so far) and, in a recovery file, `batch` (how many batches of its epoch are done),
    `batches` (how many the epoch has) and `epoch_trained` (whether all of them are done).
    """
    _run_state: dict[str, Any] | None = None
    _bookkeeping_only = False

    def save_checkpoint(
            self,
            epoch: int,
            metric: float | None = None,
            run_state: dict[str, Any] | None = None,
    ) -> tuple[float | None, int | None]:
        """Save and rank an epoch as timm's saver does, with the run state."""
        self._run_state = run_state
        return super().save_checkpoint(epoch, metric)

    def save_recovery(self, epoch: int, batch_idx: int = 0, run_state: dict[str, Any] | None = None) -> None:
        """Save a recovery file as timm's saver does, with the run state."""
        self._run_state = run_state
        super().save_recovery(epoch, batch_idx)

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """Return timm's bookkeeping and the run state."""
        return dict(super().state_dict(epoch, metric), run_state=self._run_state or {})

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._bookkeeping_only:
            return
        try:
            super()._save(save_path, epoch, metric)
            _flush(save_path)
        except BaseException as error:
            Path(save_path).unlink(missing_ok=True)
            # torch reports a full disk as a RuntimeError, of which the errors of a device are others.
            if not isinstance(error, OSError | RuntimeError) or isinstance(error, _DEVICE_ERRORS):
                raise
            raise CommandError(
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

    def continue_from(self, checkpoint_path: str) -> None:
        """Take up the bookkeeping of the run that wrote a checkpoint, `last` or a recovery file, into this folder.

        A kill may have come between the writing of `last` and its ranking, so `last` is ranked once more.
        """
        state = load_checkpoint_metadata(checkpoint_path).get('saver')
        if state is None:  # a checkpoint of an older timm
            return
        self.load_state_dict(dict(state, pending=(None, None)))
        epoch, metric = state['pending']
        if os.path.basename(checkpoint_path) == f'last{self.extension}' and epoch is not None:
            save_path = self._checkpoint_path(epoch)
            self.checkpoint_files = [file for file in self.checkpoint_files if file[0] != save_path]
            self._bookkeeping_only = True
            self.save_checkpoint(epoch, metric)
            self._bookkeeping_only = False
        recoveries = find_recoveries(self.recovery_dir)
        self.curr_recovery_file = str(recoveries[-1]) if recoveries else ''
        self.prev_recovery_file = str(recoveries[-2]) if len(recoveries) > 1 else ''


def find_recoveries(folder: str | Path) -> list[Path]:
    """Return the recovery files of a folder, oldest in training first."""
    found = {path: _RECOVERY_FILE.fullmatch(path.name) for path in Path(folder).glob('recovery-*.pth.tar')}
    return sorted((path for path in found if found[path]), key=lambda path: tuple(map(int, found[path].groups())))
