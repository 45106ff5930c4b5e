"""What the tests of the losses share: their variants, random batches, and one evaluation."""
import torch
import torch.nn.functional as F

from timm_kd.losses import KD_LOSSES, create_kd_loss

VARIANTS = [
    ('kd', {}), ('kd', {'logit_std': True}),
    ('dkd', {'temperature': 2.0}), ('dkd', {'temperature': 2.0, 'logit_std': True}),
    ('nkd', {}), ('nkd', {'temperature': 3.0}), ('nkd', {'temperature': 2.0, 'logit_std': True}),
    ('tfnkd', {}), ('tfkd', {}), ('tfkd', {'temperature': 5.0, 'with_teacher': True}),
]
STANDARDISED = [variant for variant in VARIANTS if variant[1].get('logit_std')]


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
