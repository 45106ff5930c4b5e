"""The epochs of a run: train, validate, record, save; stop and take up anywhere."""
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import NativeScaler, distribute_bn
from torch.utils.data import IterableDataset

from .engine import Progress, train_one_epoch, validate
from .meters import AgreementEvaluator, NonFiniteLoss, SkippedSteps, StepTotals
from .process import AgreedStop
from .run.checkpoint import AtomicSaver
from .run.log import RunLog
from .run.record import Summary
from .run.resume import (
    StartPoint,
    ema_random_state,
    gather_rank_states,
    rank_state,
    restore_rank_state,
    restored_totals,
    set_ema_random_state,
)
from .setup import Setup
from .task import KDTask

_logger = logging.getLogger('train')

SKIPPED_STEPS_ALLOWED = 10


@dataclass
class Loop:
    """A run in progress. Its task is wrapped for its ranks; only the primary one has a saver and a summary.

    Args:
        setup: The set-up: data, how a batch becomes an update, and the flags of the epochs.
        teacher_predictions: The teacher's classes on the validation set, `[N]`.
        on_epoch: Called after each epoch with its `epoch`, its `seconds`, those of its training (`train_seconds`) and
            the number of `images` that all processes trained on.
    """
    setup: Setup
    start: StartPoint
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    epochs: range
    log: RunLog
    loss_scaler: NativeScaler | None = None
    lr_scheduler: Scheduler | None = None
    saver: AtomicSaver | None = None
    summary: Summary | None = None
    teacher_predictions: torch.Tensor | None = None
    on_epoch: Callable[[dict[str, float]], None] = lambda timing: None

    def __post_init__(self):
        self.args, self.data, self.eval_loader = self.setup.args, self.setup.data, self.setup.eval_loader
        self.steps, self.process = self.setup.steps, self.setup.process
        self.history = self.start.history
        self.first_batch = 0
        self.totals = StepTotals(self.steps.device)
        self.images = 0
        self.stop = AgreedStop(self.process)
        self.interrupted = False
        self.skipped = SkippedSteps(self.optimizer) if self.loss_scaler is not None else None
        self._trained: dict[str, Any] = {}

    def restore(self) -> None:
        """Take up the state of the checkpoint that an exact resume needs beyond timm's."""
        state = self.start.state
        set_ema_random_state(self.task, state.get('ema_random'))
        restore_rank_state(self.task, state.get('ranks', []), self.process)
        if self.start.same_epoch:
            self.first_batch = self._place_in_epoch(state['batch'], state['batches'])
            self.totals.load_state_dict(restored_totals(state['ranks'], self.process))
            if self.lr_scheduler is not None:  # `--sched-on-updates` has moved on inside the epoch
                updates = self.start.epoch * self._num_updates() + self._num_updates(self.first_batch)
                self.lr_scheduler.step_update(num_updates=updates)

    def _place_in_epoch(self, batch: int, batches: int) -> int:
        """Return the batch to go on with: one as far into the epoch, which may have another number of batches now."""
        place = batch * len(self.data.loader) // batches
        return place if place == len(self.data.loader) else place - place % self.steps.grad_accum_steps

    def _num_updates(self, batches: int | None = None) -> int:
        """Return how many updates the first `batches` of an epoch make; by default, those of a whole epoch."""
        return -(-(len(self.data.loader) if batches is None else batches) // self.steps.grad_accum_steps)

    def run(self) -> list[dict[str, Any]]:
        """Train to the last epoch, or until Ctrl-C, and return the results of all epochs that are done."""
        with self.stop, closing(self.log):
            self.log.start(len(self.epochs) * self._num_updates())
            try:
                for epoch in self.epochs:
                    started = time.monotonic()
                    self._train_epoch(epoch)
                    trained = time.monotonic()
                    self._finish_epoch(epoch)
                    self.on_epoch({
                        'epoch': epoch,
                        'seconds': round(time.monotonic() - started, 3),
                        'train_seconds': round(trained - started, 3),
                        'images': self.images,
                    })
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
        interval = self.args.recovery_interval
        return self.stop.agreed or bool(interval and (update_idx + 1) % interval == 0)

    def _save_recovery(self, epoch: int, batches: int, own: dict[str, Any]) -> None:
        """Save where the run stands after the first `batches` of an epoch; after SIGTERM, the run ends here."""
        update_idx, trained = self._num_updates(batches) - 1, batches == len(self.data.loader)
        state = self._run_state(own)
        if self.saver is not None:
            place = {'batch': batches, 'batches': len(self.data.loader), 'epoch_trained': trained}
            self.saver.save_recovery(epoch, update_idx, {**state, **place})
        if self.stop.agreed:
            self.stop.leave(f'epoch {epoch}, {"validation" if trained else f"update {update_idx}"}')

    def _rank_state(self) -> dict[str, Any]:
        return rank_state(self.task, self.totals, self.process)

    def _run_state(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what an exact resume needs beyond timm's state; all processes must call it."""
        return {
            'run_id': self.start.run_id,
            'ranks': gather_rank_states(own, self.process),
            'ema_random': ema_random_state(self.task),
            'history': self.history,
        }

    def _finish_epoch(self, epoch: int) -> None:
        """Validate, write the summary's row and save, in timm's order."""
        save_epochs = self.args.save_epochs or ()
        train_metrics = self.totals.averages(self.process.world_size)
        completed, metric = epoch + 1, None
        if completed % self.args.val_interval and completed not in (self.epochs.stop, *save_epochs):
            _logger.info(f'Skipping eval for epoch: {epoch}')
        else:
            eval_metrics = self._validate(epoch) if self.eval_loader is not None else None
            self.history.append({'epoch': epoch, 'train': train_metrics, 'validation': eval_metrics})
            if self.summary is not None:
                self.log.epoch(self.summary.append(epoch, train_metrics, eval_metrics, self._lr()))
            metric = (eval_metrics or train_metrics)[self.setup.eval_metric]
        state = self._run_state(self._rank_state())
        if self.saver is not None:
            self.saver.save_checkpoint(epoch, metric, state)
            if completed in save_epochs:
                self.saver.save_milestone(completed)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(completed, metric)

    def _lr(self) -> float:
        rates = [group['lr'] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def _distribute_bn(self, model: torch.nn.Module) -> None:
        if self.process.distributed and self.args.dist_bn in ('broadcast', 'reduce'):
            _logger.info('Distributing BatchNorm running means and vars')
            distribute_bn(model, self.process.world_size, self.args.dist_bn == 'reduce')

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the metrics of the student, or of its EMA where there is one on the device."""
        metrics = self._validate_model(epoch, self.task.get_eval_model(), 'Test')
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
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
            tta=self.args.tta,
            distributed=self.process.distributed,
            on_batch=on_batch,
        )
