"""Files: written whole or not at all, and weights read without running code that may be in them; stdout."""
import argparse
import errno
import logging
import os
import pickle
import re
import stat
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from .errors import UNSAFE, UsageError, shortened

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)

NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_LOCK_FILE = 'run.lock'
_HELD = errno.EACCES, errno.EAGAIN  # what POSIX lets a system say of a lock that another process has


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one, whole."""
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write that fails names no file


class FolderLock:
    """A folder's lock against a second process that would write there; a process that is killed loses it.

    It is a lock of POSIX records on `run.lock` in the folder. They work over NFS too, and forked workers, which outlive
    their killed parent for some seconds, do not inherit them.

    Args:
        patience: Seconds to wait for a process that is just ending.
    """

    def __init__(self, patience: float = 10.0):
        self._patience = patience
        self._path: Path | None = None
        self._file = None

    def __enter__(self) -> 'FolderLock':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()

    def acquire(self, folder: str | Path) -> bool:
        """Take the lock of an existing folder, unless it is held already; return whether this process has it.

        Where the system or the file system has no locks, every process has it.

        Raises:
            OSError: If the file cannot be made.
        """
        if self._file is not None or fcntl is None:
            return True
        self._path = Path(folder, _LOCK_FILE)
        deadline = time.monotonic() + self._patience
        while True:
            file = open(self._path, 'a')
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                if error.errno not in _HELD:
                    return True
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
                continue
            # The process that held the lock before removes the file: a lock on a removed file locks nothing.
            if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                self._file = file
                return True
            file.close()

    @staticmethod
    def is_held(folder: str | Path) -> bool:
        """Tell whether another process has the lock of a folder.

        The process that has the lock must not ask: a POSIX lock is given up when its process closes any file on it, and
        this closes one.
        """
        if fcntl is None:
            return False
        try:
            file = open(Path(folder, _LOCK_FILE))
        except OSError:  # no process has made it, or this one may not see it
            return False
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno in _HELD
        return False


def open_regular(path: str | Path, flags: int) -> int:
    """Open a file in a folder that other users can write to, without following a link that they put in its place.

    Args:
        path: The file. Its folder may be a symbolic link, the file itself not.
        flags: Those of `os.open`. A file that `os.O_CREAT` makes has the permissions that the umask leaves.

    Returns:
        The file descriptor.

    Raises:
        UsageError: In its place is a link, a folder, a pipe or a device; or, where it is to be written, a file that has
            a second name elsewhere (a hard link).
        OSError: As from `os.open`.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # non-blocking: a pipe would wait for a writer
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UsageError(f'{path} is a link, a folder or a socket where a file belongs: remove it.') from error
        raise
    status = os.fstat(fd)
    linked = status.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR)
    if stat.S_ISREG(status.st_mode) and not linked:
        return fd
    os.close(fd)
    if linked:
        raise UsageError(f'{path} is a hard link, writing would change a file elsewhere too: put a copy in its place.')
    raise UsageError(f'{path} is a folder, a pipe or a device where a file belongs: remove it.')


def load_file(path: str | Path, name: str, mmap: bool = False) -> Any:
    """Read `.safetensors`, or a PyTorch file with `weights_only`, to the CPU.

    Args:
        path: The file.
        name: What the message calls it: its flag and path.
        mmap: Leave the tensors of a PyTorch file on disk until they are used.

    Raises:
        UsageError: If the file is missing, truncated, no checkpoint, or would run code when loaded.
    """
    import safetensors.torch  # here, so that the report, which needs a folder's lock alone, starts without torch
    import torch

    try:
        if Path(path).suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        # timm's script keeps its flags as a Namespace, a plain holder of values
        with torch.serialization.safe_globals([argparse.Namespace]):
            # a file of torch before 1.6 is no zip archive, and cannot be mapped
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise UsageError(f'{name}: no such file') from error
    except (pickle.UnpicklingError, LookupError) as error:  # a text file ends in a KeyError
        wanted = re.search(r'GLOBAL (\S+)', str(error))
        if wanted:
            raise UsageError(
                f'{name} is a pickle that asks for {wanted[1]}, so loading it could run code; it was '
                'refused. Save the state_dict() of the model alone, best as .safetensors'
            ) from error
        raise UsageError(f'{name} is not a checkpoint: it is no PyTorch file') from error
    except (safetensors.SafetensorError, EOFError, OSError, RuntimeError, ValueError) as error:
        if 'weights_only' in str(error):  # a TorchScript archive, or a file of torch before 0.1.10
            raise UsageError(f'{name}: {UNSAFE}.') from error
        raise UsageError(
            f'{name} cannot be read, it is truncated or not a checkpoint ({shortened(error)})'
        ) from error


def print_out(text: str) -> None:
    """Print to stdout; where nobody reads there any more (`| head -1`) or it is full, go on without."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # that reader has what it wanted
            _logger.warning(f'stdout cannot be written ({error.strerror}).')
        # Python would try once more at its exit, and end with an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
