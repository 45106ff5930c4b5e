"""What must hold of the losses for any input: closed form and formula, derivatives, identities, symmetries."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_cases import VARIANTS, evaluate, kd_term, make_batch, name_of
from torch.autograd import gradcheck, gradgradcheck


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
    assert gradcheck(lambda logits: kd_term(variant, logits, teacher, target), student.requires_grad_())


@pytest.mark.parametrize('pairs', [False, True], ids=['hard', 'pairs'])
@pytest.mark.parametrize('variant', [variant for variant in VARIANTS if variant[0] != 'tfnkd'], ids=name_of)
def test_plain_formula_has_the_numerical_second_derivative(variant, pairs):
    student, teacher, target = make_batch(2, 4, pairs)
    assert gradgradcheck(lambda logits: kd_term(variant, logits, teacher, target, plain=True), student.requires_grad_())


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
