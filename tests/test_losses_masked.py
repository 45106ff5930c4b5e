"""Classes a teacher does not know: -inf logits."""
import math

import pytest
import torch
import torch.nn.functional as F
from losses_cases import STANDARDISED, UNMASKED, create, evaluate, make_batch, name_of


def masked_batch():
    """Return a batch whose teacher lacks class 3, which no row shows."""
    student, teacher, _ = make_batch(4, 6)
    teacher[:, 3] = -math.inf
    return student, teacher, torch.tensor([0, 1, 2, 5])


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', UNMASKED, ids=name_of)
def test_masked_class_counts_as_probability_zero(variant, plain):
    """-inf is the limit of ever smaller logits."""
    student, teacher, target = masked_batch()
    value, gradient = evaluate(variant, student, teacher, target, plain)
    value_at_limit, gradient_at_limit = evaluate(variant, student, teacher.clamp(min=-1e5), target, plain)
    torch.testing.assert_close(value, value_at_limit, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, gradient_at_limit, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', UNMASKED, ids=name_of)
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


@pytest.mark.parametrize('variant', STANDARDISED, ids=name_of)
def test_logit_std_refuses_masked_classes(variant):
    with pytest.raises(ValueError, match='logit_std cannot standardise'):
        evaluate(variant, *masked_batch())


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('variant', UNMASKED, ids=name_of)
def test_nan_student_row_of_a_masked_class_gives_nan_too(variant, plain):
    student, teacher, target = masked_batch()
    target[0], student[0, 1] = 3, math.nan
    value, _ = evaluate(variant, student, teacher, target, plain)
    assert value.isnan()
