"""A teacher that remembers: stored logits where there are any, else the live teacher's, which are stored."""
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..replay import ReplayBatchSampler
from .epoch_file import EpochFile
from .folder import CacheFolder, DiskFull
from .layout import RowLayout

_logger = logging.getLogger(__name__)

_MAX_PENDING = 2


class CachedTeacher(nn.Module):
    """Stands in for the teacher in training: `stored(batch)` reads, calling it with the images computes and writes.

    What the student learns from is what the cache holds, also in the run that fills it: a run that is interrupted, or
    reads, sees the same logits to the bit.

    Args:
        folder: The cache.
        layout: How a row is stored.
        batch_sampler: That of the replayable training loader; its epoch is the one read.
        by_position: Rows are numbered by position in the epoch (where rows mix or share draws), else by sample index.
        device: Where the logits are wanted.
        teacher: The live teacher; None where all rows are present.

    Attributes:
        members: The single teachers, or what is known of them (`source`, `model_name`, `num_params`).
        must_store: Whether a disk that fills up ends the run; else it goes on with the live teacher and stores no more.
        validation_key: What the teacher's validation depends on; None: it is not wanted.
        validation_loader: The loader whose order stored predictions are wanted in.
    """

    def __init__(
            self,
            folder: CacheFolder,
            layout: RowLayout,
            batch_sampler: ReplayBatchSampler,
            by_position: bool,
            device: torch.device,
            teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.layout = layout
        self.batch_sampler = batch_sampler
        self.by_position = by_position
        self.device = device
        self.teacher = teacher
        self.members: list[Any] = [] if teacher is None else teacher.members
        self.must_store = False
        self.validation_key: str | None = None
        self.validation_loader: DataLoader | None = None
        self._file: EpochFile | None = None
        self._epoch: int | None = None
        self._rows: np.ndarray | None = None
        self._pending: deque[tuple[torch.cuda.Event, np.ndarray, torch.Tensor]] = deque()

    def compile(self, *args, **kwargs) -> 'CachedTeacher':
        """Compile the live teacher, if there is one."""
        if self.teacher is not None:
            self.teacher.compile(*args, **kwargs)
        return self

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return the numbers of all rows that this rank reads in an epoch, `[N]`; sets the sampler to that epoch."""
        self.batch_sampler.set_epoch(epoch)
        return self._rows_of(0, len(self.batch_sampler))

    def _rows_of(self, batch: int, num_batches: int = 1) -> np.ndarray:
        return self.batch_sampler.rows(batch, num_batches)[int(self.by_position)]

    def stored(self, batch: int) -> torch.Tensor | None:
        """Read the logits of a batch of the epoch under way.

        Args:
            batch: Number of the batch in its epoch. A call with images that follows is about this batch.

        Returns:
            Logits `[B, C]` float32 on the device, or None where a row is absent.
        """
        if self._epoch != self.batch_sampler.epoch:
            self._open(self.batch_sampler.epoch)
        self._rows = rows = self._rows_of(batch)
        if self._file is None or not self._file.has(rows).all():
            return None
        data = self._host_buffer(len(rows))
        self._file.read(rows, data.numpy())
        if batch + 1 < len(self.batch_sampler):
            self._file.prefetch(self._rows_of(batch + 1))
        return self.layout.unpack(data.to(self.device, non_blocking=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute and store the logits of the batch that `stored` was last asked for.

        Args:
            images: Images `[B, in_chans, H, W]` of that batch, as the student gets them.

        Returns:
            Logits `[B, C]` float32, as they will be read.
        """
        if self.teacher is None:
            raise RuntimeError(f'{self.folder.path} lost rows during the run, and no teacher is there to compute them.')
        packed = self.layout.pack(self.teacher(images))
        if self.folder.writable:
            with self._full_disk():
                self._write(self._rows, packed)
        return self.layout.unpack(packed)

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Go on without storing when the disk is full: a training run is worth more than its cache."""
        try:
            yield
        except DiskFull as error:
            if self.must_store or self.teacher is None:
                raise
            self._pending.clear()
            self.folder.writable = False
            _logger.warning(f'{error} This run goes on with the live teacher and stores no more.')

    def _write(self, rows: np.ndarray, packed: torch.Tensor) -> None:
        if packed.device.type != 'cuda':
            self.folder.write(self._file, rows, packed.cpu().numpy())
            return
        data = self._host_buffer(len(rows))
        data.copy_(packed, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending.append((copied, rows, data))
        # A copy is written when it has arrived; the device, always a batch ahead, is not waited for.
        while self._pending and (len(self._pending) > _MAX_PENDING or self._pending[0][0].query()):
            self._write_oldest()

    def _write_oldest(self) -> None:
        copied, rows, data = self._pending.popleft()
        copied.synchronize()
        self.folder.write(self._file, rows, data.numpy())

    def _host_buffer(self, num_rows: int) -> torch.Tensor:
        return torch.empty(
            (num_rows, self.layout.row_bytes), dtype=torch.uint8, pin_memory=self.device.type == 'cuda',
        )

    def _open(self, epoch: int) -> None:
        self.flush()
        self._epoch = epoch
        if self.folder.writable:
            with self._full_disk():
                self._file = self.folder.open_epoch(epoch)
        path = self.folder.epoch_path(epoch)
        # The file is empty where there was no room to make it.
        if self._file is None and os.path.lexists(path) and path.lstat().st_size:
            self._file = self.folder.open_epoch(epoch, writable=False)

    def flush(self) -> None:
        """Write what is on its way and bring it to the disk."""
        with self._full_disk():
            while self._pending:
                self._write_oldest()
        if self._file is not None:
            with self._full_disk():
                self.folder.close_epoch(self._file)
        self._file = self._epoch = None

    def close(self) -> None:
        """Store what is on its way and give the folder back."""
        self.flush()
        self.folder.close()

    def combine(self, answers: list[torch.Tensor]) -> torch.Tensor:
        """Combine the answers of the live teacher's members."""
        return self.teacher.combine(answers)

    def knows_validation(self) -> bool:
        """Tell whether the teacher's validation is stored, or not wanted."""
        return self.validation_key is None or bool(self.folder.load_validation(self.validation_key))

    def validation(
            self,
            evaluate: Callable[[], tuple[list[dict[str, float]], torch.Tensor]],
    ) -> tuple[list[dict[str, float]], torch.Tensor]:
        """Recall the teacher's validation, or have it made and store it.

        Args:
            evaluate: Evaluates the live teacher: metrics of each member, and its classes `[N]` in the order of
                `validation_loader`, of which each rank has every world-size-th sample.

        Returns:
            The same, from the cache where it is there.
        """
        sampler = self.validation_loader.sampler
        rank, world_size = getattr(sampler, 'rank', 0), getattr(sampler, 'num_replicas', 1)
        count = len(self.validation_loader.dataset)
        stored = self.folder.load_validation(self.validation_key)
        if on_all_ranks(bool(stored)):
            # Ranks are padded with the first samples to equal numbers.
            own = np.arange(rank, -(-count // world_size) * world_size, world_size) % count
            metrics = json.loads(str(stored['metrics']))
            for member, result in zip(self.members, metrics, strict=True):
                top1, top5 = result['top1'], result['top5']
                _logger.info(f'Teacher {member.source}: top-1 {top1:.2f} %, top-5 {top5:.2f} % when it was evaluated')
            return metrics, torch.from_numpy(stored['predictions'][own]).to(self.device)
        metrics, predictions = evaluate()
        parts = [predictions]
        if world_size > 1:
            parts = [torch.empty_like(predictions) for _ in range(world_size)]
            torch.distributed.all_gather(parts, predictions)
        if rank == 0:
            whole = torch.stack(parts, dim=1).flatten()[:count].cpu().numpy()
            with self._full_disk():
                self.folder.save_validation(self.validation_key, metrics=json.dumps(metrics), predictions=whole)
        return metrics, predictions


def on_all_ranks(answer: bool) -> bool:
    """Agree: a rank that does what the others do not would wait for them in vain."""
    if not torch.distributed.is_initialized():
        return answer
    answers = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, answer)
    return all(answers)
