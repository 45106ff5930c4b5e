"""The training script: one run, top to bottom."""
import argparse
import logging
import os
import sys
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import get_outdir, random_seed

from .build import (
    create_optimizer,
    create_run_teacher,
    create_scheduler,
    create_task,
    loop_settings,
    step_settings,
)
from .checkpoint import (
    AtomicSaver,
    CheckpointWriteError,
    find_resume_point,
    read_checkpoint,
    resume,
    run_state_of,
    write_atomically,
)
from .cli import parse_args, resolve_kd
from .data import class_names, create_eval_loader, create_train_data
from .engine import evaluate_teacher
from .errors import UsageError
from .hub import PushError, check_access, push_run
from .logs import RunLog, setup_logging
from .loop import Loop, print_results
from .meters import NonFiniteLoss
from .random_state import preserved_random_state
from .record import RunRecord, read_run_id
from .runtime import EXIT_SIGTERM, Terminated, create_loss_scaler, model_dtype, setup_device
from .student import check_returns_logits, create_student
from .summary import Summary
from .teacher_cache.setup import open_cached_teacher

_logger = logging.getLogger('train')

EXIT_FAILURE, EXIT_USAGE, EXIT_NON_FINITE, EXIT_NOT_PUSHED = 1, 2, 3, 4


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line says; `train-kd --help` lists the flags.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: 2 for a usage error, 3 for a non-finite loss, 4 when the trained student could not be pushed,
            143 after SIGTERM, with a recovery checkpoint on disk.
    """
    argv = sys.argv[1:] if argv is None else argv
    setup_logging(primary=int(os.environ.get('RANK', 0)) == 0)
    args, args_text = parse_args(argv)
    try:
        run(args, args_text, argv)
    except UsageError as error:
        _exit(EXIT_USAGE, str(error))
    except NonFiniteLoss as error:
        _exit(EXIT_NON_FINITE, f'{error}. Nothing was saved after it: lower --lr, set --clip-grad, or use bfloat16.')
    except PushError as error:
        _exit(EXIT_NOT_PUSHED, str(error))
    except CheckpointWriteError as error:
        _exit(EXIT_FAILURE, str(error))
    except Terminated as stopped:
        _exit(EXIT_SIGTERM, f'SIGTERM: stopped in {stopped}; --resume auto goes on from there.')
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _exit(code: int, message: str) -> NoReturn:
    print(f'train-kd: error: {message}', file=sys.stderr)
    raise SystemExit(code) from None


def run(args: argparse.Namespace, args_text: str, argv: list[str]) -> None:
    """Builds everything that the flags name, trains, and prints the results."""
    device = setup_device(args, device_given=any(word.split('=')[0] == '--device' for word in argv))
    primary = args.rank == 0
    if args.push_to_hub and primary:
        check_access(args.push_to_hub, private=args.hub_private, revision=args.hub_revision)
    dtype = model_dtype(args)
    random_seed(args.seed, args.rank)

    student, data_config = create_student(args, device, dtype, primary)
    kd = resolve_kd(args)
    if kd is not None:
        check_returns_logits(student, args.model, data_config['input_size'], args.num_classes)
    data = create_train_data(args, data_config, device, dtype)
    eval_loader = create_eval_loader(args, data_config, device, dtype)
    optimizer = create_optimizer(args, student)
    loss_scaler = create_loss_scaler(args, device)
    if args.teacher_cache:
        teacher = open_cached_teacher(args, args_text, kd, data_config, data, eval_loader, device, dtype)
    else:
        teacher = create_run_teacher(args, kd, data_config, device)
    task = create_task(args, kd, student, teacher, optimizer, data.mixup_active, device, dtype)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )

    output_dir = _output_dir(args, data_config) if primary else None
    point = _resume(args, task, optimizer, loss_scaler, output_dir)
    lr_scheduler, num_epochs = create_scheduler(args, optimizer, len(data.loader), point.epoch)
    eval_metric = args.eval_metric if eval_loader is not None else 'loss'
    loop = Loop(
        task=task,
        optimizer=optimizer,
        data=data,
        eval_loader=eval_loader,
        steps=step_settings(args, device, dtype),
        settings=loop_settings(args, point.epoch, num_epochs, eval_metric),
        log=_create_log(args, output_dir),
        run_id=point.run_id,
        loss_scaler=loss_scaler,
        lr_scheduler=lr_scheduler,
    )
    if primary:
        loop.saver = AtomicSaver(
            model=student,
            optimizer=optimizer,
            args=args,
            amp_scaler=loss_scaler,
            checkpoint_dir=output_dir,
            recovery_dir=output_dir,
            decreasing=eval_metric == 'loss',
            max_history=args.checkpoint_hist,
            task=task,
        )
        loop.summary = Summary(Path(output_dir, 'summary.csv'), point.epoch if point.in_place else 0)
    if point.in_place:
        loop.history = list(point.state.get('history', []))
        if primary:
            loop.saver.continue_from(point.path)

    record = RunRecord(
        point.run_id,
        argv,
        args.model,
        student,
        _pretrained_source(args),
        data_config,
        class_names(data.dataset),
        kd,
        task,
        eval_metric,
    )
    if point.epoch < num_epochs:
        if primary:
            write_atomically(Path(output_dir, 'args.yaml'), args_text)
            record.write(output_dir)
        if teacher is not None and not args.no_teacher_eval and eval_loader is not None:
            def evaluate() -> tuple[list[dict[str, float]], torch.Tensor]:
                with preserved_random_state():
                    own_loader = create_eval_loader(args, data_config, device, dtype, persistent_workers=False)
                    return evaluate_teacher(task, own_loader, loop.steps, args.distributed)

            metrics, loop.teacher_predictions = teacher.validation(evaluate) if args.teacher_cache else evaluate()
            record.set_teacher_metrics(metrics)
        if args.torchcompile:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.distributed:
            task.prepare_distributed(
                device_ids=None if device.type == 'cpu' else [device],
                **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}),
            )
        if args.start_epoch is None and not args.no_resume_opt:
            loop.restore(point.state, point.same_epoch)
        loop.run()
    else:
        _logger.info(f'All {num_epochs} epochs are done: nothing to train.')
    if primary:
        _finish(args, loop, record, output_dir)


@dataclass
class _ResumePoint:
    """Where a run starts: at its beginning, or where a checkpoint left it."""
    run_id: str
    path: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    same_epoch: bool = False
    in_place: bool = False


def _output_dir(args: argparse.Namespace, data_config: dict[str, Any]) -> str:
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        safe_model_name(args.model),
        str(data_config['input_size'][-1]),
    ])
    try:
        return get_outdir(args.output or './output/train', name)
    except OSError as error:
        raise UsageError(f'--output {args.output or "./output/train"}: {error}') from error


def _locate_checkpoint(args: argparse.Namespace, output_dir: str | None) -> _ResumePoint:
    """Finds the checkpoint that `--resume` means, the same on all ranks."""
    point = _ResumePoint(uuid.uuid4().hex, args.resume or None)
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


def _resume(
        args: argparse.Namespace,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Any,
        output_dir: str | None,
) -> _ResumePoint:
    """Loads what `--resume` names into task, optimizer and scaler; `--start-epoch` overrides its epoch."""
    point = _locate_checkpoint(args, output_dir)
    if point.path is not None:
        checkpoint = read_checkpoint(point.path)
        keep = not args.no_resume_opt
        point.state = run_state_of(checkpoint)
        point.epoch = resume(task, point.path, optimizer if keep else None, loss_scaler if keep else None) or 0
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


def _create_log(args: argparse.Namespace, output_dir: str | None) -> RunLog:
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
        args.world_size,
        save_images=args.save_images,
        tensorboard=args.log_tensorboard,
        wandb_options=wandb_options,
    )


def _pretrained_source(args: argparse.Namespace) -> str | None:
    if args.initial_checkpoint or args.pretrained_path:
        return args.initial_checkpoint or args.pretrained_path
    return args.model if args.pretrained else None


def _finish(args: argparse.Namespace, loop: Loop, record: RunRecord, output_dir: str) -> None:
    """Reports the best epoch, prints the `--result` block and pushes the student."""
    saver = loop.saver
    further = {'teacher': record.content['teacher']} if record.content['teacher'] else {}
    if saver.best_metric is not None:
        record.content['best'] = {'epoch': saver.best_epoch, 'metric': saver.best_metric}
        _logger.info(f'*** Best metric: {saver.best_metric} (epoch {saver.best_epoch})')
    if loop.settings.start_epoch < loop.settings.num_epochs:
        record.write(output_dir)
    print_results(loop.history, saver.best_epoch, **further)
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
