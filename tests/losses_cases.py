"""What the tests of the losses share: their variants, random batches, and one evaluation."""
import torch
import torch.nn.functional as F

from timm_kd.losses import KD_LOSSES, create_kd_loss


def _variants(name, loss):
    """Return a loss with its defaults, at another temperature, with standardised logits, with an optional teacher."""
    variants = [{}]
    if 'temperature' in loss.hyper_parameters():
        variants.append({'temperature': 2.0})
    if 'logit_std' in loss.hyper_parameters():
        variants.append({'temperature': 2.0, 'logit_std': True})
    if loss.accepts_teacher and not loss.needs_teacher:
        variants.append({'with_teacher': True})
    return [(name, params) for params in variants]


VARIANTS = [variant for name, loss in KD_LOSSES.items() for variant in _variants(name, loss)]
STANDARDISED = [variant for variant in VARIANTS if variant[1].get('logit_std')]


def name_of(variant):
    return '-'.join([variant[0], *variant[1]]) if isinstance(variant, tuple) else None


def create(variant, plain=False):
    name, params = variant
    params = {key: value for key, value in params.items() if key != 'with_teacher'}
    return create_kd_loss(name, double_backward=plain, **params)


def takes_teacher(variant):
    return KD_LOSSES[variant[0]].needs_teacher or variant[1].get('with_teacher', False)


UNMASKED = [variant for variant in VARIANTS if takes_teacher(variant) and variant not in STANDARDISED]  # no -inf


def kd_term(variant, student, teacher, target, plain=False):
    """Return `kd_loss` of a new loss."""
    return create(variant, plain)(student, teacher if takes_teacher(variant) else None, target)['kd_loss']


def evaluate(variant, student, teacher, target, plain=False):
    """Return `kd_loss` and its gradient."""
    student = student.detach().requires_grad_()
    value = kd_term(variant, student, teacher, target, plain)
    value.backward()
    return value.detach(), student.grad


def make_batch(batch_size=6, num_classes=7, pairs=False, seed=0, scale=2.0, dtype=torch.float64, device='cpu'):
    """Return student and teacher logits, and hard or mixed targets (one row of a mixed batch is unmixed)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(batch_size, num_classes, dtype=dtype, generator=generator).to(device) for _ in range(2))
    target = torch.randint(num_classes, (batch_size,), generator=generator).to(device)
    if not pairs:
        return student, teacher, target
    lam = torch.rand(batch_size, 1, dtype=torch.float64, generator=generator)
    lam[0] = 1
    onehot = F.one_hot(target, num_classes).double()
    return student, teacher, lam * onehot + (1 - lam) * onehot.roll(1, 0)
