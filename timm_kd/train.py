"""The training script: one run, top to bottom."""
import argparse
import json
import logging
import os
import shlex
import sys
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import NativeScaler
from torch.utils.data import IterableDataset

from .cli import parse_args
from .cli.messages import in_flags
from .data import class_names
from .errors import UsageError
from .files import FolderLock, print_out, write_atomically
from .hub import check_access, push_run
from .loop import Loop
from .process import ending, setup_process
from .run.checkpoint import AtomicSaver
from .run.log import RunLog, setup_logging
from .run.record import Summary, write_record
from .run.resume import StartPoint, find_start, resume
from .setup import (
    Setup,
    count_epochs,
    create_loss_scaler,
    create_optimizer,
    create_scheduler,
    create_task,
    evaluate_run_teacher,
    open_teacher,
    set_up,
)
from .task import KDTask
from .teacher import Teacher, TeacherEnsemble
from .teacher_cache import CachedTeacher
from .version import __version__

_logger = logging.getLogger('train')


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; `train-kd --help` lists the flags.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: With an `ExitCode`, where the run did not come to its end.
    """
    argv = sys.argv[1:] if argv is None else argv
    setup_logging(in_flags)
    with ending('train-kd', speak=in_flags), FolderLock() as lock:
        args, args_text = parse_args(argv)
        run(args, args_text, argv, lock)


def run(args: argparse.Namespace, args_text: str, argv: list[str], lock: FolderLock) -> None:
    """Build everything that the flags name, train, and print the results."""
    _check_output(args)
    process = setup_process(args.device, args.device_modules)
    if args.push_to_hub and process.primary:
        _check_push(args)
    setup = set_up(args, args_text, process)
    args = setup.args
    loss_scaler = create_loss_scaler(setup)
    output_dir = _output_dir(args, setup.data_config) if process.primary else None
    if process.primary and os.path.isdir(output_dir):
        _take_folder(output_dir, lock)
    start = find_start(
        args.resume, output_dir, process, replayable=args.replayable_data, start_epoch=args.start_epoch)
    if start.path is not None and args.sched == 'plateau':
        _logger.warning('--sched plateau: timm saves no state of it, so this is no exact continuation.')
    teacher = open_teacher(setup, range(start.epoch, count_epochs(setup)) if args.teacher_cache else ())
    task = create_task(setup, teacher)
    optimizer = create_optimizer(setup, task)
    if start.path is not None:
        keep = not args.no_resume_opt
        resume(task, start.path, optimizer if keep else None, loss_scaler if keep else None)
    lr_scheduler, num_epochs = create_scheduler(setup, optimizer, start.epoch)
    _log_schedule(args, num_epochs)

    record = _record(setup, start, teacher, task, argv, num_epochs)
    saver = summary = None
    if process.primary:
        _take_folder(output_dir, lock)  # only now: whatever can be refused was refused above, and leaves no folder
        saver = _create_saver(setup, start, output_dir, task, optimizer, loss_scaler)
        summary = Summary(Path(output_dir, 'summary.csv'), start.epoch if start.in_place else 0)
    if start.epoch >= num_epochs:
        _logger.info(f'All {num_epochs} epochs are done: nothing to train.')
        if process.primary:
            _report(saver, start.history, start.record or record)
        return

    if process.primary:
        write_atomically(Path(output_dir, 'args.yaml'), args_text)
        write_record(output_dir, record)
    teacher_predictions = _evaluate_teacher(setup, teacher, record)
    _wrap(setup, task)

    def note_time(timing: dict[str, float]) -> None:
        record['timing'].append(timing)
        if process.primary:
            write_record(output_dir, record)

    loop = Loop(
        setup=setup,
        start=start,
        task=task,
        optimizer=optimizer,
        epochs=range(start.epoch, num_epochs),
        log=_create_log(args, output_dir, process.world_size),
        loss_scaler=loss_scaler,
        lr_scheduler=lr_scheduler,
        saver=saver,
        summary=summary,
        teacher_predictions=teacher_predictions,
        on_epoch=note_time,
    )
    if args.start_epoch is None and not args.no_resume_opt:
        loop.restore()
    with teacher if args.teacher_cache else nullcontext():
        history = loop.run()
    if process.primary:
        if saver.best_metric is not None:
            record['best'] = {'epoch': saver.best_epoch, 'metric': saver.best_metric}
        write_record(output_dir, record)
        _report(saver, history, record)
        if args.push_to_hub:
            _push(args, output_dir, loop.interrupted)


def _check_push(args: argparse.Namespace) -> None:
    try:
        check_access(args.push_to_hub, private=args.hub_private, revision=args.hub_revision)
    except UsageError as error:
        raise UsageError(f'--push-to-hub {error}') from None


def _push(args: argparse.Namespace, output_dir: str, interrupted: bool) -> None:
    if interrupted:
        _logger.warning(
            f'--push-to-hub {args.push_to_hub}: the run was interrupted, so it is not pushed; '
            f'python -m timm_kd.hub push {output_dir} {args.push_to_hub} pushes what there is.')
        return
    push_run(
        output_dir,
        args.push_to_hub,
        private=args.hub_private,
        revision=args.hub_revision,
        license=args.hub_license,
    )


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


def _take_folder(output_dir: str, lock: FolderLock) -> None:
    """Make the run's folder where there is none, and lock it against other runs."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        free = lock.acquire(output_dir)
    except OSError as error:
        raise UsageError(f'--experiment {os.path.basename(output_dir)}: {output_dir}: {error.strerror}.') from error
    if not free:
        raise UsageError(
            f'--experiment {os.path.basename(output_dir)}: another run is writing to {output_dir}: wait for its end or '
            'take another name.'
        )


def _create_saver(
        setup: Setup,
        start: StartPoint,
        output_dir: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: NativeScaler | None,
) -> AtomicSaver:
    """Create the saver of a run's checkpoints, which knows those that the run has in its folder already."""
    saver = AtomicSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        args=setup.args,
        amp_scaler=loss_scaler,
        checkpoint_dir=output_dir,
        recovery_dir=output_dir,
        decreasing=setup.eval_metric == 'loss',
        max_history=setup.args.checkpoint_hist,
        task=task,
    )
    if start.in_place:
        saver.continue_from(start.path)
    return saver


def _evaluate_teacher(
        setup: Setup,
        teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
        record: dict[str, Any],
) -> torch.Tensor | None:
    """Put the teacher's metrics into the record; return its classes `[N]`, to which those of the student compare."""
    args, loader = setup.args, setup.eval_loader
    if teacher is None or loader is None or args.no_teacher_eval:
        return None
    if setup.kd.loss == 'feature' and teacher.num_classes != args.num_classes:
        return None  # a teacher of features alone may know other classes
    metrics, predictions = evaluate_run_teacher(setup, teacher)
    for member, result in zip(record['teacher'], metrics, strict=True):
        member.update(top1=result['top1'], top5=result['top5'])
    # A stream is not certain to have the same order in each epoch.
    return None if isinstance(loader.dataset, IterableDataset) else predictions


def _wrap(setup: Setup, task: TrainingTask) -> None:
    """Compile the task and spread it over its processes, where it is to be."""
    args, process = setup.args, setup.process
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if process.distributed:
        task.prepare_distributed(
            device_ids=None if process.device.type == 'cpu' else [process.device],
            **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}),
        )


def _record(
        setup: Setup,
        start: StartPoint,
        teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
        task: TrainingTask,
        argv: list[str],
        num_epochs: int,
) -> dict[str, Any]:
    """Return what run.json says when a run starts; `best` and the teachers' metrics are filled in later."""
    args, student, kd = setup.args, setup.student, setup.kd
    return {
        'run_id': start.run_id,
        'timm_kd': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'command': shlex.join(['train-kd', *argv]),
        'student': {
            'model': args.model,
            'parameters': sum(p.numel() for p in student.parameters()),
            'num_classes': student.num_classes,
            'data_config': {**setup.data_config, 'input_size': list(setup.data_config['input_size'])},
            'class_names': class_names(setup.data.dataset),
            # Where its first weights came from.
            'pretrained_source':
                args.initial_checkpoint or args.pretrained_path or (args.model if args.pretrained else None),
        },
        'teacher': None if teacher is None else [
            {
                'source': member.source,
                'model': member.model_name,
                'parameters': member.num_params,
                'top1': None,
                'top5': None,
            }
            for member in teacher.members
        ],
        'loss': None if kd is None else {
            'name': kd.loss,
            'parameters':
                {name: getattr(task.kd_loss, name) for name in task.kd_loss.hyper_parameters()}
                if isinstance(task, KDTask) else {k: v for k, v in kd.loss_parameters.items() if v is not None},
            'task_loss_weight': kd.task_loss_weight,
            'distill_loss_weight': kd.distill_loss_weight,
            'warmup_epochs': kd.warmup_epochs,
        },
        'eval_metric': setup.eval_metric,
        'num_epochs': num_epochs,
        'best': None,
        'timing': start.timing,
    }


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


def _report(saver: AtomicSaver, history: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Name the best epoch and print the `--result` block, which ends stdout."""
    results = {'all': history}
    if record['teacher']:
        results['teacher'] = record['teacher']
    if saver.best_metric is not None:
        _logger.info(f'*** Best metric: {saver.best_metric} (epoch {saver.best_epoch})')
        best = [result for result in history if result['epoch'] == saver.best_epoch]
        if best:
            results['best'] = best[-1]  # an epoch that was trained again is ranked by its last result
    print_out(f'--result\n{json.dumps(results, indent=4)}')


if __name__ == '__main__':
    main()
