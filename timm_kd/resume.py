"""Where a run starts: at its beginning, or where `--resume` says that another one stopped."""
import argparse
import logging
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import find_resume_point, next_epoch, read_checkpoint, run_state_of
from .record import read_run_id

_logger = logging.getLogger('train')


@dataclass
class StartPoint:
    """Where a run starts.

    Args:
        run_id: Names the run, over all its interruptions.
        path: The checkpoint it continues from, or None.
        state: That checkpoint's run state; empty for one of timm's script.
        epoch: The first epoch to train.
        same_epoch: That epoch is half done.
        in_place: The run goes on in the checkpoint's own folder.
    """
    run_id: str
    path: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    same_epoch: bool = False
    in_place: bool = False


def find_start(args: argparse.Namespace, output_dir: str | None) -> StartPoint:
    """Reads where `--resume` says that another run stopped; `--start-epoch` overrides its epoch.

    Args:
        args: The run's flags.
        output_dir: The run's folder, on the primary rank.

    Raises:
        UsageError: If the checkpoint cannot be read.
    """
    point = _locate(args, output_dir)
    if point.path is not None:
        checkpoint = read_checkpoint(point.path)
        point.state = run_state_of(checkpoint)
        point.epoch = next_epoch(checkpoint)
        if 'batch' in point.state and (args.replayable_data or point.state['epoch_trained']):
            point.epoch, point.same_epoch = checkpoint['epoch'], True
        elif 'batch' in point.state:
            _logger.warning(
                f'--resume {point.path} stands inside epoch {checkpoint["epoch"]}, and without --replayable-data the '
                'rest of its batches is unknown: as in timm, training goes on with the next epoch.')
        if args.sched == 'plateau':
            _logger.warning('--sched plateau: timm saves no state of it, so this is no exact continuation.')
    if args.start_epoch is not None:
        point.epoch, point.same_epoch = args.start_epoch, False
    return point


def _locate(args: argparse.Namespace, output_dir: str | None) -> StartPoint:
    """Finds the checkpoint that `--resume` means, the same on all ranks."""
    point = StartPoint(uuid.uuid4().hex, args.resume or None)
    if args.rank == 0:
        known_id = read_run_id(output_dir)
        if args.resume == 'auto':
            path = find_resume_point(output_dir, known_id, args.replayable_data)
            point.path = None if path is None else str(path)
            _logger.info(f'--resume auto: {"a fresh run" if path is None else f"going on from {path}"}.')
        if point.path is not None:
            point.in_place = Path(point.path).resolve().parent == Path(output_dir).resolve()
            point.run_id = known_id if point.in_place and known_id else point.run_id
    if args.distributed:
        choice = [point]
        torch.distributed.broadcast_object_list(choice, src=0)
        point = choice[0]
    return point
