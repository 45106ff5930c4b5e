"""The training script: one run, top to bottom."""
import argparse
import logging
import os
import sys
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from timm.utils import random_seed
from torch.utils.data import DataLoader, IterableDataset

from .build import (
    count_epochs,
    create_loss_scaler,
    create_optimizer,
    create_run_teacher,
    create_scheduler,
    create_task,
    loop_settings,
    model_dtype,
    step_settings,
)
from .cache import open_cached_teacher
from .cli import parse_args, resolve_kd
from .cli.messages import in_flags
from .data import class_names, create_eval_loader
from .engine import evaluate_teacher
from .errors import UsageError
from .files import FolderLock, write_atomically
from .hub import check_access, push_run
from .logs import RunLog, setup_logging
from .loop import Loop, print_results
from .process import ending, preserved_random_state, setup_process
from .run.checkpoint import AtomicSaver
from .run.record import RunRecord, Summary
from .run.resume import find_start, resume
from .setup import create_data, create_student, eval_loader_kwargs, settled

_logger = logging.getLogger('train')


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line says; `train-kd --help` lists the flags.

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
    """Builds everything that the flags name, trains, and prints the results."""
    _check_output(args)
    process = setup_process(args.device, args.device_modules)
    device, primary = process.device, process.primary
    if args.push_to_hub and primary:
        try:
            check_access(args.push_to_hub, private=args.hub_private, revision=args.hub_revision)
        except UsageError as error:
            raise UsageError(f'--push-to-hub {error}') from None
    dtype = model_dtype(args)
    random_seed(args.seed, process.rank)

    student = create_student(args, process, dtype)
    args, data_config = settled(args, student, process), student.data_config
    kd = resolve_kd(args)
    data, eval_loader = create_data(args, data_config, process, dtype)
    _check_tta(args, eval_loader, process.world_size)
    optimizer = create_optimizer(args, student.model, data.reference_batch_size, process.world_size)
    loss_scaler = create_loss_scaler(args, device)
    output_dir = _output_dir(args, data_config) if primary else None
    if primary and os.path.isdir(output_dir):
        _lock(output_dir, lock)
    start = find_start(
        args.resume, output_dir, process, replayable=args.replayable_data, start_epoch=args.start_epoch)
    if start.path is not None and args.sched == 'plateau':
        _logger.warning('--sched plateau: timm saves no state of it, so this is no exact continuation.')
    if args.teacher_cache:
        epochs = range(start.epoch, count_epochs(args, len(data.loader)))
        teacher = open_cached_teacher(args, args_text, kd, data_config, data, eval_loader, process, dtype, epochs)
    else:
        teacher = create_run_teacher(args, kd, data_config, process)
    task = create_task(args, kd, student.model, teacher, optimizer, data.mixup_active, process, dtype)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )

    if start.path is not None:
        keep = not args.no_resume_opt
        resume(task, start.path, optimizer if keep else None, loss_scaler if keep else None)
    lr_scheduler, num_epochs = create_scheduler(args, optimizer, len(data.loader), start.epoch)
    warmup = '(warmup_epochs + epochs + cooldown_epochs). Warmup added to total when warmup_prefix=True' \
        if args.warmup_prefix else '(epochs + cooldown_epochs). Warmup within epochs when warmup_prefix=False'
    _logger.info(
        f'Scheduled epochs: {num_epochs} {warmup}. '
        f'LR stepped per {"update" if args.sched_on_updates else "epoch"}.')
    eval_metric = args.eval_metric if eval_loader is not None else 'loss'
    if primary:
        # Made here, when nothing is wrong with the command line as far as can be known.
        _make_folder(output_dir)
        _lock(output_dir, lock)
    loop = Loop(
        task=task,
        optimizer=optimizer,
        data=data,
        eval_loader=eval_loader,
        steps=step_settings(args, device, dtype, data.reference_batch_size),
        settings=loop_settings(args, start.epoch, num_epochs, eval_metric),
        process=process,
        log=_create_log(args, output_dir, process.world_size),
        run_id=start.run_id,
        loss_scaler=loss_scaler,
        lr_scheduler=lr_scheduler,
        history=list(start.state.get('history', [])) if start.in_place else [],
    )
    if primary:
        loop.saver = _create_saver(args, loop, output_dir)
        loop.summary = Summary(Path(output_dir, 'summary.csv'), start.epoch if start.in_place else 0)
        if start.in_place:
            loop.saver.continue_from(start.path)
    record = RunRecord(
        start.run_id,
        argv,
        dict(
            model=args.model,
            parameters=sum(p.numel() for p in student.model.parameters()),
            num_classes=student.model.num_classes,
            data_config={**data_config, 'input_size': list(data_config['input_size'])},
            class_names=class_names(data.dataset),
            pretrained_source=_pretrained_source(args),
        ),
        task,
        kd,
        eval_metric,
    )
    if start.epoch >= num_epochs:
        _logger.info(f'All {num_epochs} epochs are done: nothing to train.')
        if primary:
            record.read(output_dir)
            _report(loop, record)
        return

    if primary:
        write_atomically(Path(output_dir, 'args.yaml'), args_text)
        record.write(output_dir)
    if teacher is not None and not args.no_teacher_eval and eval_loader is not None:
        metrics, predictions = _evaluate_teacher(args, data_config, loop)
        record.set_teacher_metrics(metrics)
        # The order of a stream is not certain to be the same in each epoch.
        loop.teacher_predictions = None if isinstance(eval_loader.dataset, IterableDataset) else predictions
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if process.distributed:
        task.prepare_distributed(
            device_ids=None if device.type == 'cpu' else [device],
            **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}),
        )
    if args.start_epoch is None and not args.no_resume_opt:
        loop.restore(start.state, start.same_epoch)
    with teacher if args.teacher_cache else nullcontext():
        loop.run()
    if primary:
        record.set_best(loop.saver.best_epoch, loop.saver.best_metric)
        record.write(output_dir)
        _report(loop, record)
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


def _check_tta(args: argparse.Namespace, eval_loader: DataLoader | None, world_size: int) -> None:
    """timm averages the outputs of neighbours, and cannot where the last batch leaves some over."""
    if not args.tta or eval_loader is None or isinstance(eval_loader.dataset, IterableDataset):
        return
    num_images = -(-len(eval_loader.dataset) // world_size)
    if num_images % args.tta:
        raise UsageError(
            f'--tta {args.tta}: the {num_images} images of --val-split {args.val_split} are no multiple of it, take '
            'another number or leave it out.'
        )


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


def _create_saver(args: argparse.Namespace, loop: Loop, output_dir: str) -> AtomicSaver:
    return AtomicSaver(
        model=loop.task.get_trainable_module(),
        optimizer=loop.optimizer,
        args=args,
        amp_scaler=loop.loss_scaler,
        checkpoint_dir=output_dir,
        recovery_dir=output_dir,
        decreasing=loop.settings.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=loop.task,
    )


def _evaluate_teacher(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        loop: Loop,
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Evaluates the teacher by a loader of its own, which changes no draw of the training."""
    def evaluate() -> tuple[list[dict[str, float]], torch.Tensor]:
        with preserved_random_state():
            options = eval_loader_kwargs(args, data_config, loop.process, loop.steps.dtype)
            loader = create_eval_loader(loop.eval_loader.dataset, **options, persistent_workers=False)
            return evaluate_teacher(
                loop.task.teacher.members, loader, loop.steps, tta=args.tta, distributed=loop.process.distributed,
            )

    if not args.teacher_cache:
        return evaluate()
    return loop.task.teacher.validation(loop.eval_loader, loop.process.gather, evaluate, tta=args.tta)


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


def _report(loop: Loop, record: RunRecord) -> None:
    """Names the best epoch and prints the `--result` block."""
    saver, teacher = loop.saver, record.content['teacher']
    if saver.best_metric is not None:
        _logger.info(f'*** Best metric: {saver.best_metric} (epoch {saver.best_epoch})')
    print_results(loop.history, saver.best_epoch, **({'teacher': teacher} if teacher else {}))


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
