"""Where a run starts, and all that a run takes up from the checkpoint of another one.

A resumed run of one or two processes on the CPU ends bit for bit as the uninterrupted one. In a run of three and more,
the first update after a resume may differ by rounding: DDP changes the layout of its gradient buckets after its first
backward, and the order in which three gradients are summed follows the layout.
"""
import logging
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import unwrap_model

from ..errors import UsageError, shortened
from ..files import load_file
from ..meters import StepTotals
from ..process import Process, get_random_state, set_random_state
from .checkpoint import find_recoveries
from .record import read_record

_logger = logging.getLogger('train')


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    Args:
        run_id: Names the run, over all its interruptions.
        path: The checkpoint that it continues from, or None.
        state: The run state of that checkpoint; empty for a checkpoint of timm's script.
        epoch: The first epoch to train.
        same_epoch: Whether the checkpoint stands inside that epoch.
        in_place: Whether the run goes on in the checkpoint's own folder.
        record: What run.json said of the run so far; None for a run that starts.
    """
    run_id: str
    path: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    same_epoch: bool = False
    in_place: bool = False
    record: dict[str, Any] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The results of the epochs that the run has done."""
        return list(self.state.get('history', [])) if self.in_place else []

    @property
    def timing(self) -> list[dict[str, float]]:
        """What the record says of the time that the epochs before the first one to train took."""
        return [epoch for epoch in (self.record or {}).get('timing', []) if epoch['epoch'] < self.epoch]


def find_start(
        source: str,
        output_dir: str | None,
        process: Process,
        *,
        replayable: bool = False,
        start_epoch: int | None = None,
) -> StartPoint:
    """Find where a run starts: at its beginning, or where another run stopped.

    Args:
        source: The checkpoint to continue from, as `--resume` names it: a path, 'auto' or ''.
        output_dir: The run's folder, in the primary process.
        process: The process; all of a group start at the same place.
        replayable: Whether the data of an epoch can be taken up in its middle.
        start_epoch: The epoch to start with, whatever the checkpoint says.

    Raises:
        UsageError: If the checkpoint cannot be read.
    """
    place = process.gather(_locate(source, output_dir, replayable) if process.primary else None)[0]
    state, epoch, same_epoch = {}, 0, False
    if path := place['path']:
        checkpoint = read_checkpoint(path)
        state, epoch = run_state_of(checkpoint), next_epoch(checkpoint)
        if 'batch' in state and (replayable or state['epoch_trained']):
            epoch, same_epoch = checkpoint['epoch'], True
        elif 'batch' in state:
            _logger.warning(
                f'--resume {path} stands inside epoch {checkpoint["epoch"]}, and without --replayable-data the rest of '
                'its batches is unknown: as in timm, training goes on with the next epoch.')
    if start_epoch is not None:
        epoch, same_epoch = start_epoch, False
    return StartPoint(state=state, epoch=epoch, same_epoch=same_epoch, **place)


def _locate(source: str, output_dir: str, replayable: bool) -> dict[str, Any]:
    """Return the fields of a `StartPoint` that follow from what lies in the run's folder."""
    record = read_record(output_dir)
    known_id = None if record is None else record['run_id']
    path = source or None
    if source == 'auto':
        found = find_resume_point(output_dir, known_id, replayable)
        path = None if found is None else str(found)
        _logger.info(f'--resume auto: {"a fresh run" if path is None else f"going on from {path}"}.')
    in_place = path is not None and Path(path).resolve().parent == Path(output_dir).resolve()
    run_id = known_id if in_place and known_id else uuid.uuid4().hex
    return {'run_id': run_id, 'path': path, 'in_place': in_place, 'record': record if in_place else None}


def read_checkpoint(path: str | Path, flag: str = '--resume') -> dict[str, Any]:
    """Read a training checkpoint without running code that may be in it; tensors stay on disk until they are used.

    Raises:
        UsageError: If there is no such file, or it is truncated, no checkpoint, or would run code.
    """
    checkpoint = load_file(path, f'{flag} {path}', mmap=True)
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{flag} {path}: holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint


def run_state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the run state that `AtomicSaver` put into a checkpoint; empty for a checkpoint of timm's script."""
    return (checkpoint.get('saver') or {}).get('run_state') or {}


def find_resume_point(folder: str | Path, run_id: str | None, replayable: bool) -> Path | None:
    """Find the checkpoint of a folder that stands furthest in its run: `last.pth.tar` or the newest recovery file.

    Args:
        folder: The experiment's folder.
        run_id: The run that the folder belongs to; files of another run are passed over with a warning. None when
            timm's script wrote the folder.
        replayable: Whether the data of an epoch can be taken up in its middle. Where it cannot, only a recovery file
            counts that was written when its epoch's training was complete.
    """
    def furthest(paths: list[Path]) -> tuple[Path | None, int]:
        for path in reversed(paths):
            checkpoint = read_checkpoint(path, '--resume auto:')
            state = run_state_of(checkpoint)
            if run_id and state.get('run_id') != run_id:
                _logger.warning(f'--resume auto: {path} is of another run in the same folder; passed over.')
            elif 'batch' not in state or replayable or state['epoch_trained']:
                return path, checkpoint['epoch']
        return None, -1

    last, last_epoch = furthest([path for path in [Path(folder, 'last.pth.tar')] if path.exists()])
    recovery, recovery_epoch = furthest(find_recoveries(folder))
    return recovery if recovery_epoch > last_epoch else last


def next_epoch(checkpoint: dict[str, Any]) -> int:
    """Return the epoch that follows a checkpoint of this script or of timm's; 0 when it holds weights alone."""
    # timm's first format counted the epoch up before saving.
    return checkpoint['epoch'] + (checkpoint.get('version', 0) > 1) if 'epoch' in checkpoint else 0


def resume(
        task: TrainingTask,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        loss_scaler: Any = None,
) -> None:
    """Load a checkpoint of this script or of timm's into the task, its EMA, the optimizer and the loss scaler.

    Raises:
        UsageError: If the checkpoint does not fit the model.
    """
    try:
        resume_task_checkpoint(task, str(path), optimizer, loss_scaler)
        if task.has_ema():
            load_task_ema_checkpoint(task, str(path))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f'--resume {path}: does not fit --model and --opt ({shortened(error)}).') from error


def ema_random_state(task: TrainingTask) -> torch.Tensor | None:
    """Return the state of the EMA's private generator (timm rounds a bfloat16 EMA stochastically), if there is one."""
    ema = task.get_trainable_module(ema=True)
    return ema._sr_generator.get_state() if hasattr(ema, '_sr_generator') else None


def set_ema_random_state(task: TrainingTask, state: torch.Tensor | None) -> None:
    """Set what `ema_random_state` returned, where the EMA is on the same kind of device as it was."""
    ema = task.get_trainable_module(ema=True)
    if state is None or not hasattr(ema, '_sr_generator'):
        return
    if state.shape != ema._sr_generator.get_state().shape:  # a GPU's is 16 bytes, a CPU's 5,056
        _logger.warning(
            '--resume: the EMA was on another kind of device: its stochastic rounding goes on with other draws than '
            'the interrupted run would have made.')
        return
    ema._sr_generator.set_state(state)


def rank_state(task: TrainingTask, totals: StepTotals, process: Process) -> dict[str, Any]:
    """Return what a process has for itself at this moment.

    `random` are its random streams, `totals` the sums of the epoch so far, and `buffers`, in a group, copies of the
    buffers of the model and of its EMA. Batch norm's running statistics differ between processes, each of which has
    seen its own images, until `--dist-bn` makes them the same: those of the model after the training of each epoch,
    those of the EMA when it is validated.
    """
    buffers = {name: buffer.clone() for name, buffer in _buffers(task).items()} if process.distributed else {}
    return {'random': get_random_state(), 'totals': totals.state_dict(), 'buffers': buffers}


def gather_rank_states(state: dict[str, Any], process: Process) -> list[dict[str, Any]]:
    """Return the `rank_state` of all processes in the order of their ranks, without buffers that are the same in all.

    All processes must call it.
    """
    buffers = {name: buffer.cpu() for name, buffer in state['buffers'].items()}
    states = process.gather(dict(state, buffers=buffers))
    for name, buffer in buffers.items():
        if all(torch.equal(other['buffers'][name], buffer) for other in states):
            for other in states:
                del other['buffers'][name]
    return states


def restore_rank_state(task: TrainingTask, states: list[dict[str, Any]], process: Process) -> None:
    """Give a process its random streams and its buffers back.

    When the number of processes has changed, all of them keep the buffers of the checkpoint itself, which are those of
    rank 0, and a rank that the checkpoint does not know keeps the random streams that `--seed` gave it.
    """
    if states and len(states) != process.world_size:
        _logger.warning(
            f'--resume: the checkpoint is of {len(states)} processes, this run has {process.world_size}: it goes on '
            'from the same place, but not as the same run would.')
    elif states:
        buffers = _buffers(task)
        for name, value in states[process.rank]['buffers'].items():
            if name in buffers:  # an EMA may have been left out since
                buffers[name].copy_(value)
    if process.rank < len(states):
        set_random_state(states[process.rank]['random'])


def restored_totals(states: list[dict[str, Any]], process: Process) -> dict[str, Any]:
    """Return the process's own sums of the epoch; an even share of all when the number of processes has changed."""
    totals = [state['totals'] for state in states]
    if len(totals) == process.world_size:
        return totals[process.rank]
    sums = zip(*(each['sums'] for each in totals), strict=True)
    return {
        'names': totals[0]['names'],
        'sums': [sum(parts) / process.world_size for parts in sums],
        'count': sum(each['count'] for each in totals) / process.world_size,
    }


def _buffers(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Return the buffers that checkpoints hold, of the model and of its EMA."""
    found = {}
    for part, ema in (('model', False), ('ema', True)):
        module = task.get_trainable_module(ema=ema)
        if module is not None:
            saved = unwrap_model(module).state_dict()
            for name, buffer in unwrap_model(module).named_buffers():
                if name in saved:
                    found[f'{part}.{name}'] = buffer
    return found
