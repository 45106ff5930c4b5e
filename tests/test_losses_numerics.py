"""The losses under every precision and at the extremes, and what must hold of them for any input."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from timm_kd.losses import KD_LOSSES, create_kd_loss

VARIANTS = [
    ('kd', {}), ('kd', {'logit_std': True}),
    ('dkd', {'temperature': 2.0}), ('dkd', {'temperature': 2.0, 'logit_std': True}),
    ('nkd', {}), ('nkd', {'temperature': 3.0}), ('nkd', {'temperature': 2.0, 'logit_std': True}),
    ('tfnkd', {}), ('tfkd', {}), ('tfkd', {'temperature': 5.0, 'with_teacher': True}),
]
UNMASKABLE = [variant for variant in VARIANTS if variant[1].get('logit_std')]
WITH_TEACHER = [('kd', {}), ('dkd', {}), ('nkd', {}), ('nkd', {'temperature': 3.0})]


def name_of(variant):
    return '-'.join([variant[0], *variant[1]]) if isinstance(variant, tuple) else None


def create(variant, plain=False):
    name, params = variant
    kd_loss = create_kd_loss(name, **{key: value for key, value in params.items() if key != 'with_teacher'})
    kd_loss.double_backward = plain
    return kd_loss


def takes_teacher(variant):
    return KD_LOSSES[variant[0]].needs_teacher or variant[1].get('with_teacher', False)


def evaluate(variant, student, teacher, target, plain=False):
    """`kd_loss` and its gradient."""
    student = student.detach().requires_grad_()
    value = create(variant, plain)(student, teacher if takes_teacher(variant) else None, target)['kd_loss']
    value.backward()
    return value.detach(), student.grad


def make_batch(batch_size=6, num_classes=7, pairs=False, seed=0, scale=2.0):
    """Student and teacher logits, float64, and hard or mixed targets (one row of a mixed batch is a single class)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(batch_size, num_classes, dtype=torch.float64, generator=generator) for _ in range(2))
    target = torch.randint(num_classes, (batch_size,), generator=generator)
    if not pairs:
        return student, teacher, target
    lam = torch.rand(batch_size, 1, dtype=torch.float64, generator=generator)
    lam[0] = 1
    onehot = F.one_hot(target, num_classes).double()
    return student, teacher, lam * onehot + (1 - lam) * onehot.roll(1, 0)


@pytest.mark.parametrize('shape', [(6, 7), (5, 2), (1, 4)], ids=str)
@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_closed_form_is_the_plain_formula_with_its_gradient(variant, pairs, shape):
    batch = make_batch(*shape, pairs=pairs)
    value, gradient = evaluate(variant, *batch)
    plain_value, plain_gradient = evaluate(variant, *batch, plain=True)
    torch.testing.assert_close(value, plain_value, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-10, atol=1e-13)


# tfnkd's weights are detached, so its gradient is not that of its value: see the test above and the official figures.
@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('variant', [variant for variant in VARIANTS if variant[0] != 'tfnkd'], ids=name_of)
def test_gradient_is_the_numerical_one(variant, pairs):
    student, teacher, target = make_batch(4, 5, pairs)
    kd_loss = create(variant)
    teacher = teacher if takes_teacher(variant) else None
    assert gradcheck(lambda logits: kd_loss(logits, teacher, target)['kd_loss'], student.requires_grad_())


@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('variant', [variant for variant in VARIANTS if variant[0] != 'tfnkd'], ids=name_of)
def test_plain_formula_has_the_numerical_second_derivative(variant, pairs):
    student, teacher, target = make_batch(2, 4, pairs)
    kd_loss = create(variant, plain=True)
    teacher = teacher if takes_teacher(variant) else None
    assert gradgradcheck(lambda logits: kd_loss(logits, teacher, target)['kd_loss'], student.requires_grad_())


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_closed_form_refuses_a_double_backward(variant):
    student, teacher, target = make_batch()
    kd_loss = create(variant)
    value = kd_loss(student.requires_grad_(), teacher if takes_teacher(variant) else None, target)['kd_loss']
    with pytest.raises(RuntimeError, match='no double backward .* `kd_loss.double_backward = True`'):
        torch.autograd.grad(value, student, create_graph=True)


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_backward_runs_twice_with_retain_graph(variant):
    student, teacher, target = make_batch()
    value = create(variant)(student.requires_grad_(), teacher if takes_teacher(variant) else None, target)['kd_loss']
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
    student, teacher, target = (tensor.float() if tensor.is_floating_point() else tensor for tensor in make_batch())
    value, gradient = evaluate(variant, student, teacher, target, plain)
    with torch.autocast('cpu', torch.bfloat16):
        cast_value, cast_gradient = evaluate(variant, student, teacher, target, plain)
    assert torch.equal(value, cast_value)
    assert torch.equal(gradient, cast_gradient)


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_grad_scaler_saves_gradients_that_float16_cannot_hold(variant):
    """A gradient of 1e-8 underflows in float16 unless the scale comes before the cast."""
    student, teacher, target = make_batch()
    student = student.half().requires_grad_()
    tiny = 1e-4
    value = create(variant)(student, teacher if takes_teacher(variant) else None, target)['kd_loss']
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


def masked_batch():
    """A teacher that lacks class 3; nothing shows class 3."""
    student, teacher, _ = make_batch(4, 6)
    teacher[:, 3] = -math.inf
    return student, teacher, torch.tensor([0, 1, 2, 5])


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', WITH_TEACHER, ids=name_of)
def test_masked_class_counts_as_probability_zero(variant, plain):
    """-inf is the limit of ever smaller logits."""
    student, teacher, target = masked_batch()
    value, gradient = evaluate(variant, student, teacher, target, plain)
    value_at_limit, gradient_at_limit = evaluate(variant, student, teacher.clamp(min=-1e5), target, plain)
    torch.testing.assert_close(value, value_at_limit, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, gradient_at_limit, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', WITH_TEACHER, ids=name_of)
def test_row_of_a_masked_class_has_no_term_and_still_counts_in_the_mean(variant, plain):
    student, teacher, target = masked_batch()
    known_value, known_gradient = evaluate(variant, student[1:], teacher[1:], target[1:], plain)
    target[0] = 3
    value, gradient = evaluate(variant, student, teacher, target, plain)
    torch.testing.assert_close(value, known_value * 3 / 4)
    torch.testing.assert_close(gradient[1:], known_gradient * 3 / 4)
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('lam', [0.7, 0.3])
@pytest.mark.parametrize('variant', [('kd', {}), ('dkd', {})], ids=name_of)
def test_mixed_row_with_one_masked_class_has_no_term(variant, lam, plain):
    student, teacher, target = masked_batch()
    mixed = F.one_hot(target, 6).double()
    mixed[0] = lam * mixed[0] + (1 - lam) * F.one_hot(torch.tensor(3), 6)
    known_value, _ = evaluate(variant, student[1:], teacher[1:], mixed[1:], plain)
    value, gradient = evaluate(variant, student, teacher, mixed, plain)
    torch.testing.assert_close(value, known_value * 3 / 4)
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', [('dkd', {}), ('nkd', {}), ('nkd', {'temperature': 3.0})], ids=name_of)
def test_row_whose_other_classes_are_all_masked_has_no_term_among_them(variant, plain):
    student, teacher, target = masked_batch()
    teacher[0] = teacher[0].where(torch.arange(6) == target[0], -math.inf)
    result = create(variant, plain)(student.requires_grad_(), teacher, target)
    others = create(variant, plain)(student[1:], teacher[1:], target[1:])
    component = 'nckd' if variant[0] == 'dkd' else 'distributed'
    torch.testing.assert_close(result[component], others[component] * 3 / 4)
    assert torch.autograd.grad(result['kd_loss'], student)[0].isfinite().all()


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
def test_pair_of_two_classes_leaves_dkd_nothing_among_the_rest(plain):
    student, teacher, _ = make_batch(3, 2)
    pair = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    result = create(('dkd', {'temperature': 2.0}), plain)(student.requires_grad_(), teacher, pair)
    expected = 4 * F.kl_div(
        (student / 2).log_softmax(1), (teacher / 2).log_softmax(1), log_target=True, reduction='batchmean')
    assert result['nckd'].item() == 0
    assert result['tckd'].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize('variant', UNMASKABLE, ids=name_of)
def test_logit_std_refuses_masked_classes(variant):
    with pytest.raises(ValueError, match='logit_std cannot standardise'):
        evaluate(variant, *masked_batch())


@pytest.mark.parametrize('variant', UNMASKABLE, ids=name_of)
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
@pytest.mark.parametrize('variant', UNMASKABLE, ids=name_of)
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


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', WITH_TEACHER, ids=name_of)
def test_nan_student_row_of_a_masked_class_gives_nan_too(variant, plain):
    student, teacher, target = masked_batch()
    target[0], student[0, 1] = 3, math.nan
    value, _ = evaluate(variant, student, teacher, target, plain)
    assert value.isnan()


@st.composite
def batches(draw, pairs=None):
    """Batches of any small shape, scale and kind of target."""
    return make_batch(
        draw(st.integers(1, 5)),
        draw(st.integers(2, 9)),
        draw(st.booleans()) if pairs is None else pairs,
        draw(st.integers(0, 2 ** 16)),
        draw(st.sampled_from([0.1, 1.0, 5.0, 20.0])),
    )


temperatures = st.sampled_from([0.5, 1.0, 4.0, 20.0])
few = settings(max_examples=25, deadline=None, derandomize=True)
close = {'rtol': 1e-8, 'atol': 1e-10}


@few
@given(batches(pairs=False), temperatures)
def test_dkd_with_the_teachers_rest_as_beta_is_kd_row_by_row(batch, temperature):
    student, teacher, target = batch
    rest = 1 - (teacher / temperature).softmax(1).gather(1, target[:, None])
    for row in range(len(target)):
        rows = slice(row, row + 1)
        dkd = ('dkd', {'temperature': temperature, 'alpha': 1.0, 'beta': rest[row].clamp(min=0).item()})
        value, gradient = evaluate(dkd, student[rows], teacher[rows], target[rows])
        kd_value, kd_gradient = evaluate(
            ('kd', {'temperature': temperature}), student[rows], teacher[rows], target[rows])
        torch.testing.assert_close(value, kd_value, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(gradient, kd_gradient, rtol=1e-7, atol=1e-7)


@few
@given(batches(), temperatures, st.sampled_from(['kd', 'dkd']))
def test_nothing_to_learn_from_an_equal_teacher(batch, temperature, name):
    student, _, target = batch
    value, gradient = evaluate((name, {'temperature': temperature}), student, student.clone(), target)
    assert abs(value) < 1e-10
    assert gradient.abs().max() < 1e-10


@few
@given(batches(), st.sampled_from(VARIANTS), st.sampled_from([-30.0, 0.5, 100.0]))
def test_shifting_a_row_changes_nothing(batch, variant, shift):
    student, teacher, target = batch
    value, gradient = evaluate(variant, student, teacher, target)
    shifted_value, shifted_gradient = evaluate(variant, student + shift, teacher - 2 * shift, target)
    torch.testing.assert_close(shifted_value, value, **close)
    torch.testing.assert_close(shifted_gradient, gradient, **close)


@few
@given(batches(), st.sampled_from(VARIANTS), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_gradient(batch, variant, random):
    student, teacher, target = batch
    order = torch.tensor(random.sample(range(student.shape[1]), student.shape[1]))
    permuted = order.argsort()[target] if target.ndim == 1 else target[:, order]
    value, gradient = evaluate(variant, student, teacher, target)
    permuted_value, permuted_gradient = evaluate(variant, student[:, order], teacher[:, order], permuted)
    torch.testing.assert_close(permuted_value, value, **close)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], **close)


@few
@given(batches(pairs=False), st.sampled_from(VARIANTS))
def test_pair_with_lam_one_is_the_hard_target(batch, variant):
    student, teacher, target = batch
    value, gradient = evaluate(variant, student, teacher, target)
    dense_value, dense_gradient = evaluate(
        variant, student, teacher, F.one_hot(target, student.shape[1]).double())
    torch.testing.assert_close(dense_value, value, **close)
    torch.testing.assert_close(dense_gradient, gradient, **close)
