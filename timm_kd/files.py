"""Files: written whole or not at all, and weights read without running code that may be in them."""
import argparse
import errno
import os
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from .errors import UNSAFE, UsageError, shortened


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one, whole."""
    temporary = f'{path}.tmp'
    with open(temporary, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def open_regular(path: str | Path, flags: int) -> int:
    """Open a file of a folder that others can write to, without following where they may have led it.

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
    except (SafetensorError, EOFError, OSError, RuntimeError, ValueError) as error:
        if 'weights_only' in str(error):  # a TorchScript archive, or a file of torch before 0.1.10
            raise UsageError(f'{name}: {UNSAFE}.') from error
        raise UsageError(
            f'{name} cannot be read, it is truncated or not a checkpoint ({shortened(error)})'
        ) from error
