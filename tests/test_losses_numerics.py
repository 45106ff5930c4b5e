"""The losses under every precision and at the extremes."""
import math

import pytest
import torch
import torch.nn.functional as F
from losses_cases import STANDARDISED, VARIANTS, create, evaluate, kd_term, make_batch, name_of


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_closed_form_refuses_a_double_backward(variant):
    student, teacher, target = make_batch()
    value = kd_term(variant, student.requires_grad_(), teacher, target)
    with pytest.raises(RuntimeError, match='no double backward .* create it with double_backward=True'):
        torch.autograd.grad(value, student, create_graph=True)


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_backward_runs_twice_with_retain_graph(variant):
    student, teacher, target = make_batch()
    value = kd_term(variant, student.requires_grad_(), teacher, target)
    first, = torch.autograd.grad(value, student, retain_graph=True)
    second, = torch.autograd.grad(value, student)
    assert torch.equal(first, second)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_half_precision_logits_are_widened_first(variant, dtype, pairs, plain):
    student, teacher, target = make_batch(pairs=pairs)
    student, teacher = student.to(dtype), teacher.to(dtype)
    value, gradient = evaluate(variant, student, teacher, target, plain)
    wide_value, wide_gradient = evaluate(variant, student.float(), teacher.float(), target, plain)
    assert value.dtype == torch.float32
    assert torch.equal(value, wide_value)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_autocast_changes_nothing(variant, plain):
    batch = make_batch(dtype=torch.float32)
    alone = evaluate(variant, *batch, plain)
    with torch.autocast('cpu', torch.bfloat16):
        assert all(map(torch.equal, evaluate(variant, *batch, plain), alone))  # value and gradient


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_grad_scaler_saves_gradients_that_float16_cannot_hold(variant):
    """A gradient of 1e-8 underflows in float16 unless the scale comes before the cast."""
    student, teacher, target = make_batch()
    student = student.half().requires_grad_()
    tiny = 1e-4
    value = kd_term(variant, student, teacher, target)
    (value * tiny * 65536 / 16).backward()
    _, expected = evaluate(variant, student.detach().float(), teacher, target)
    expected = expected * tiny * 65536 / 16
    torch.testing.assert_close(student.grad.double(), expected.double(), rtol=1e-3, atol=1e-6)
    assert (student.grad != 0).all()


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('num_classes', [2, 3, 50])
@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_logits_of_1e4_stay_finite_and_right(variant, pairs, num_classes, plain):
    student, teacher, target = make_batch(8, num_classes, pairs, scale=1e4)
    student, teacher = student.float(), teacher.float()
    value, gradient = evaluate(variant, student, teacher, target, plain)
    exact_value, exact_gradient = evaluate(variant, student.double(), teacher.double(), target, plain=True)
    assert value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(value.double(), exact_value, rtol=3e-5, atol=1e-9)
    assert (gradient.double() - exact_gradient).norm() <= 1e-3 * exact_gradient.norm() + 1e-9


def exact_dkd(student, teacher, target, alpha, beta, temperature):
    """DKD of one row by its definition, in Python floats and loops: never 1 - p."""
    def log_shares(logits):
        others = [z / temperature for i, z in enumerate(logits) if i != target]
        top = max(others)
        rest = top + math.log(math.fsum(math.exp(z - top) for z in others))
        own = logits[target] / temperature
        top = max(rest, own)
        everything = top + math.log(math.exp(rest - top) + math.exp(own - top))
        return own - everything, rest - everything, [z - rest for z in others]

    own_s, rest_s, within_s = log_shares(student)
    own_t, rest_t, within_t = log_shares(teacher)
    tckd = math.exp(own_t) * (own_t - own_s) + math.exp(rest_t) * (rest_t - rest_s)
    nckd = math.fsum(math.exp(t) * (t - s) for t, s in zip(within_t, within_s, strict=True))
    return temperature ** 2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('certain', ['student', 'teacher', 'both'])
@pytest.mark.parametrize('above', [15.0, 20.0, 1e4])
def test_dkd_is_right_in_float32_with_a_target_far_above_the_rest(above, certain, plain):
    student, teacher, target = make_batch(1, 10)
    for name, logits in (('student', student), ('teacher', teacher)):
        if certain in (name, 'both'):
            logits[0, target] = logits.max() + above
    student, teacher = student.float(), teacher.float()
    expected = exact_dkd(student[0].tolist(), teacher[0].tolist(), target.item(), 1.0, 0.5, 1.0)
    variant = ('dkd', {'temperature': 1.0, 'beta': 0.5})
    value, gradient = evaluate(variant, student, teacher, target, plain)
    assert value.item() == pytest.approx(expected, rel=3e-5)
    assert gradient.isfinite().all()


def test_kd_at_a_high_temperature_keeps_its_digits_in_float32():
    """Both logsumexps are near log(1000) = 6.9, the divergence is 0.003."""
    student, teacher, target = make_batch(16, 1000, scale=1.0)
    variant = ('kd', {'temperature': 20.0})
    value, _ = evaluate(variant, student.float(), teacher.float(), target)
    exact, _ = evaluate(variant, student.float().double(), teacher.float().double(), target, plain=True)
    assert value.item() == pytest.approx(exact.item(), rel=3e-5)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
def test_pair_of_two_classes_leaves_dkd_nothing_among_the_rest(plain):
    student, teacher, _ = make_batch(3, 2)
    pair = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    result = create(('dkd', {'temperature': 2.0}), plain)(student.requires_grad_(), teacher, pair)
    expected = 4 * F.kl_div(
        (student / 2).log_softmax(1), (teacher / 2).log_softmax(1), log_target=True, reduction='batchmean')
    assert result['nckd'].item() == 0
    assert result['tckd'].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize('variant', STANDARDISED, ids=name_of)
def test_logit_std_standardises_rows_before_the_temperature(variant):
    student, teacher, target = make_batch(4, 5)

    def standard(logits):
        return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))

    raw = (variant[0], {**variant[1], 'logit_std': False})
    student.requires_grad_()
    expected = create(raw, plain=True)(standard(student), standard(teacher), target)['kd_loss']
    if variant[0] == 'nkd':  # the soft term keeps raw logits
        soft = create(raw, plain=True)(student, teacher, target)['soft']
        expected = create(raw, plain=True)(standard(student), standard(teacher), target)['distributed'] * 1.5 + soft
    value, _ = evaluate(variant, student, teacher, target)
    torch.testing.assert_close(value, expected.detach())


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', STANDARDISED, ids=name_of)
def test_logit_std_of_a_constant_row_is_finite(variant, plain):
    student, teacher, target = make_batch(4, 5)
    student[1] = 3.0
    value, gradient = evaluate(variant, student, teacher, target, plain)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('at_target', [False, True], ids=['elsewhere', 'at_target'])
@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_nan_student_row_gives_nan(variant, at_target, pairs, plain):
    student, teacher, target = make_batch(pairs=pairs)
    labels = (target if target.ndim == 2 else F.one_hot(target, student.shape[1])) > 0
    student[2, (labels if at_target else ~labels)[2].nonzero()[0]] = math.nan
    value, _ = evaluate(variant, student, teacher, target, plain)
    assert value.isnan()
