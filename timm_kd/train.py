"""The training script: one run, top to bottom."""
import argparse
import logging
import os
import sys
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import NativeScaler
from torch.utils.data import IterableDataset

from .cli import parse_args
from .cli.messages import in_flags
from .data import class_names
from .errors import UsageError
from .files import FolderLock, write_atomically
from .hub import check_access, push_run
from .logs import RunLog, setup_logging
from .loop import Loop, print_results
from .process import ending, setup_process
from .run.checkpoint import AtomicSaver
from .run.record import Summary, read_record, read_timing, run_record, write_record
from .run.resume import find_start, resume
from .setup import (
    create_loss_scaler,
    create_optimizer,
    create_scheduler,
    create_task,
    evaluate_run_teacher,
    loop_settings,
    open_teacher,
    set_up,
)

_logger = logging.getLogger('train')


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; `train-kd --help` lists the flags.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: With an `ExitCode`, where the run did not come to its end.
    """
    argv = sys.argv[1:] if argv is None else argv
    setup_logging(primary=int(os.environ.get('RANK', 0)) == 0)
    with ending('train-kd', speak=in_flags), FolderLock() as lock:
        args, args_text = parse_args(argv)
        run(args, args_text, argv, lock)


def run(args: argparse.Namespace, args_text: str, argv: list[str], lock: FolderLock) -> None:
    """Build everything that the flags name, train, and print the results."""
    _check_output(args)
    process = setup_process(args.device, args.device_modules)
    if args.push_to_hub and process.primary:
        try:
            check_access(args.push_to_hub, private=args.hub_private, revision=args.hub_revision)
        except UsageError as error:
            raise UsageError(f'--push-to-hub {error}') from None
    setup = set_up(args, args_text, process)
    args = setup.args
    optimizer = create_optimizer(setup)
    loss_scaler = create_loss_scaler(setup)
    output_dir = _output_dir(args, setup.data_config) if process.primary else None
    if process.primary and os.path.isdir(output_dir):
        _lock(output_dir, lock)
    start = find_start(
        args.resume, output_dir, process, replayable=args.replayable_data, start_epoch=args.start_epoch)
    if start.path is not None and args.sched == 'plateau':
        _logger.warning('--sched plateau: timm saves no state of it, so this is no exact continuation.')
    teacher = open_teacher(setup, start.epoch)
    task = create_task(setup, teacher, optimizer)
    if start.path is not None:
        keep = not args.no_resume_opt
        resume(task, start.path, optimizer if keep else None, loss_scaler if keep else None)
    lr_scheduler, num_epochs = create_scheduler(setup, optimizer, start.epoch)
    _log_schedule(args, num_epochs)

    eval_metric = args.eval_metric if setup.eval_loader is not None else 'loss'
    record = run_record(
        start.run_id,
        argv,
        dict(
            model=args.model,
            parameters=sum(p.numel() for p in setup.student.parameters()),
            num_classes=setup.student.num_classes,
            data_config={**setup.data_config, 'input_size': list(setup.data_config['input_size'])},
            class_names=class_names(setup.data.dataset),
            pretrained_source=_pretrained_source(args),
        ),
        task,
        setup.kd,
        eval_metric,
        num_epochs,
        read_timing(output_dir, start.epoch) if process.primary and start.in_place else (),
    )
    saver = summary = None
    if process.primary:
        _make_folder(output_dir)  # only now: whatever can be refused was refused above, and leaves no folder
        _lock(output_dir, lock)
        saver = _create_saver(args, task, optimizer, loss_scaler, output_dir, eval_metric)
        if start.in_place:
            saver.continue_from(start.path)
        summary = Summary(Path(output_dir, 'summary.csv'), start.epoch if start.in_place else 0)
    history = list(start.state.get('history', [])) if start.in_place else []
    if start.epoch >= num_epochs:
        _logger.info(f'All {num_epochs} epochs are done: nothing to train.')
        if process.primary:
            _report(saver, history, read_record(output_dir) or record)
        return

    if process.primary:
        write_atomically(Path(output_dir, 'args.yaml'), args_text)
        write_record(output_dir, record)
    teacher_predictions = None
    if teacher is not None and not args.no_teacher_eval and setup.eval_loader is not None:
        metrics, predictions = evaluate_run_teacher(setup, teacher)
        for member, result in zip(record['teacher'], metrics, strict=True):
            member.update(top1=result['top1'], top5=result['top5'])
        # A stream is not certain to have the same order in each epoch.
        teacher_predictions = None if isinstance(setup.eval_loader.dataset, IterableDataset) else predictions
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if process.distributed:
        task.prepare_distributed(
            device_ids=None if process.device.type == 'cpu' else [process.device],
            **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}),
        )
    loop = Loop(
        task=task,
        optimizer=optimizer,
        data=setup.data,
        eval_loader=setup.eval_loader,
        steps=setup.steps,
        settings=loop_settings(setup, start.epoch, num_epochs, eval_metric),
        process=process,
        log=_create_log(args, output_dir, process.world_size),
        run_id=start.run_id,
        loss_scaler=loss_scaler,
        lr_scheduler=lr_scheduler,
        saver=saver,
        summary=summary,
        teacher_predictions=teacher_predictions,
        history=history,
        on_epoch=partial(_record_epoch, record, output_dir),
    )
    if args.start_epoch is None and not args.no_resume_opt:
        loop.restore(start.state, start.same_epoch)
    with teacher if args.teacher_cache else nullcontext():
        loop.run()
    if process.primary:
        if saver.best_metric is not None:
            record['best'] = {'epoch': saver.best_epoch, 'metric': saver.best_metric}
        write_record(output_dir, record)
        _report(saver, history, record)
        if args.push_to_hub and loop.interrupted:
            _logger.warning(
                f'--push-to-hub {args.push_to_hub}: the run was interrupted, so it is not pushed; '
                f'python -m timm_kd.hub push {output_dir} {args.push_to_hub} pushes what there is.')
        else:
            _push(args, output_dir)


def _output_dir(args: argparse.Namespace, data_config: dict[str, Any]) -> str:
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        safe_model_name(args.model),
        str(data_config['input_size'][-1]),
    ])
    return os.path.join(args.output or './output/train', name)


def _check_output(args: argparse.Namespace) -> None:
    output = args.output or './output/train'
    existing = os.path.abspath(output)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UsageError(f'--output {output}: {existing} is no folder.')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f'--output {output}: {existing} cannot be written to.')


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UsageError(f'--output {os.path.dirname(path)}: {error}') from error


def _lock(output_dir: str, lock: FolderLock) -> None:
    try:
        free = lock.acquire(output_dir)
    except OSError as error:
        raise UsageError(f'--experiment {os.path.basename(output_dir)}: {output_dir}: {error.strerror}.') from error
    if not free:
        raise UsageError(
            f'--experiment {os.path.basename(output_dir)}: another run is writing to {output_dir}: wait for its end or '
            'take another name.'
        )


def _create_saver(
        args: argparse.Namespace,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: NativeScaler | None,
        output_dir: str,
        eval_metric: str,
) -> AtomicSaver:
    return AtomicSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        args=args,
        amp_scaler=loss_scaler,
        checkpoint_dir=output_dir,
        recovery_dir=output_dir,
        decreasing=eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=task,
    )


def _record_epoch(
        record: dict[str, Any],
        output_dir: str | None,
        epoch: int,
        seconds: float,
        train_seconds: float,
        images: int,
) -> None:
    """Note the seconds of an epoch, those of its training alone, and how many images that was on."""
    timing = {'epoch': epoch, 'seconds': round(seconds, 3), 'train_seconds': round(train_seconds, 3), 'images': images}
    record['timing'].append(timing)
    if output_dir is not None:
        write_record(output_dir, record)


def _log_schedule(args: argparse.Namespace, num_epochs: int) -> None:
    warmup = '(warmup_epochs + epochs + cooldown_epochs). Warmup added to total when warmup_prefix=True' \
        if args.warmup_prefix else '(epochs + cooldown_epochs). Warmup within epochs when warmup_prefix=False'
    _logger.info(
        f'Scheduled epochs: {num_epochs} {warmup}. LR stepped per {"update" if args.sched_on_updates else "epoch"}.')


def _create_log(args: argparse.Namespace, output_dir: str | None, world_size: int) -> RunLog:
    wandb_options = None
    if args.log_wandb and output_dir is not None:
        wandb_options = dict(
            project=args.wandb_project,
            name=os.path.basename(output_dir),
            config=vars(args),
            tags=args.wandb_tags,
            resume='must' if args.wandb_resume_id else None,
            id=args.wandb_resume_id or None,
        )
    return RunLog(
        output_dir,
        args.log_interval,
        world_size,
        save_images=args.save_images,
        tensorboard=args.log_tensorboard,
        wandb_options=wandb_options,
    )


def _pretrained_source(args: argparse.Namespace) -> str | None:
    if args.initial_checkpoint or args.pretrained_path:
        return args.initial_checkpoint or args.pretrained_path
    return args.model if args.pretrained else None


def _report(saver: AtomicSaver, history: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Name the best epoch and print the `--result` block."""
    if saver.best_metric is not None:
        _logger.info(f'*** Best metric: {saver.best_metric} (epoch {saver.best_epoch})')
    print_results(history, saver.best_epoch, **({'teacher': record['teacher']} if record['teacher'] else {}))


def _push(args: argparse.Namespace, output_dir: str) -> None:
    if args.push_to_hub:
        push_run(
            output_dir,
            args.push_to_hub,
            private=args.hub_private,
            revision=args.hub_revision,
            license=args.hub_license,
        )


if __name__ == '__main__':
    main()
