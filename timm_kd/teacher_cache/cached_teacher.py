"""A teacher that remembers: stored logits where there are any, else the live teacher's, which are stored."""
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..replay import ReplayBatchSampler
from .epoch_file import EpochFile
from .folder import CacheFolder

_MAX_PENDING = 2


class CachedTeacher(nn.Module):
    """The teacher of a training run with a cache: it reads a batch's logits, or has them computed and stores them.

    The student learns from the logits as the cache holds them, also in the run that fills it. So the run that fills, a
    run that goes on with an interrupted fill, and a run that reads see the same logits to the bit.

    The teacher is asked once for each batch of the loader, in order: the first call of a pass over the data is about
    the first batch of the loader's sampler, each further call about the next.

    Args:
        folder: The cache.
        batch_sampler: The batch sampler of the replayable training loader.
        device: Where the logits are wanted.
        teacher: The live teacher; None where all rows are present.
        members: What is known of the single teachers (`source`, `model_name`, `num_params`) where none is live.
        validation_key: The key under which the folder keeps the teacher's validation; None where there is none to make.
    """

    def __init__(
            self,
            folder: CacheFolder,
            batch_sampler: ReplayBatchSampler,
            device: torch.device,
            teacher: nn.Module | None = None,
            members: Sequence[Any] = (),
            validation_key: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.layout = folder.layout
        self.batch_sampler = batch_sampler
        self.device = device
        self.teacher = teacher
        self.members = list(members) if teacher is None else teacher.members
        self.validation_key = validation_key
        self._copies = HostCopies(device)
        self._file: EpochFile | None = None
        self._pass = self._batch = -1

    def compile(self, *args, **kwargs) -> 'CachedTeacher':
        """Compile the live teacher where there is one."""
        if self.teacher is not None:
            self.teacher.compile(*args, **kwargs)
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next batch of the sampler's pass over the data.

        Args:
            images: Images `[B, in_chans, H, W]` of that batch, as the student gets them.

        Returns:
            Logits `[B, C]` float32: the stored ones, or the live teacher's as they will be read.

        Raises:
            RuntimeError: The images are not those of the next batch, or their rows are absent and no teacher is there.
            CommandError: The disk has no room for the rows.
        """
        rows = self._next_rows()
        if len(rows) != len(images):
            raise RuntimeError(f'Batch {self._batch} has {len(rows)} rows, not {len(images)}: ask once for each batch.')
        if self._file is not None and self._file.has(rows).all():
            logits = self.layout.unpack(self._read(rows))
        elif self.teacher is None:
            raise RuntimeError(f'{self.folder.path} lost rows during the run, and no teacher is there to compute them.')
        else:
            packed = self.layout.pack(self.teacher(images))
            if self.folder.writable:
                self._copies.start(rows, packed)
                self._write_arrived()
            logits = self.layout.unpack(packed)
        if self._batch + 1 == len(self.batch_sampler):
            self.flush()
        return logits

    def _next_rows(self) -> np.ndarray:
        sampler = self.batch_sampler
        if self._pass == sampler.num_passes:
            self._batch += 1
        else:
            self.flush()
            self._pass, self._batch = sampler.num_passes, sampler.start_batch
            if self.folder.writable or self.folder.has_epoch(sampler.epoch):
                self._file = self.folder.open_epoch(sampler.epoch)
        return self.folder.rows(sampler, self._batch)

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        buffer = self._copies.buffer((len(rows), self.layout.row_bytes))
        self._file.read(rows, buffer.numpy())
        if self._batch + 1 < len(self.batch_sampler):
            self._file.prefetch(self.folder.rows(self.batch_sampler, self._batch + 1))
        return self._copies.to_device(buffer)

    def _write_arrived(self, wait: bool = False) -> None:
        for rows, data in self._copies.arrived(wait):
            self._file.write(rows, data)

    def flush(self) -> None:
        """Write the rows that are on their way and bring the epoch's file to the disk."""
        if self._file is not None:
            self._write_arrived(wait=True)
            file, self._file = self._file, None
            file.close()

    def close(self) -> None:
        """Write the rows that are on their way and give up the folder, its lock included."""
        self.flush()
        self.folder.close()

    def __enter__(self) -> 'CachedTeacher':
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            # After an error of the device, waiting for a copy would raise a second one in its place.
            self._copies = HostCopies(self.device)
        self.close()


class HostCopies:
    """Copies of rows between host and device, none of which the host waits for while the device has work.

    A copy that is not waited for needs pinned memory on the host: from pageable memory torch copies as if it had been
    told to wait. torch's allocator of pinned memory gives a buffer out again only when the copies that were queued with
    it are done, so that a buffer may be let go at once. What a copy brings to the host is there when the event
    recorded behind it has passed. All copies are queued on the stream on which their tensors are made and used: no
    tensor crosses streams, and `record_stream` is not called for.

    Args:
        device: The device; where it is not CUDA every copy is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: deque[tuple[torch.cuda.Event | None, np.ndarray, torch.Tensor]] = deque()

    def buffer(self, shape: tuple[int, int]) -> torch.Tensor:
        """Return memory of the host that the device can copy from or to, uint8."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == 'cuda')

    def to_device(self, buffer: torch.Tensor) -> torch.Tensor:
        """Queue the copy of a buffer to the device."""
        return buffer.to(self.device, non_blocking=self.device.type == 'cuda')

    def start(self, rows: np.ndarray, data: torch.Tensor) -> None:
        """Queue the copy of rows `[B]`, `data` `[B, row_bytes]` uint8, to the host."""
        if data.device.type != 'cuda':
            self._pending.append((None, rows, data.cpu()))
            return
        buffer = self.buffer(data.shape)
        buffer.copy_(data, non_blocking=True)
        self._pending.append((torch.cuda.current_stream(data.device).record_event(), rows, buffer))

    def arrived(self, wait: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows and their data in the order they were started, as far as they have arrived.

        Args:
            wait: Wait for those on their way; else only for those before the last two.
        """
        while self._pending:
            event, rows, data = self._pending[0]
            if event is not None:
                if not (wait or len(self._pending) > _MAX_PENDING or event.query()):
                    return
                event.synchronize()
            self._pending.popleft()
            yield rows, data.numpy()
