"""What each rank of a run has for itself: gathered for checkpoints, which rank 0 writes, and given back.

With it, a run of two ranks on the CPU that is resumed ends bit for bit as the uninterrupted one. Of three and more, the
update after a resume may differ by rounding: DDP lays its gradient buckets out anew after its first backward, and the
order of a sum of three follows the layout.
"""
import logging
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from .meters import StepTotals
from .random_state import get_random_state, set_random_state

_logger = logging.getLogger(__name__)


def gather_rank_states(task: TrainingTask, totals: StepTotals, distributed: bool) -> list[dict[str, Any]]:
    """Returns what each rank has for itself, in rank order; every rank must call it.

    Each entry has `random` (the random streams), `totals` (the sums of the epoch so far) and `buffers`: those of the
    model and of its EMA that are not the same on all ranks. Batch norm's running statistics follow a rank's own images
    until `--dist-bn` evens them out, for the EMA not before it is validated; an EMA that took up rank 0's alone would
    be another one from there on.
    """
    if not distributed:
        return [{'random': get_random_state(), 'totals': totals.state_dict(), 'buffers': {}}]
    buffers = {name: buffer.cpu() for name, buffer in _buffers(task).items()}
    state = {'random': get_random_state(), 'totals': totals.state_dict(), 'buffers': buffers}
    states = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    for name, buffer in buffers.items():
        if all(torch.equal(other['buffers'][name], buffer) for other in states):
            for other in states:
                del other['buffers'][name]
    return states


def restore_rank_state(task: TrainingTask, states: list[dict[str, Any]], rank: int, world_size: int) -> None:
    """Gives a rank its random streams and its buffers back.

    Where the number of ranks is another one, a rank keeps the checkpoint's buffers, which are rank 0's, and a rank that
    was not there before keeps the random streams that `--seed` gave it.
    """
    if states and len(states) != world_size:
        _logger.warning(
            f'--resume: the checkpoint is of {len(states)} processes, this run has {world_size}: it goes on from the '
            'same place, but not as the same run would.')
    elif states:
        buffers = _buffers(task)
        for name, value in states[rank]['buffers'].items():
            if name in buffers:  # an EMA may have been left out since
                buffers[name].copy_(value)
    if rank < len(states):
        set_random_state(states[rank]['random'])


def restored_totals(states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Returns the sums that a rank goes on with: its own, or an even share where the number of ranks is another one."""
    totals = [state['totals'] for state in states]
    if len(totals) == world_size:
        return totals[rank]
    sums = zip(*(each['sums'] for each in totals), strict=True)
    return {
        'names': totals[0]['names'],
        'sums': [sum(parts) / world_size for parts in sums],
        'count': sum(each['count'] for each in totals) / world_size,
    }


def _buffers(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Returns the buffers that checkpoints hold, of the model and of its EMA."""
    found = {}
    for part, ema in (('model', False), ('ema', True)):
        module = task.get_trainable_module(ema=ema)
        if module is not None:
            saved = unwrap_model(module).state_dict()
            for name, buffer in unwrap_model(module).named_buffers():
                if name in saved:
                    found[f'{part}.{name}'] = buffer
    return found
