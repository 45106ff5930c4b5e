"""The rows of one epoch in one memory-mapped file that a kill or a power failure leaves readable.

    4096 bytes  byte 0: 1 while rows may not have reached the disk
    then        uint32 [N]: CRC-32 of each row, 0 where the row is absent, to a multiple of 4096 bytes
    then        the rows, N * row_bytes

A row is written before its checksum. A killed process therefore loses the batch it was writing and no other: what is in
the page cache survives it. A machine that stops may lose pages of either in any order; then byte 0 is still 1, and
whoever opens the file next drops the rows whose checksum does not hold.

Several processes may write one file at once: a row's content follows from its number, so whoever comes second writes
the same.
"""
import logging
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import CommandError, UsageError
from ..files import NO_ROOM, open_regular

_logger = logging.getLogger(__name__)

_PAGE = 4096  # of the file; a machine's own may be larger
_ROWS_AT_ONCE = 4096


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise a UsageError in place of an OSError; a CommandError for a full disk, which no flag has caused."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise CommandError(
                f"teacher cache '{path}': the disk is full. What is stored so far is kept: make room and start again, "
                'or store less with `num_epochs` or `topk`.'
            ) from error
        raise UsageError(f"teacher cache '{error.filename or path}': {error.strerror}.") from error


def _head_size(num_rows: int) -> int:
    return _PAGE + -(-4 * num_rows // _PAGE) * _PAGE


def epoch_file_size(num_rows: int, row_bytes: int) -> int:
    """Return the size of an epoch's file in bytes."""
    return _head_size(num_rows) + num_rows * row_bytes


def _checksums_of(rows: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row) or 1 for row in rows], dtype=np.uint32)


class EpochFile:
    """N rows of bytes by number, each present or absent; a file that is absent is made if it is to be writable.

    Attributes:
        checksums: CRC-32 of the rows, `[N]` uint32, 0 where absent; live while the file is writable.

    Raises:
        UsageError: The file has another size, so it was cut short or holds other rows; or it cannot be opened.
        CommandError: The disk has no room for the file's head.
    """

    def __init__(self, path: Path, num_rows: int, row_bytes: int, writable: bool) -> None:
        self.path = path
        self.row_bytes = row_bytes
        self.writable = writable
        self._rows_at = _head_size(num_rows)
        size = epoch_file_size(num_rows, row_bytes)
        with explained(path):
            fd = open_regular(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
            self._file = open(fd, 'rb+' if writable else 'rb', buffering=0)
            found = os.fstat(fd).st_size
            if found == 0 and writable:
                self._file.truncate(size)
                if hasattr(os, 'posix_fallocate'):
                    # The head is written through the map, where a full disk would be a SIGBUS.
                    os.posix_fallocate(fd, 0, self._rows_at)
            elif found != size:
                raise UsageError(
                    f"teacher cache '{path.parent}': {path.name} has {found} bytes instead of {size}, it was cut "
                    'short: delete it to have its rows computed again.'
                )
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY)
        self._unsynced = np.frombuffer(self._map, np.uint8, 1)
        self.checksums = np.frombuffer(self._map, np.uint32, num_rows, offset=_PAGE)
        self._rows = np.frombuffer(self._map, np.uint8, offset=self._rows_at).reshape(num_rows, row_bytes)
        if self._unsynced[0]:
            self.drop_damaged()

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Tell for row numbers `[B]` which are present."""
        return self.checksums[rows] != 0

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Gather rows `[B]` into `out`, `[B, row_bytes]` uint8, absent ones included."""
        np.take(self._rows, rows, axis=0, out=out, mode='clip')  # 'raise' would gather into a buffer first

    def prefetch(self, rows: np.ndarray) -> None:
        """Have the kernel read rows from disk in the background."""
        for row in rows.tolist():
            start = (self._rows_at + row * self.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, self._rows_at + (row + 1) * self.row_bytes - start)

    def write(self, rows: np.ndarray, data: np.ndarray) -> None:
        """Write rows `[B]`, `data` `[B, row_bytes]` uint8.

        Raises:
            CommandError: The disk has no room for them.
        """
        self._unsynced[0] = 1
        neighbours = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, stop in zip([0, *neighbours], [*neighbours, len(rows)], strict=True):
            left = memoryview(data[start:stop]).cast('B')
            offset = self._rows_at + int(rows[start]) * self.row_bytes
            with explained(self.path):
                while len(left):
                    written = os.pwrite(self._file.fileno(), left, offset)  # through the map, a full disk is a SIGBUS
                    left, offset = left[written:], offset + written
        self.checksums[rows] = _checksums_of(data)

    def drop_damaged(self) -> np.ndarray:
        """Make absent the rows whose checksum does not hold, and return their numbers."""
        present = np.flatnonzero(self.checksums)
        blocks = np.split(present, range(_ROWS_AT_ONCE, len(present), _ROWS_AT_ONCE))
        held = [_checksums_of(self._rows[block]) == self.checksums[block] for block in blocks]
        damaged = present[~np.concatenate(held)]
        self.checksums[damaged] = 0
        if len(damaged):
            _logger.warning(f'{self.path}: {len(damaged)} rows are damaged and count as absent.')
        return damaged

    def close(self) -> None:
        """Bring the rows to the disk, and say so in the file.

        Raises:
            CommandError: The disk has no room for them after all.
        """
        with explained(self.path), self._file:
            if self.writable and self._unsynced[0]:
                os.fsync(self._file.fileno())
                self._unsynced[0] = 0
