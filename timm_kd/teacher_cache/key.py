"""What a cache was filled for, field by field: what identifies data and teacher, kept in JSON and compared."""
import copy
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from timm.data.readers.reader import Reader
from timm.models import get_pretrained_cfg
from torch.utils.data import Dataset

from ..errors import UsageError
from ..files import open_regular
from ..teacher.spec import locate

Key = dict[str, Any]

_MAX_SHOWN = 5
_MAX_SIZES, _MAX_CONTENTS = 4096, 256
_WEIGHTS = ('*.safetensors', '*.bin', '*.pth', '*.pt', 'config.json')


class OtherKey(UsageError):
    """A cache was filled for another key, or its key is damaged: only clearing it makes room for this one."""


def claim_key(path: Path, key: Key) -> None:
    """Write the key of a new cache, nested dicts of JSON types, or check that of an old one; tuples count as lists.

    Raises:
        OtherKey: The cache was filled for another key (the message names fields, both values and the way out), or its
            file is damaged.
    """
    text = json.dumps(key, indent=2)
    if not os.path.lexists(path):
        write_new(path, text)
    stored, wanted = _flatten(read_key(path)), _flatten(json.loads(text))
    absent = object()
    fields = [name for name in {**stored, **wanted} if stored.get(name, absent) != wanted.get(name, absent)]
    if not fields:
        return

    def show(key: Key, name: str) -> str:
        return json.dumps(key[name]) if name in key else 'not set'

    shown = '; '.join(f'{name} was {show(stored, name)}, is now {show(wanted, name)}' for name in fields[:_MAX_SHOWN])
    more = f' (and {len(fields) - _MAX_SHOWN} more)' if len(fields) > _MAX_SHOWN else ''
    raise OtherKey(
        f"teacher cache '{path.parent}' holds the logits of other images or another teacher: {shown}{more}. Give this "
        'run the old settings, use another folder, or fill this one anew with `rebuild`.'
    )


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
        raise UsageError(f"teacher cache '{path.parent}': no {path.name} in it, so it is no teacher cache.") from None
    except OSError as error:
        raise UsageError(f"teacher cache '{path.parent}': {path.name}: {error.strerror}.") from error
    except UsageError:
        raise
    except (ValueError, RecursionError):
        key = None
    if not isinstance(key, dict):
        raise OtherKey(f"teacher cache '{path.parent}': {path.name} is damaged: use `rebuild`.")
    return key


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


def fingerprint_dataset(dataset: Dataset) -> dict[str, Any]:
    """Describe which samples a map-style data set holds, in which order.

    File names and classes are hashed, and of files spread over the set the sizes of up to 4096 and the content of up to
    256: reading all of ImageNet to notice a changed pixel would cost as much as an epoch.

    Returns:
        `type`, `count`, and hashes: `files`, `sizes`, `contents`, `targets`, `classes`, each where the data set knows
        them.
    """
    reader = getattr(dataset, 'reader', dataset)
    found = {'type': type(reader).__name__, 'count': len(dataset)}
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list) and isinstance(samples[0][0], str):
        root = str(getattr(reader, 'root', os.path.commonpath([samples[0][0], samples[-1][0]])))
        found['files'] = _hash_lines(f'{path.removeprefix(root)} {target}' for path, target in samples)
        found['sizes'] = _hash_lines(str(os.path.getsize(path)) for path, _ in _spread(samples, _MAX_SIZES))
    elif hasattr(getattr(reader, 'dataset', None), '_fingerprint'):
        return {**found, 'files': reader.dataset._fingerprint}  # of Hugging Face datasets: of data and transforms
    elif isinstance(reader, Reader):
        found['files'] = _hash_lines(reader.filenames())
    if isinstance(reader, Reader):
        found['contents'] = _hash(_contents(reader))
    elif hasattr(dataset, 'data'):  # torchvision's data sets in memory
        found['contents'] = _hash(np.asarray(image).tobytes() for image in _spread(dataset.data, _MAX_CONTENTS))
    if hasattr(reader, 'targets'):
        found['targets'] = _hash_lines(str(target) for target in reader.targets)
    if getattr(reader, 'class_to_idx', None):
        found['classes'] = _hash_lines(f'{name} {index}' for name, index in reader.class_to_idx.items())
    return found


def _contents(reader: Reader) -> Iterator[bytes]:
    if getattr(reader, 'cache_tarfiles', False):
        # Workers must not inherit an open tar file: they would share its position.
        reader = copy.copy(reader)
        reader.cache_tarfiles = False
    for index in _spread(range(len(reader)), _MAX_CONTENTS):
        with reader[index][0] as file:
            yield file.read()


def fingerprint_teacher(spec: str) -> dict[str, Any]:
    """Describe where a teacher's weights come from, in such a way that other weights look different.

    Files are hashed. A timm name is described by the file that timm downloads for it, a Hub repository by its name:
    that its weights have changed since is noticed when the teacher is loaded, by `Teacher.fingerprint`.

    Raises:
        UsageError: The spec points nowhere.
    """
    kind, place = locate(spec)
    if kind == 'file':
        return {'sha256': hash_files(place)}
    if kind == 'folder':
        folder = Path(place.removeprefix('local-dir:'))
        files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
        return {'sha256': hash_files(*files)}
    if kind == 'timm':
        cfg = get_pretrained_cfg(place)
        return {'timm': place, 'weights': cfg.hf_hub_id or cfg.url or str(cfg.file), 'tag': cfg.tag}
    return {'hub': place.split(':', 1)[-1]}


def _spread(items: Sequence, count: int) -> Sequence:
    """Return at most so many items, evenly spread, or all."""
    return items[::-(-len(items) // count)]


def hash_files(*paths: str | Path) -> str:
    """Return the sha256 of the content of files, one after the other."""
    def blocks() -> Iterator[bytes]:
        for path in paths:
            with open(path, 'rb') as file:
                while block := file.read(1 << 20):
                    yield block
    return _hash(blocks())


def _hash_lines(lines: Iterable[str]) -> str:
    return _hash(['\n'.join(lines).encode(errors='surrogateescape')])


def _hash(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
