"""The folder of a cache: its key, its lock, a file for each epoch, and the teacher's validations."""
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .epoch_file import EpochFile, epoch_file_size
from .key import Key, claim_key, write_new
from .teacher_record import (
    MEMBERS_FILE,
    TEACHER_FILE,
    VALIDATION_FILES,
    read_validation,
    validation_path,
)

_logger = logging.getLogger(__name__)

KEY_FILE, LOCK_FILE, ARGS_FILE, EPOCH_FILES = 'key.json', 'lock', 'args.yaml', 'epoch-*.logits'
# The key goes last: a folder with a key never holds another key's rows, whenever clearing it is interrupted.
_CLEARED = EPOCH_FILES, VALIDATION_FILES, TEACHER_FILE, MEMBERS_FILE, ARGS_FILE, KEY_FILE
_READ_ONLY = errno.EACCES, errno.EPERM, errno.EROFS
_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


class DiskFull(UsageError):
    """The disk of a cache has no more room."""


class CacheFolder:
    """A folder of stored logits that belong to one key.

    Any number of runs may read and fill one folder at once; only `rebuild` wants it for itself. A folder that cannot be
    written is opened for reading.

    Args:
        path: The folder; made when absent.
        key: What decides the logits, nested dicts of JSON types.
        num_rows: Rows of an epoch.
        row_bytes: Bytes of a row.
        rebuild: Throw away what is stored for another key; what is stored for this one is kept.
        teacher: What the live teacher says of itself, where it is loaded already; as for `claim_teacher`.

    Attributes:
        writable: Whether rows can be added.

    Raises:
        UsageError: The folder holds rows of another key, cannot be made, or is in use while it is to be cleared.
    """

    def __init__(
            self,
            path: Path,
            key: Key,
            num_rows: int,
            row_bytes: int,
            rebuild: bool = False,
            teacher: Key | None = None,
    ) -> None:
        self.path = Path(path)
        self.num_rows = num_rows
        self.row_bytes = row_bytes
        self._lock = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A file object: the lock of a run that fails goes with the last reference to it.
            self._lock = open(self.path / LOCK_FILE, 'a')
        except OSError as error:
            if error.errno not in _READ_ONLY or not os.path.isdir(self.path):  # Path.is_dir raises in a closed folder
                reason = 'a folder is needed' if os.path.isfile(self.path) else error.strerror
                raise UsageError(f'--teacher-cache {path}: {reason}.') from error
        self.writable = self._lock is not None
        self._share()
        try:
            self._claim(key, teacher, rebuild)
        except BaseException:
            self.close()
            raise

    def _claim(self, key: Key, teacher: Key | None, rebuild: bool) -> None:
        if not self.writable and not (self.path / KEY_FILE).exists():
            raise UsageError(f'--teacher-cache {self.path} is empty and cannot be written: use another folder.')
        try:
            self._claim_both(key, teacher)
        except UsageError:
            # A run that was refused before its first row leaves a key, and no reason to keep it.
            if not rebuild and any(self.path.glob(EPOCH_FILES)):
                raise
            self._clear()
            self._claim_both(key, teacher)
        except OSError as error:
            raise self._explain(error) from error

    def _claim_both(self, key: Key, teacher: Key | None) -> None:
        claim_key(self.path / KEY_FILE, key)
        if teacher is not None:
            self.claim_teacher(teacher)

    def claim_teacher(self, teacher: Key) -> None:
        """Write down what the live teacher says of itself, or check that it is the one that filled the cache.

        Raises:
            UsageError: It is another one.
        """
        if self.writable or (self.path / TEACHER_FILE).exists():
            claim_key(self.path / TEACHER_FILE, {'teacher': teacher})

    def describe(self, members: list[dict[str, Any]], args_text: str) -> None:
        """Keep what a run without the teacher says of its members, and the flags to make it again; the first stay."""
        if self.writable:
            write_new(self.path / MEMBERS_FILE, json.dumps({'members': members}, indent=2))
            write_new(self.path / ARGS_FILE, args_text)

    def _share(self) -> None:
        import fcntl  # not on Windows, where only this feature is missed

        if self.writable:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise UsageError(f'--teacher-cache {self.path} is being rebuilt by another run: wait for it.') from None

    def _clear(self) -> None:
        import fcntl

        if not self.writable:
            raise UsageError(f'--teacher-cache {self.path} cannot be written: use another folder.')
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f'--teacher-cache {self.path} has to be cleared, and another run is using it: wait for its end.'
            ) from None
        if any(self.path.glob(EPOCH_FILES)):
            _logger.warning(f'Throwing away the logits in {self.path} (--teacher-cache-rebuild).')
        for pattern in _CLEARED:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def epoch_path(self, epoch: int) -> Path:
        return self.path / f'epoch-{epoch:04d}.logits'

    def open_epoch(self, epoch: int, writable: bool = True) -> EpochFile:
        """Open an epoch's file.

        Raises:
            UsageError: It was cut short, or cannot be made; `DiskFull` for want of room.
        """
        try:
            return EpochFile(self.epoch_path(epoch), self.num_rows, self.row_bytes, writable and self.writable)
        except OSError as error:
            raise self._explain(error) from error

    def write(self, file: EpochFile, rows: np.ndarray, data: np.ndarray) -> None:
        """Write rows `[B]`, `data` `[B, row_bytes]` uint8.

        Raises:
            DiskFull: There is no room for them.
        """
        try:
            file.write(rows, data)
        except OSError as error:
            raise self._explain(error) from error

    def close_epoch(self, file: EpochFile) -> None:
        """Close an epoch's file.

        Raises:
            DiskFull: What was written did not fit after all.
        """
        try:
            file.close()
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> UsageError:
        if error.errno in _NO_ROOM:
            return DiskFull(
                f'--teacher-cache {self.path}: the disk is full. What is stored so far is kept: make room and start '
                'again, or store less with --teacher-cache-epochs or --teacher-cache-topk.'
            )
        return UsageError(f'--teacher-cache {error.filename or self.path}: {error.strerror}.')

    def covers(self, epochs: Iterable[int], needed_rows: Callable[[int], np.ndarray]) -> bool:
        """Tell whether all rows that a run will read are present.

        Args:
            epochs: Epochs of the cache.
            needed_rows: Gives the row numbers needed of an epoch; asked only while all before are present.
        """
        for epoch in epochs:
            if not self.epoch_path(epoch).exists():
                return False
            file = self.open_epoch(epoch)
            try:
                if not (file.checksums.all() or file.has(needed_rows(epoch)).all()):
                    return False
            finally:
                file.close()
        return True

    def check_space(self, epochs: Iterable[int]) -> None:
        """Log what the epochs will take, and refuse a disk or folder that cannot take it.

        Raises:
            UsageError: The folder is read-only, or the free disk is too small; both sizes are named.
        """
        if not self.writable:
            raise UsageError(
                f'--teacher-cache {self.path} lacks rows of this run and cannot be written: make it writable, or use '
                'another folder.'
            )
        size = epoch_file_size(self.num_rows, self.row_bytes)
        epochs = list(epochs)
        stored = [self.epoch_path(epoch) for epoch in epochs if self.epoch_path(epoch).exists()]
        # Files have holes where rows are absent: blocks count, not lengths.
        missing = size * len(epochs) - sum(min(size, path.stat().st_blocks * 512) for path in stored)
        free = shutil.disk_usage(self.path).free
        _logger.info(
            f'Teacher cache {self.path}: {len(epochs)} epochs of {self.num_rows} rows, {format_bytes(size)} each, '
            f'{format_bytes(missing)} to be written, {format_bytes(free)} free'
        )
        if missing > free:
            raise UsageError(
                f'--teacher-cache {self.path} needs {format_bytes(missing)} more and its disk has {format_bytes(free)} '
                f'free: store fewer of the {len(epochs)} epochs (--teacher-cache-epochs), fewer logits '
                '(--teacher-cache-topk), or use another disk.'
            )

    def load_validation(self, key: str) -> dict[str, np.ndarray]:
        """Return the arrays of the teacher's validation under a key, or an empty dict."""
        stored = read_validation(validation_path(self.path, key))
        return stored if str(stored.get('key')) == key else {}

    def save_validation(self, key: str, **arrays: Any) -> None:
        """Store the arrays of the teacher's validation under a key; nothing where it cannot be written."""
        if not self.writable:
            return
        path = validation_path(self.path, key)
        temporary = path.with_name(f'.{path.stem}-{os.getpid()}.npz')
        try:
            np.savez(temporary, key=key, **arrays)
            os.replace(temporary, path)
        except OSError as error:
            raise self._explain(error) from error
        finally:
            temporary.unlink(missing_ok=True)


def format_bytes(num_bytes: float) -> str:
    """Write a size in GB, small ones in MB."""
    return f'{num_bytes / 1e9:.2f} GB' if num_bytes >= 1e8 else f'{num_bytes / 1e6:.2f} MB'
