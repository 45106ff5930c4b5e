"""Training steps on the meta device, which holds no values.

To read one back (`.item()`, `bool(tensor)`), which makes the host wait for a GPU, is an error there, and so is a tensor
that was left on the CPU: a step that runs does neither, on any device.
"""
import pytest
import timm
import torch
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import nn

from timm_kd import KDTask, Teacher
from timm_kd.losses import KD_LOSSES, create_kd_loss
from timm_kd.meters import StepTotals
from timm_kd.teacher import TeacherEnsemble
from timm_kd.teacher_cache.layout import RowLayout

BATCH, CLASSES = 4, 10
META = torch.device('meta')
TEACHED = [name for name, loss in KD_LOSSES.items() if loss.accepts_teacher]


class Stored(nn.Module):
    """Answer as a cache does: rows of bytes, unpacked on the device."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, images):
        return self.layout.unpack(torch.zeros(BATCH, self.layout.row_bytes, dtype=torch.uint8, device=images.device))


@pytest.fixture(scope='module')
def make_teacher(tmp_path_factory):
    """Make a teacher on the meta device that has checked its first answer, as it does once in a run."""
    path = tmp_path_factory.mktemp('maps') / 'map.txt'
    path.write_text('\n'.join(map(str, [*range(CLASSES - 1), -1])))

    def one(**options):
        model = timm.create_model('test_resnet', num_classes=CLASSES)
        return Teacher(model, CLASSES, mean=(0.3,) * 3, std=(0.4,) * 3, dtype='float32', **options)

    kinds = {
        'teacher': one,
        'class map': lambda: one(class_map=path, class_map_missing='mask'),
        'ensemble': lambda: TeacherEnsemble([one(), one()]),
        'stored logits': lambda: Stored(RowLayout(CLASSES)),
        'stored largest logits': lambda: Stored(RowLayout(CLASSES, topk=3)),
    }

    def make(kind):
        teacher = kinds[kind]()
        teacher(torch.zeros(BATCH, 3, 32, 32))
        return teacher.to(META)
    return make


def train_step(name, teacher, mixed, opt='adamw', **params):
    """Do with two batches all that the loop does; return the summed scalars."""
    student = timm.create_model('test_resnet', num_classes=CLASSES, device=META)
    task = KDTask(
        student, create_kd_loss(name, **params), teacher=teacher, smoothing=0.1 if mixed else 0.0, warmup_epochs=4,
        device=META,
    )
    task.set_epoch(1)
    optimizer = create_optimizer_v2(student, opt=opt, lr=0.1, foreach=True)
    totals = StepTotals(META)
    images, target = torch.empty(BATCH, 3, 32, 32, device=META), torch.zeros(BATCH, dtype=torch.int64, device=META)
    if mixed:
        target = torch.empty_like(mixup_target(torch.arange(BATCH), CLASSES, 0.7, 0.1), device=META)
    for batch in range(2):
        result = task(images, target)
        result['loss'].backward()
        dispatch_clip_grad(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        totals.update(result, result['loss'], divisor=2, batch_idx=batch, samples=BATCH)
    return totals


def test_reading_a_value_back_is_an_error_on_the_meta_device():
    with pytest.raises(RuntimeError):
        bool(torch.empty((), device=META) > 0)
    with pytest.raises(RuntimeError):
        torch.empty(3, device=META) + torch.ones(3)


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('mixed', [False, True], ids=['hard', 'mixed'])
@pytest.mark.parametrize('name', KD_LOSSES)
def test_step_of_each_loss_reads_nothing_back(make_teacher, name, mixed, plain):
    teacher = make_teacher('teacher') if KD_LOSSES[name].needs_teacher else None
    totals = train_step(name, teacher, mixed, double_backward=plain)
    assert totals.sums.device == META
    assert {'loss', 'task_loss', 'kd_loss', *KD_LOSSES[name].component_names} == set(totals.names)


@pytest.mark.parametrize('name', [name for name in TEACHED if 'logit_std' in KD_LOSSES[name].hyper_parameters()])
def test_step_with_standardised_logits_reads_nothing_back(make_teacher, name):
    train_step(name, make_teacher('teacher'), mixed=True, logit_std=True)


@pytest.mark.parametrize('mixed', [False, True], ids=['hard', 'mixed'])
@pytest.mark.parametrize('kind', ['class map', 'ensemble', 'stored logits', 'stored largest logits'])
@pytest.mark.parametrize('name', TEACHED)
def test_step_with_each_kind_of_teacher_reads_nothing_back(make_teacher, name, kind, mixed):
    train_step(name, make_teacher(kind), mixed)


def test_step_of_plain_sgd_reads_nothing_back(make_teacher):
    train_step('kd', make_teacher('teacher'), mixed=False, opt='momentum')
