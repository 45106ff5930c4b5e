"""What a cache was filled for: everything that decides the pixels or the logits, field by field."""
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import UsageError
from ..files import open_regular

Key = dict[str, Any]
_MAX_SHOWN = 5


class OtherKey(UsageError):
    """A cache was filled for another key, or its key is damaged: only clearing it makes room for this one."""


def claim_key(path: Path, key: Key) -> None:
    """Write the key of a new cache, or check that of an old one.

    Args:
        path: The key's JSON file.
        key: Nested dict of JSON types; tuples count as lists.

    Raises:
        OtherKey: The cache was filled for another key, or its file is damaged.
    """
    key = json.loads(json.dumps(key))
    if not os.path.lexists(path):
        write_new(path, json.dumps(key, indent=2))
    check_key(read_key(path), key, path.parent)


def read_key(path: Path) -> Key:
    """Read a cache's key.

    Raises:
        UsageError: There is none, or it cannot be read.
        OtherKey: The file is damaged.
    """
    try:
        with open(open_regular(path, os.O_RDONLY), encoding='utf-8') as file:
            key = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f'--teacher-cache {path.parent}: no {path.name} in it, so it is no teacher cache.') from None
    except OSError as error:
        raise UsageError(f'--teacher-cache {path.parent}: {path.name}: {error.strerror}.') from error
    except UsageError:
        raise
    except (ValueError, RecursionError):
        key = None
    if not isinstance(key, dict):
        raise OtherKey(f'--teacher-cache {path.parent}: {path.name} is damaged: use --teacher-cache-rebuild.')
    return key


def check_key(stored: Key, wanted: Key, folder: Path) -> None:
    """Compare the key of a cache with a run's, both of JSON types.

    Raises:
        OtherKey: They differ; the message names fields, both values and the way out.
    """
    stored, wanted = _flatten(stored), _flatten(wanted)
    absent = object()
    fields = [name for name in {**stored, **wanted} if stored.get(name, absent) != wanted.get(name, absent)]
    if not fields:
        return
    shown = '; '.join(
        f'{name} was {_show(stored, name)}, is now {_show(wanted, name)}' for name in fields[:_MAX_SHOWN]
    )
    more = f' (and {len(fields) - _MAX_SHOWN} more)' if len(fields) > _MAX_SHOWN else ''
    raise OtherKey(
        f'--teacher-cache {folder} holds the logits of other images or another teacher: {shown}{more}. Give this run '
        'the old settings, use another folder, or fill this one anew with --teacher-cache-rebuild.'
    )


def _show(key: Key, name: str) -> str:
    return json.dumps(key[name]) if name in key else 'not set'


def _flatten(value: Any, prefix: str = '') -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for field, inner in value.items()
        for name, leaf in _flatten(inner, f'{prefix}.{field}' if prefix else field).items()
    }


def write_new(path: Path, text: str) -> None:
    """Write a file that is whole from the moment it is there, unless there is one already."""
    with temporary_file(path.parent) as file, suppress(FileExistsError):
        file.write(text.rstrip('\n').encode() + b'\n')
        file.flush()
        os.fsync(file.fileno())
        os.link(file.name, path)


@contextmanager
def temporary_file(folder: Path) -> Iterator[IO[bytes]]:
    """Open a file under a name that nobody can guess; it is removed at the end, unless it was renamed."""
    path = folder / f'.new-{secrets.token_hex(8)}'
    try:
        with open(path, 'xb') as file:
            yield file
    finally:
        path.unlink(missing_ok=True)
