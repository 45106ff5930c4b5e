"""The arithmetic of an epoch, beside closed forms and timm's own meters."""
import itertools

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, NativeScaler
from torch import nn

from timm_kd.engine import StepSettings, evaluate_teacher, train_one_epoch, validate
from timm_kd.meters import AgreementEvaluator, NonFiniteLoss, SkippedSteps, StepTotals

CPU = torch.device('cpu')
SETTINGS = StepSettings(CPU, prefetched=False)


def batches(count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def linear_task() -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(nn.Linear(3, 5), nn.CrossEntropyLoss(), verbose=False)


@pytest.mark.parametrize('num_batches, steps, groups', [
    (7, 4, [4, 3]),  # three remain: each divided by three, and no update among them
    (11, 4, [4, 4, 3]),
    (8, 4, [4, 4]),
    (5, 1, [1] * 5),
])
def test_accumulated_update_is_one_step_on_the_mean_gradient_of_its_batches(num_batches, steps, groups):
    data = batches(num_batches)
    task, expected = linear_task(), linear_task()
    train_one_epoch(
        task, data, torch.optim.SGD(task.parameters(), lr=0.5), 0,
        StepSettings(CPU, prefetched=False, grad_accum_steps=steps), StepTotals(CPU))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    remaining = iter(data)
    for group in groups:
        optimizer.zero_grad()
        (sum(expected(*next(remaining))['loss'] for _ in range(group)) / group).backward()
        optimizer.step()
    torch.testing.assert_close(task.trainable_module.weight, expected.trainable_module.weight)


def test_train_loss_is_that_of_timms_meter_bit_for_bit():
    data = [*batches(6), *batches(1, size=3)]
    task, meter, totals = linear_task(), AverageMeter(), StepTotals(CPU)
    with torch.no_grad():
        for input, target in data:
            meter.update(task(input, target)['loss'].item(), len(input))
    train_one_epoch(task, data, torch.optim.SGD(task.parameters(), lr=0.0), 0, SETTINGS, totals)
    assert totals.averages()['loss'] == meter.avg


@pytest.mark.parametrize('scale, factor', [('none', 1.0), ('sqrt', 0.5 ** 0.5), ('linear', 0.5)])
def test_batch_loss_scale_follows_the_batch_size(scale, factor):
    settings = StepSettings(CPU, batch_loss_scale=scale, reference_batch_size=8)
    assert settings.loss_scale(4) == factor


class Failing(ClassificationTask):
    """Its loss, and the component that makes it up, have another value in some batches, counted from 0."""

    def __init__(self, where, value=float('inf')):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 5), nn.CrossEntropyLoss(), verbose=False)
        self.factors = (value if index in where else 1.0 for index in itertools.count())

    def forward(self, input, target):
        result = super().forward(input, target)
        loss = result['loss'] * next(self.factors)
        return {**result, 'loss': loss, 'task_loss': result['loss'], 'kd_loss': loss}


def test_non_finite_loss_names_epoch_batch_and_component():
    task, totals = Failing(range(3, 6), float('nan')), StepTotals(CPU)
    train_one_epoch(task, batches(6), torch.optim.SGD(task.parameters(), lr=0.1), 2, SETTINGS, totals)
    with pytest.raises(NonFiniteLoss, match='epoch 2, batch 3: kd_loss'):
        totals.check_finite(2)


def test_first_batch_of_several_bad_ones_is_named_the_very_first_too():
    totals, nan = StepTotals(CPU), torch.tensor(float('nan'))
    for batch_idx in range(3):
        totals.update({'loss': nan, 'kd_loss': nan}, nan, 1, batch_idx, samples=4)
    with pytest.raises(NonFiniteLoss, match='epoch 5, batch 0: kd_loss is not finite'):
        totals.check_finite(5)


@pytest.mark.parametrize('divisor', [1, 2, 3])
def test_loss_of_a_batch_is_whole_under_accumulation(divisor):
    totals, loss = StepTotals(CPU), torch.tensor(1.5)
    totals.update({'loss': loss, 'task_loss': loss}, loss / divisor, divisor, 0, samples=4)
    assert totals.latest() == totals.averages() == {'loss': 1.5, 'task_loss': 1.5}


def test_loss_scaler_may_skip_a_few_batches_in_a_row():
    task, totals = Failing(range(3, 6), float('nan')), StepTotals(CPU)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    train_one_epoch(task, batches(6), optimizer, 0, SETTINGS, totals, loss_scaler=NativeScaler('cpu'))
    totals.check_finite(0, allowed_in_a_row=4)
    with pytest.raises(NonFiniteLoss):
        totals.check_finite(0, allowed_in_a_row=3)


@pytest.mark.parametrize('optimizer, options', [('sgd', {}), ('sgd', dict(fused=True)), ('lookahead_sgd', {})])
def test_steps_that_the_scaler_skips_in_a_row_are_counted_whoever_skips_them(optimizer, options):
    task = Failing({1, 4, 5, 6})
    optimizer = create_optimizer_v2(task, optimizer, lr=0.1, **options)
    skipped, counts = SkippedSteps(optimizer), []

    def count(progress):
        skipped.count_update()
        counts.append(skipped.most_in_a_row())

    train_one_epoch(
        task, batches(9), optimizer, 0, SETTINGS, StepTotals(CPU), loss_scaler=NativeScaler('cpu'), on_update=count)
    assert counts == [0, 1, 1, 1, 1, 2, 3, 3, 3]
    assert task.trainable_module.weight.isfinite().all()


def test_averages_are_those_of_the_batches_that_the_scaler_did_not_skip():
    data, totals, meter = [*batches(5), *batches(1, size=3)], StepTotals(CPU), AverageMeter()
    plain = linear_task()
    for index, (input, target) in enumerate(data):
        if index not in (0, 3):
            meter.update(plain(input, target)['loss'].item(), len(input))
    task = Failing({0, 3})
    train_one_epoch(
        task, data, torch.optim.SGD(task.parameters(), lr=0.0), 0, SETTINGS, totals,
        loss_scaler=NativeScaler('cpu'))
    assert totals.averages()['loss'] == meter.avg
    assert int(totals.num_bad) == 2


def test_interrupted_totals_go_on_where_they_stopped():
    task, whole, first, second = linear_task(), StepTotals(CPU), StepTotals(CPU), StepTotals(CPU)
    for index, (input, target) in enumerate(batches(4)):
        result = task(input, target)
        whole.update(result, result['loss'], 1, index, len(input))
        if index == 2:
            second.load_state_dict(first.state_dict())
        (first if index < 2 else second).update(result, result['loss'], 1, index, len(input))
    assert second.averages() == whole.averages()


def test_validation_counts_every_sample_once():
    model = linear_task().trainable_module
    data = [*batches(2), *batches(1, size=3)]
    input, target = (torch.cat(parts) for parts in zip(*data, strict=True))
    evaluator = linear_task().create_evaluator()
    metrics = validate(model, data, evaluator, SETTINGS)
    with torch.no_grad():
        output = model(input)
    assert metrics['top1'] == pytest.approx(100 * (output.argmax(1) == target).double().mean().item())
    assert metrics['loss'] == pytest.approx(nn.functional.cross_entropy(output, target).item(), rel=1e-6)


def test_agreement_ignores_the_padding_of_a_distributed_sampler():
    evaluator = AgreementEvaluator(torch.tensor([0, 1, 2, 2]), CPU, max_samples=3)
    evaluator.update(torch.eye(3)[[0, 1]], torch.tensor([0, 0]))
    evaluator.update(torch.eye(3)[[0, 2]], torch.tensor([0, 0]))
    metrics = evaluator.compute()
    assert metrics['agreement'] == pytest.approx(200 / 3)
    assert metrics['top1'] == pytest.approx(200 / 3)


@pytest.mark.parametrize('tta', [0, 3])
def test_teacher_and_student_of_the_same_weights_agree_whatever_is_averaged(tta):
    model, data = linear_task().trainable_module, batches(3, size=6)
    model.describe, model.num_classes, model.source = lambda: 'linear', 5, 'itself'
    (metrics,), predictions = evaluate_teacher([model], data, SETTINGS, tta=tta)
    evaluator = AgreementEvaluator(predictions, CPU)
    of_student = validate(model, data, evaluator, SETTINGS, tta=tta)
    assert len(predictions) == (6 if tta else 18)
    assert of_student == {**metrics, 'agreement': 100.0}
