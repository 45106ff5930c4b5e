"""The epochs of a run: train, validate, record, save; stop and take up anywhere."""
import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import NativeScaler, distribute_bn
from torch.utils.data import DataLoader, IterableDataset

from .data import TrainData
from .engine import Progress, StepSettings, train_one_epoch, validate
from .logs import RunLog
from .meters import AgreementEvaluator, NonFiniteLoss, SkippedSteps, StepTotals
from .process import AgreedStop, Process, print_out
from .run.checkpoint import AtomicSaver
from .run.record import Summary
from .run.resume import (
    ema_random_state,
    gather_rank_states,
    rank_state,
    restore_rank_state,
    restored_totals,
    set_ema_random_state,
)
from .task import KDTask

_logger = logging.getLogger('train')

SKIPPED_STEPS_ALLOWED = 10


@dataclass
class LoopSettings:
    """What the epochs of a run are like; the flags of the same names."""
    num_epochs: int
    start_epoch: int = 0
    val_interval: int = 1
    recovery_interval: int = 0
    save_epochs: tuple[int, ...] = ()
    eval_metric: str = 'top1'
    eval_ema: bool = True
    dist_bn: str = ''
    tta: int = 0


@dataclass
class Loop:
    """A run in progress.

    Args:
        task: The task, wrapped for its ranks.
        optimizer: Its optimizer.
        data: The training side of the data.
        eval_loader: Validation loader, or None.
        steps: How a batch becomes an update.
        settings: What the epochs are like.
        process: The process that trains.
        log: Where reports go.
        run_id: Names the run in its checkpoints.
        loss_scaler: timm's, under float16 AMP.
        lr_scheduler: timm's, or None.
        saver: On the primary rank.
        summary: On the primary rank.
        teacher_predictions: The teacher's classes on the validation set, `[N]`.
        history: Results of the epochs that are done.
        on_epoch: Called after each epoch with its number, its seconds, those of its training, and how many images of
            all processes it trained on.
    """
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    data: TrainData
    eval_loader: DataLoader | None
    steps: StepSettings
    settings: LoopSettings
    process: Process
    log: RunLog
    run_id: str
    loss_scaler: NativeScaler | None = None
    lr_scheduler: Scheduler | None = None
    saver: AtomicSaver | None = None
    summary: Summary | None = None
    teacher_predictions: torch.Tensor | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    on_epoch: Callable[[int, float, float, int], None] = lambda epoch, seconds, train_seconds, images: None

    def __post_init__(self):
        self.first_batch = 0
        self.totals = StepTotals(self.steps.device)
        self.images = 0
        self.stop = AgreedStop(self.process)
        self.interrupted = False
        self.skipped = SkippedSteps(self.optimizer) if self.loss_scaler is not None else None
        self._trained: dict[str, Any] = {}

    def restore(self, state: dict[str, Any], same_epoch: bool) -> None:
        """Take up the state that an exact resume needs beyond timm's.

        Args:
            state: The run state of the checkpoint that was resumed from; empty for one of timm's script.
            same_epoch: The run continues inside the checkpoint's epoch.
        """
        set_ema_random_state(self.task, state.get('ema_random'))
        rank, world_size = self.process.rank, self.process.world_size
        restore_rank_state(self.task, state.get('ranks', []), rank, world_size)
        if same_epoch:
            self.first_batch = self._place_in_epoch(state['batch'], state['batches'])
            self.totals.load_state_dict(restored_totals(state['ranks'], rank, world_size))
            if self.lr_scheduler is not None:  # `--sched-on-updates` has moved on inside the epoch
                updates = self.settings.start_epoch * self._num_updates() + self._num_updates(self.first_batch)
                self.lr_scheduler.step_update(num_updates=updates)

    def _place_in_epoch(self, batch: int, batches: int) -> int:
        """Return the batch to go on with: where the epoch has another number of batches now, one as far into it."""
        place = batch * len(self.data.loader) // batches
        return place if place == len(self.data.loader) else place - place % self.steps.grad_accum_steps

    def _num_updates(self, batches: int | None = None) -> int:
        """Return how many updates so many batches of an epoch make; by default, all of them."""
        return -(-(len(self.data.loader) if batches is None else batches) // self.steps.grad_accum_steps)

    def run(self) -> list[dict[str, Any]]:
        """Train to the last epoch, or until Ctrl-C, and return the results of all epochs that are done."""
        settings = self.settings
        with self.stop, closing(self.log):
            self.log.start((settings.num_epochs - settings.start_epoch) * self._num_updates())
            try:
                for epoch in range(settings.start_epoch, settings.num_epochs):
                    started = time.monotonic()
                    self._train_epoch(epoch)
                    trained = time.monotonic()
                    self._finish_epoch(epoch)
                    self.on_epoch(epoch, time.monotonic() - started, trained - started, self.images)
            except KeyboardInterrupt:  # as timm's script, which goes on to its results
                self.interrupted = True
                _logger.warning('Interrupted: the results are those of the epochs so far.')
        return self.history

    def _train_epoch(self, epoch: int) -> None:
        self.images = 0
        if not self.first_batch:
            self.totals = StepTotals(self.steps.device)
        self.data.set_epoch(epoch, self.first_batch)
        if isinstance(self.task, KDTask):
            self.task.set_epoch(epoch + 1)
        if self.first_batch < len(self.data.loader):
            train_one_epoch(
                self.task,
                self.data.loader,
                self.optimizer,
                epoch,
                self.steps,
                self.totals,
                loss_scaler=self.loss_scaler,
                lr_scheduler=self.lr_scheduler,
                mixup_fn=self.data.mixup_fn,
                first_batch=self.first_batch,
                on_update=self._after_update,
            )
            self._check_finite(epoch, len(self.data.loader) - 1)
            if self.totals.num_bad:
                _logger.warning(
                    f'Epoch {epoch}: {int(self.totals.num_bad)} batches without a finite loss, whose steps the loss '
                    'scaler skipped, are not in its averages.')
            self._distribute_bn(self.task.get_trainable_module())
        # A run that is stopped in its validation starts over from here: validation draws from the random streams, and
        # makes the EMA's batch norm the same in all processes.
        self._trained = self._rank_state()
        if self.first_batch < len(self.data.loader) and self._recovery_due(self._num_updates() - 1):
            self._save_recovery(epoch, len(self.data.loader), self._trained)
        self.first_batch = 0

    def _after_update(self, progress: Progress) -> None:
        self.log.step(progress)
        self.images += progress.samples * self.process.world_size
        if self.skipped is not None:
            self.skipped.count_update()
        if self.log.is_due(progress):
            self._check_finite(progress.epoch, progress.batch_idx)
            self.log.train(progress, self.totals, self._lr())
        self.stop.check()
        batches = progress.batch_idx + 1
        # The recovery file due at the epoch's last update is written by _train_epoch, when the training is complete.
        if batches < len(self.data.loader) and self._recovery_due(progress.update_idx):
            self._check_finite(progress.epoch, progress.batch_idx)
            self._save_recovery(progress.epoch, batches, self._rank_state())

    def _check_finite(self, epoch: int, batch_idx: int) -> None:
        """Raise if a loss was not finite, or too many in a row where the loss scaler skips their steps."""
        self.totals.check_finite(
            epoch,
            allowed_in_a_row=SKIPPED_STEPS_ALLOWED if self.skipped is not None else 0,
            distributed=self.process.distributed,
        )
        # All processes skip the same steps: their gradients are summed before the scaler looks at them.
        if self.skipped is not None and self.skipped.most_in_a_row() >= SKIPPED_STEPS_ALLOWED:
            raise NonFiniteLoss(
                epoch,
                batch_idx,
                f'the gradients are not finite, {SKIPPED_STEPS_ALLOWED} steps in a row were skipped',
            )

    def _recovery_due(self, update_idx: int) -> bool:
        interval = self.settings.recovery_interval
        return self.stop.agreed or bool(interval and (update_idx + 1) % interval == 0)

    def _save_recovery(self, epoch: int, batches: int, own: dict[str, Any]) -> None:
        """Save where the run stands after so many batches of an epoch; after SIGTERM, it ends here."""
        update_idx, trained = self._num_updates(batches) - 1, batches == len(self.data.loader)
        ranks = gather_rank_states(own, self.process)
        if self.saver is not None:
            place = {'batch': batches, 'batches': len(self.data.loader), 'epoch_trained': trained}
            self.saver.save_recovery(epoch, update_idx, {**self._run_state(ranks), **place})
        if self.stop.agreed:
            self.stop.leave(f'epoch {epoch}, {"validation" if trained else f"update {update_idx}"}')

    def _rank_state(self) -> dict[str, Any]:
        return rank_state(self.task, self.totals, self.process)

    def _run_state(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            'run_id': self.run_id,
            'ranks': ranks,
            'ema_random': ema_random_state(self.task),
            'history': self.history,
        }

    def _finish_epoch(self, epoch: int) -> None:
        """Validate, write the summary's row and save, in timm's order."""
        settings = self.settings
        train_metrics = self.totals.averages(self.process.world_size)
        completed, metric = epoch + 1, None
        if completed % settings.val_interval and completed not in (settings.num_epochs, *settings.save_epochs):
            _logger.info(f'Skipping eval for epoch: {epoch}')
        else:
            eval_metrics = self._validate(epoch) if self.eval_loader is not None else None
            self.history.append({'epoch': epoch, 'train': train_metrics, 'validation': eval_metrics})
            if self.summary is not None:
                self.log.epoch(self.summary.append(epoch, train_metrics, eval_metrics, self._lr()))
            metric = (eval_metrics or train_metrics)[settings.eval_metric]
        ranks = gather_rank_states(self._rank_state(), self.process)
        if self.saver is not None:
            self.saver.save_checkpoint(epoch, metric, self._run_state(ranks))
            if completed in settings.save_epochs:
                self.saver.save_milestone(completed)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(completed, metric)

    def _lr(self) -> float:
        rates = [group['lr'] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def _distribute_bn(self, model: torch.nn.Module) -> None:
        if self.process.distributed and self.settings.dist_bn in ('broadcast', 'reduce'):
            _logger.info('Distributing BatchNorm running means and vars')
            distribute_bn(model, self.process.world_size, self.settings.dist_bn == 'reduce')

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the metrics of the student, or of its EMA where there is one on the device."""
        metrics = self._validate_model(epoch, self.task.get_eval_model(), 'Test')
        if self.task.has_ema() and self.settings.eval_ema:
            self._distribute_bn(self.task.get_trainable_module(ema=True))
            metrics = self._validate_model(epoch, self.task.get_eval_model(ema=True), 'Test (EMA)')
        return metrics

    def _validate_model(self, epoch: int, model: torch.nn.Module, name: str) -> dict[str, float]:
        limit = evaluation_sample_limit(self.eval_loader)
        if self.teacher_predictions is None:
            evaluator = self.task.create_evaluator(max_samples=limit)
        else:
            evaluator = AgreementEvaluator(self.teacher_predictions, self.steps.device, max_samples=limit)
        report = self.log.validation(evaluator, len(self.eval_loader) - 1, name)
        # A stream may have more batches for one rank than for another, so that they could not agree.
        can_stop = not (self.process.distributed and isinstance(self.eval_loader.dataset, IterableDataset))

        def on_batch(batch_idx: int, output: torch.Tensor, target: torch.Tensor) -> None:
            report(batch_idx, output, target)
            if can_stop and self.stop.check():
                self._save_recovery(epoch, len(self.data.loader), self._trained)

        return validate(
            model,
            self.eval_loader,
            evaluator,
            self.steps,
            tta=self.settings.tta,
            distributed=self.process.distributed,
            on_batch=on_batch,
        )


def print_results(history: list[dict[str, Any]], best_epoch: int | None, **further: Any) -> None:
    """Print the `--result` block, which ends stdout: all epochs, the best one, and what else is given."""
    results = {'all': history, **further}
    best = next((result for result in history if result['epoch'] == best_epoch), None)
    if best is not None:
        results['best'] = best
    print_out(f'--result\n{json.dumps(results, indent=4)}')
