"""The losses against the papers' official figures, their registry, and what they refuse."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses_cases import create, evaluate, make_batch

from timm_kd.losses import KD_LOSSES, create_kd_loss

OFFICIAL = np.load(Path(__file__).parent / 'data' / 'official_losses.npz')
CASES = [key.removesuffix('/loss') for key in OFFICIAL if key.endswith('/loss')]
LETTERS = {'dkd': {'T': 'temperature', 'a': 'alpha', 'b': 'beta'}, 'nkd': {'T': 'temperature', 'g': 'gamma'}}


def official_total(case, dtype, plain):
    """Return what the official code returned for a case, by our losses: value and gradient."""
    group, name = case.split('/')
    kind = name.split('_')[0]
    student, teacher, soft = (torch.from_numpy(OFFICIAL[f'{group}/{key}']).to(dtype)
                              for key in ('student', 'teacher', 'soft'))
    target = torch.from_numpy(OFFICIAL[f'{group}/target'])
    numbers = {letter: float(value) for letter, value in re.findall(r'_([aTbgm])([\d.]+)', name)}
    letters = LETTERS.get(kind, {'T': 'temperature'})
    params = {letters[letter]: value for letter, value in numbers.items() if letter in letters}
    with_teacher = kind != 'tfnkd' and 'reg' not in name
    mixed = 'soft' in name or 'pair' in name
    variant = (kind, {**params, 'with_teacher': with_teacher})
    value, gradient = evaluate(variant, student, teacher, soft if mixed else target, plain)
    value = value.item()
    if kind != 'tfkd':
        return value, gradient
    # The official total: (1 - alpha) CE + alpha m KL, the KL a mean over all B * C elements.
    student.requires_grad_()
    cross_entropy = F.cross_entropy(student, target)
    cross_entropy.backward()
    weight = numbers['a'] * numbers['m'] / student.shape[1]
    return (
        (1 - numbers['a']) * cross_entropy.item() + weight * value,
        (1 - numbers['a']) * student.grad + weight * gradient,
    )


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize(('dtype', 'value_off', 'gradient_off'), [
    (torch.float64, 1e-9, 1e-6), (torch.float32, 3e-5, 3e-5),
], ids=['float64', 'float32'])
@pytest.mark.parametrize('case', CASES)
def test_official_figures_hold(case, dtype, value_off, gradient_off, plain):
    value, gradient = official_total(case, dtype, plain)
    expected = torch.from_numpy(OFFICIAL[f'{case}/grad']).to(dtype)
    value_off = max(value_off, 1e-7) if 'soft' in case else value_off
    assert value == pytest.approx(float(OFFICIAL[f'{case}/loss']), rel=value_off)
    assert (gradient - expected).norm() <= gradient_off * expected.norm()


@pytest.fixture
def batch():
    return make_batch(6, 5, seed=3)


def test_registry_has_the_command_line_names_in_order():
    assert list(KD_LOSSES) == ['kd', 'dkd', 'nkd', 'tfnkd', 'tfkd']


@pytest.mark.parametrize(('name', 'parameters', 'parts', 'weights', 'needs_teacher', 'accepts_teacher'), [
    ('kd', {'temperature': 4.0, 'logit_std': False}, (), (1.0, 1.0), True, True),
    ('dkd', {'temperature': 4.0, 'alpha': 1.0, 'beta': 8.0, 'logit_std': False}, ('tckd', 'nckd'),
     (1.0, 1.0), True, True),
    ('nkd', {'temperature': 1.0, 'gamma': 1.5, 'logit_std': False}, ('soft', 'distributed'), (1.0, 1.0), True, True),
    ('tfnkd', {}, (), (1.0, 1.0), False, False),
    ('tfkd', {'temperature': 20.0, 'correct_prob': 0.99}, (), (0.9, 0.1), False, True),
])
def test_knobs_parts_and_teachers_are_those_of_the_papers(
        name, parameters, parts, weights, needs_teacher, accepts_teacher):
    loss_class = KD_LOSSES[name]
    assert loss_class.hyper_parameters() == parameters
    assert loss_class.component_names == parts
    assert (loss_class.default_task_weight, loss_class.default_distill_weight) == weights
    assert (loss_class.needs_teacher, loss_class.accepts_teacher) == (needs_teacher, accepts_teacher)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('name', KD_LOSSES)
def test_components_are_the_announced_ones_and_detached(batch, name, plain):
    student, teacher, target = batch
    kd_loss = create_kd_loss(name, double_backward=plain)
    result = kd_loss(student.requires_grad_(), teacher if kd_loss.accepts_teacher else None, target)
    assert tuple(key for key in result if key != 'kd_loss') == kd_loss.component_names
    assert [key for key in result if result[key].requires_grad] == ['kd_loss']
    assert all(value.shape == () for value in result.values())


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize(('name', 'params', 'factors'), [
    ('dkd', {'alpha': 0.7, 'beta': 3.0}, {'tckd': 0.7, 'nckd': 3.0}),
    ('nkd', {'gamma': 2.5, 'temperature': 1.0}, {'soft': 1.0, 'distributed': 2.5}),
    ('nkd', {'gamma': 2.5, 'temperature': 3.0}, {'soft': 1.0, 'distributed': 2.5}),
])
def test_components_add_up_by_their_weights(batch, name, params, factors, plain):
    student, teacher, target = batch
    result = create((name, params), plain)(student.requires_grad_(), teacher, target)
    total = sum(factor * result[part].item() for part, factor in factors.items())
    assert result['kd_loss'].item() == pytest.approx(total)


def test_kd_is_torchs_kl_divergence_of_softened_logits(batch):
    student, teacher, target = batch
    expected = 9 * F.kl_div(
        F.log_softmax(student / 3, dim=1), F.log_softmax(teacher / 3, dim=1), log_target=True, reduction='batchmean',
    )
    value, _ = evaluate(('kd', {'temperature': 3.0}), student, teacher, target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_tfkd_with_a_teacher_is_kd(batch):
    own = evaluate(('tfkd', {'temperature': 6.0, 'with_teacher': True}), *batch)
    kd = evaluate(('kd', {'temperature': 6.0}), *batch)
    assert all(map(torch.equal, own, kd))  # value and gradient


def test_virtual_teacher_under_mixup_mixes_the_two_label_distributions(batch):
    student, _, target = batch
    other = (target + 1) % 5
    lam, a, temperature = 0.7, 0.9, 2.0
    virtual = torch.full((6, 5), (1 - a) / 4, dtype=torch.float64)
    virtual_a, virtual_b = virtual.scatter(1, target[:, None], a), virtual.scatter(1, other[:, None], a)
    expected = F.kl_div(
        student.log_softmax(1), ((lam * virtual_a + (1 - lam) * virtual_b) / temperature).softmax(1),
        reduction='batchmean',
    )
    mixed = lam * F.one_hot(target, 5).double() + (1 - lam) * F.one_hot(other, 5).double()
    value, _ = evaluate(('tfkd', {'correct_prob': a, 'temperature': temperature}), student, None, mixed)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_mean_of_tfnkd_leaves_out_rows_without_a_second_label(batch):
    student, _, target = batch
    mixed = F.one_hot(target, 5).double()
    mixed[:2] = 0.6 * mixed[:2] + 0.4 * F.one_hot((target[:2] + 2) % 5, 5)
    log_p = student.log_softmax(1)
    p_a, p_b = (log_p.exp().gather(1, label[:, None])[:, 0] for label in (target, (target + 2) % 5))
    lam = torch.tensor([0.6, 0.6, 1, 1, 1, 1], dtype=torch.float64)
    expected = -((p_a + lam - p_a.mean()) * p_a.log()).mean()
    expected = expected - ((p_b + 0.4 - p_b[:2].mean()) * p_b.log())[:2].sum() / 6
    value, _ = evaluate(('tfnkd', {}), student, None, mixed)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_nkd_takes_the_heavier_label_as_target(batch):
    student, teacher, target = batch
    mixed = 0.6 * F.one_hot(target, 5).double() + 0.4 * F.one_hot((target + 2) % 5, 5)
    of_both, of_the_heavier = (evaluate(('nkd', {}), student, teacher, labels) for labels in (mixed, target))
    assert all(map(torch.equal, of_both, of_the_heavier))  # value and gradient


def test_no_teacher_gradient_is_computed(batch):
    student, teacher, target = batch
    teacher.requires_grad_()
    evaluate(('dkd', {}), student, teacher, target)
    assert teacher.grad is None


@pytest.mark.parametrize(('name', 'params', 'message'), [
    ('crd', {}, "unknown distillation loss 'crd': known are kd, dkd, nkd, tfnkd, tfkd"),
    ('nkd', {'alpha': 1.0}, "nkd has no parameter 'alpha': it has temperature, gamma, logit_std"),
    ('tfnkd', {'temperature': 1.0}, "tfnkd has no parameter 'temperature': it has none"),
    ('kd', {'temperature': 0.0}, 'temperature must be a value above 0, got 0.0.'),
    ('tfkd', {'temperature': -1.0}, 'temperature must be a value above 0, got -1.0.'),
    ('kd', {'temperature': float('nan')}, 'temperature must be a finite number, got nan.'),
    ('dkd', {'beta': -1.0}, 'beta must be a value of at least 0, got -1.0.'),
    ('nkd', {'gamma': float('inf')}, 'gamma must be a finite number, got inf.'),
    ('tfkd', {'correct_prob': 1.5}, 'correct_prob must be a value above 0 and of at most 1, got 1.5.'),
])
def test_creation_refuses_what_does_not_exist_or_is_out_of_range(name, params, message):
    with pytest.raises(ValueError, match=message):
        create_kd_loss(name, **params)


def logits(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(('name', 'arguments', 'message'), [
    ('kd', (logits(2, 3), None, torch.tensor([0, 1])), 'KDLoss needs teacher logits, got None'),
    ('tfnkd', (logits(2, 3), logits(2, 3), torch.tensor([0, 1])), 'TFNKDLoss has no teacher'),
    ('kd', (logits(2, 3), logits(2, 4), torch.tensor([0, 1])), r'\[2, 3\] as the student\'s, got \[2, 4\]'),
    ('kd', (logits(2), logits(2), torch.tensor([0, 1])), r'student logits must be floating point \[B, C\], got \[2\]'),
    ('tfnkd', (logits(2, 1), None, torch.tensor([0, 0])), 'needs at least 2 classes, the student logits have 1'),
    ('tfnkd', (logits(2, 3), None, torch.tensor([0, 3])), r'class 3, outside \[0, 3\)'),
    ('tfnkd', (logits(2, 3), None, torch.tensor([0, -100])), r'class -100, outside \[0, 3\)'),
    ('tfnkd', (logits(2, 3), None, torch.tensor([0, 1, 2])), r'target must be \[2\] class indices'),
    ('tfnkd', (logits(2, 3), None, logits(2)), r'target must be \[2\] class indices'),
    ('tfnkd', (logits(2, 3), None, logits(2, 4)), r'target must be \[2\] class indices'),
    ('tfnkd', (logits(2, 3), None, torch.tensor([0, 1]), 1.0), r'smoothing must be in \[0, 1\), got 1.0'),
    ('tfnkd', (logits(2, 3), None, torch.full((2, 3), 1 / 3)), 'not a mix of at most two classes'),
])
def test_forward_refuses_what_does_not_fit(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_kd_loss(name)(*arguments)


def test_tfkd_is_stated_as_kd_where_a_teacher_takes_the_place_of_the_virtual_one():
    tfkd = KD_LOSSES['tfkd']
    assert tfkd.stated(with_teacher=True).formula == KD_LOSSES['kd'].stated(with_teacher=True).formula
    assert tfkd.stated(with_teacher=False).formula != tfkd.stated(with_teacher=True).formula


def test_loss_is_shown_with_its_parameters_as_any_module_is():
    assert repr(create_kd_loss('kd', temperature=2.0)) == 'KDLoss(temperature=2.0, logit_std=False)'
