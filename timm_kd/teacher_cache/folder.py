"""The folder of a cache: its key, its lock, a file for each epoch, and what is known of the teacher.

    key.json            what decides the logits; it is the first file written and the last one cleared
    lock                shared by the runs that use the folder, exclusive while it is cleared
    epoch-0000.logits   the rows of an epoch (see `epoch_file`)
    teacher.json        what the live teacher said of itself, its weights among it
    members.json        the names of the single teachers, for a run that loads none
    validation-*.npz    how the teacher did in validation, for each crop and filter
    args.yaml           the flags that `verify` makes the run again with

Others may have write access to the folder, so no file in it is a link: none is read or written through one.
"""
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, shortened
from ..files import open_regular
from ..replay import ReplayBatchSampler
from .epoch_file import EpochFile, epoch_file_size, explained
from .key import Key, OtherKey, claim_key, read_key, temporary_file, write_new
from .layout import RowLayout

_logger = logging.getLogger(__name__)

FORMAT = 2
KEY_FILE, LOCK_FILE, TEACHER_FILE, MEMBERS_FILE, ARGS_FILE = \
    'key.json', 'lock', 'teacher.json', 'members.json', 'args.yaml'
VALIDATION_FILES = 'validation-*.npz'
_NAMES = re.compile(
    r'args\.yaml|(key|teacher|members)\.json|epoch-([0-9]{4}|[1-9][0-9]{4,8})\.logits|validation-[0-9a-f]{12}\.npz'
)
_READ_ONLY = errno.EACCES, errno.EPERM, errno.EROFS


class CacheFolder:
    """A folder of stored logits that belong to one key.

    Any number of runs may read and fill one folder at once; only `rebuild` wants it for itself. A folder that cannot be
    written is opened for reading.

    Args:
        path: The folder; made when absent.
        key: What decides the logits, nested dicts of JSON types. Its `rows` say how many an epoch has (`count`),
            whether their numbers are positions in the epoch or indices of samples (`by` 'position' or
            'sample'), and the arguments of their `RowLayout` (`classes`, `dtype`, `topk`).
        rebuild: Throw away what is stored for another key; what is stored for this one is kept.
        teacher: What the live teacher says of itself, where it is loaded already (see `claim_teacher`).

    Attributes:
        layout: How a row is stored.
        writable: Whether rows can be added.

    Raises:
        UsageError: The folder holds rows of another key or files of another kind, cannot be made, or is in use while it
            is to be cleared.
    """

    def __init__(
            self,
            path: Path,
            key: Key,
            rebuild: bool = False,
            teacher: Key | None = None,
    ) -> None:
        self.path = Path(path)
        rows = key['rows']
        self.layout = RowLayout(rows['classes'], rows['dtype'], rows['topk'])
        self.num_rows = rows['count']
        self._by_position = rows['by'] == 'position'
        self._lock = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_ours(rebuild)
            # A file object: the lock of a run that fails goes with the last reference to it.
            self._lock = open(open_regular(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT), 'rb+')
        except OSError as error:
            if error.errno not in _READ_ONLY or not os.path.isdir(self.path):  # Path.is_dir raises in a closed folder
                reason = 'a folder is needed' if isinstance(error, FileExistsError) else error.strerror
                raise UsageError(f"teacher cache '{path}': {reason}.") from error
        self.writable = self._lock is not None
        try:
            with explained(self.path):
                if self.writable:
                    self._share()
                self._claim({'format': FORMAT, **key}, teacher, rebuild)
        except BaseException:
            self.close()
            raise

    def _check_ours(self, rebuild: bool) -> None:
        """Refuse a folder with files of another kind: taken for a cache, it might be cleared."""
        names = [name for name in os.listdir(self.path) if name != LOCK_FILE and not name.startswith('.new-')]
        if KEY_FILE not in names:
            if names:
                raise UsageError(
                    f"teacher cache '{self.path}' holds {min(names)} and no {KEY_FILE}, so it is no teacher cache: "
                    'give a new or an empty folder.'
                )
            return
        try:
            if 'format' not in read_key(self.path / KEY_FILE):
                raise UsageError(f"teacher cache '{self.path}': its {KEY_FILE} is not that of a teacher cache.")
        except OtherKey:
            if not rebuild or not all(_NAMES.fullmatch(name) for name in names):
                raise

    def _share(self, exclusive: bool = False) -> None:
        import fcntl  # not on Windows, where only this feature is missed
        try:
            fcntl.flock(self._lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = 'has to be cleared, and another run is using it: wait for its end' if exclusive \
                else 'is being rebuilt by another run: wait for it'
            raise UsageError(f"teacher cache '{self.path}' {reason}.") from None

    def _claim(self, key: Key, teacher: Key | None, rebuild: bool) -> None:
        path = self.path / KEY_FILE
        if not self.writable and not os.path.lexists(path):
            raise UsageError(f"teacher cache '{self.path}' is empty and cannot be written: use another folder.")
        try:
            claim_key(path, key)
            if teacher is not None:
                self.claim_teacher(teacher)
        except OtherKey:
            # A run that was refused before its first row leaves a key, and no reason to keep it.
            if not rebuild and epoch_files(self.path):
                raise
            self._clear()
            self._claim(key, teacher, rebuild=False)

    def claim_teacher(self, teacher: Key) -> None:
        """Write down what the live teacher says of itself, or check that it is the one that filled the cache.

        Raises:
            OtherKey: It is another one.
        """
        if self.writable or os.path.lexists(self.path / TEACHER_FILE):
            claim_key(self.path / TEACHER_FILE, {'teacher': teacher})

    def describe(self, members: list[dict[str, Any]], args_text: str) -> None:
        """Write down the members for runs that load no teacher, and the flags for `verify`, unless they are there."""
        if self.writable:
            write_new(self.path / MEMBERS_FILE, json.dumps({'members': members}, indent=2))
            write_new(self.path / ARGS_FILE, args_text)

    def _clear(self) -> None:
        if not self.writable:
            raise UsageError(f"teacher cache '{self.path}' cannot be written: use another folder.")
        self._share(exclusive=True)
        epochs = epoch_files(self.path).values()
        if epochs:
            _logger.warning(f'Throwing away the logits in {self.path} (`rebuild`).')
        # The key goes last: a folder with a key never holds another key's rows, whenever clearing it is interrupted.
        others = (self.path / name for name in (TEACHER_FILE, MEMBERS_FILE, ARGS_FILE, KEY_FILE))
        for path in (*epochs, *self.path.glob(VALIDATION_FILES), *others):
            path.unlink(missing_ok=True)
        self._share()

    def close(self) -> None:
        """Give up the folder, its lock included."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def open_epoch(self, epoch: int) -> EpochFile:
        """Open an epoch's file, which is made where it is absent and the folder writable."""
        return EpochFile(epoch_path(self.path, epoch), self.num_rows, self.layout.row_bytes, self.writable)

    def has_epoch(self, epoch: int) -> bool:
        """Tell whether there is a file of an epoch; an empty one, which a full disk has left, is none."""
        path = epoch_path(self.path, epoch)
        return os.path.lexists(path) and path.lstat().st_size > 0

    def rows(self, batch_sampler: ReplayBatchSampler, batch: int, num_batches: int = 1) -> np.ndarray:
        """Return the numbers of the rows that batches of the sampler's epoch hold, `[num_batches * B]`."""
        samples, positions = batch_sampler.rows(batch, num_batches)
        return positions if self._by_position else samples

    def epoch_rows(self, batch_sampler: ReplayBatchSampler, epoch: int) -> np.ndarray:
        """Return the numbers of all rows that this rank reads in an epoch, `[N]`; sets the sampler to that epoch."""
        batch_sampler.set_epoch(epoch)
        return self.rows(batch_sampler, 0, len(batch_sampler))

    def covers(self, batch_sampler: ReplayBatchSampler, epochs: Iterable[int]) -> bool:
        """Tell whether all rows that this rank reads in some epochs are present; may set the sampler to one of them."""
        for epoch in epochs:
            if not self.has_epoch(epoch):
                return False
            with closing(self.open_epoch(epoch)) as file:
                # For a million images it takes a twentieth of a second to say which rows a rank reads.
                if not (file.checksums.all() or file.has(self.epoch_rows(batch_sampler, epoch)).all()):
                    return False
        return True

    def check_space(self, epochs: Iterable[int]) -> None:
        """Log what the epochs will take, and refuse a disk or folder that cannot take it.

        Raises:
            UsageError: The folder is read-only, or the free disk is too small; both sizes are named.
        """
        if not self.writable:
            raise UsageError(
                f"teacher cache '{self.path}' lacks rows of this run and cannot be written: make it writable, or use "
                'another folder.'
            )
        size = epoch_file_size(self.num_rows, self.layout.row_bytes)
        epochs = list(epochs)
        stored = [path for epoch, path in epoch_files(self.path).items() if epoch in epochs]
        # Files have holes where rows are absent: blocks count, not lengths.
        missing = size * len(epochs) - sum(min(size, path.lstat().st_blocks * 512) for path in stored)
        free = shutil.disk_usage(self.path).free
        _logger.info(
            f'Teacher cache {self.path}: {len(epochs)} epochs of {self.num_rows} rows, {format_bytes(size)} each, '
            f'{format_bytes(missing)} to be written, {format_bytes(free)} free'
        )
        if missing > free:
            raise UsageError(
                f"teacher cache '{self.path}' needs {format_bytes(missing)} more and its disk has {format_bytes(free)} "
                f'free: store fewer of the {len(epochs)} epochs (`num_epochs`), fewer logits (`topk`), or use another '
                'disk.'
            )

    def load_validation(self, key: str, count: int) -> dict[str, Any]:
        """Return what is stored of the teacher's validation on `count` images under a key, or an empty dict."""
        stored = read_validation(_validation_path(self.path, key))
        return stored if stored.get('key') == key and len(stored['predictions']) == count else {}

    def save_validation(self, key: str, metrics: list[dict[str, float]], predictions: np.ndarray) -> None:
        """Store the teacher's validation under a key, unless the folder cannot be written."""
        if self.writable:
            with explained(self.path), temporary_file(self.path) as file:
                np.savez(file, key=key, metrics=json.dumps(metrics), predictions=predictions)
                file.flush()
                os.replace(file.name, _validation_path(self.path, key))


def epoch_files(folder: Path) -> dict[int, Path]:
    """Return the files of a cache's epochs, by epoch."""
    return {int(path.name[6:-7]): path for path in sorted(folder.glob('epoch-*.logits')) if _NAMES.fullmatch(path.name)}


def epoch_path(folder: Path, epoch: int) -> Path:
    """Return the file of an epoch."""
    return folder / f'epoch-{epoch:04d}.logits'


def read_rows(folder: Path) -> tuple[dict[str, Any], RowLayout]:
    """Return what a cache's key says of its rows, and their layout.

    Raises:
        UsageError: The folder is no cache, or its key is damaged.
    """
    rows = read_key(folder / KEY_FILE).get('rows')
    try:
        sizes = rows['count'], rows['classes'], rows['topk'] or 1
        if all(type(size) is int and size > 0 for size in sizes) and rows['by'] in ('position', 'sample'):
            return rows, RowLayout(rows['classes'], rows['dtype'], rows['topk'])
    except (LookupError, TypeError):
        pass
    raise OtherKey(f'{folder / KEY_FILE} is damaged: fill the folder anew with `rebuild`.')


def read_teacher(path: Path) -> Key:
    """Return what the key or the teacher file of a cache says of the teacher; nothing where there is no file."""
    teacher = read_key(path).get('teacher') if os.path.lexists(path) else None
    return teacher if isinstance(teacher, dict) else {}


def precision_of(teacher: Key) -> str | None:
    """Return the precision in a teacher's fingerprint, as `--teacher-dtype` has it; None where its members differ."""
    members = [teacher] if 'dtype' in teacher else teacher.values()
    found = {member.get('dtype') for member in members if isinstance(member, dict)}
    precision = found.pop() if len(found) == 1 else None
    return 'amp' if precision == 'float32 amp' else precision


def read_precision(folder: Path) -> str | None:
    """Return the precision in which a cache's teacher answered; None where no teacher has been there yet."""
    return precision_of(read_teacher(folder / TEACHER_FILE))


def read_members(folder: Path) -> list[dict[str, Any]] | None:
    """Return what a cache knows of its teacher's members; None where no teacher has been there yet.

    Raises:
        UsageError: The file is damaged.
    """
    path = folder / MEMBERS_FILE
    if not os.path.lexists(path):
        return None
    members = read_key(path).get('members')
    fields = {'source', 'model_name', 'num_params'}
    if not isinstance(members, list) or not all(isinstance(m, dict) and fields <= m.keys() for m in members):
        raise UsageError(f'{path} is damaged: delete it, the next run with the teacher writes it again.')
    return members


def read_validation(path: Path) -> dict[str, Any]:
    """Return what a file says of the teacher's validation; an empty dict where it is absent or damaged.

    Returns:
        `key`; `metrics`, those of each member; and `predictions`, the classes `[N]` that the teacher predicts.

    Raises:
        UsageError: It is a link, or no file.
    """
    try:
        with open(open_regular(path, os.O_RDONLY), 'rb') as file, np.load(file) as stored:  # allow_pickle is off
            metrics, predictions = json.loads(str(stored['metrics'])), stored['predictions']
            if predictions.ndim != 1 or not all({'top1', 'top5'} <= member.keys() for member in metrics):
                raise ValueError('its fields are of other kinds')
            return {'key': str(stored['key']), 'metrics': metrics, 'predictions': predictions}
    except FileNotFoundError:
        return {}
    except UsageError:
        raise
    except Exception as error:  # NumPy raises nearly anything for a damaged file
        _logger.warning(f'{path} is damaged and counts as absent: {shortened(error)}')
        return {}


def _validation_path(folder: Path, key: str) -> Path:
    """Return the file of the validation under a key: students with another crop or filter have one of their own."""
    return folder / VALIDATION_FILES.replace('*', hashlib.sha256(key.encode()).hexdigest()[:12])


def format_bytes(num_bytes: float) -> str:
    """Write a size in GB, small ones in MB."""
    return f'{num_bytes / 1e9:.2f} GB' if num_bytes >= 1e8 else f'{num_bytes / 1e6:.2f} MB'
