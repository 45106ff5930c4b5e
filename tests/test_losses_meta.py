"""Teachers and training steps on the meta device, which holds no values, and forwards on a GPU that is not there.

To read one back (`.item()`, `bool(tensor)`), which makes the host wait for a GPU, is an error on the meta device, and
so is a tensor that was left on the CPU: a step that runs does neither, on any device. torch lets a tensor without
dimensions pass, which it copies to the GPU in each step: `NoneOfTheHost` does not.
"""
import contextlib

import pytest
import timm
import torch
from helpers import build
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_kd import KDTask, Teacher
from timm_kd.losses import KD_LOSSES, create_kd_loss
from timm_kd.meters import AgreementEvaluator, StepTotals, TeacherEvaluator
from timm_kd.teacher import create_teacher
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


class NoneOfTheHost(TorchDispatchMode):
    """Refuse operations that take or give tensors of the meta device and of another one, copies between them too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if 'meta' in devices and len(devices) > 1:
            raise AssertionError(f'{func} of {" and ".join(sorted(devices))}')
        return result


@pytest.fixture(scope='module')
def make_teacher(tmp_path_factory):
    """Make a teacher that has checked its first answer, as it does once in a run."""
    path = tmp_path_factory.mktemp('maps') / 'map.txt'
    path.write_text('\n'.join(map(str, [*range(CLASSES - 1), -1])))
    norm = {'mean': (0.1, 0.2, 0.3), 'std': (0.2, 0.3, 0.4)}
    kinds = {
        'teacher': lambda **options: Teacher(build(), CLASSES, **norm, **options),
        'resized': lambda **options: Teacher(build('test_vit'), CLASSES, **norm, img_size=64, **options),
        'class map': lambda **options: Teacher(
            build(), CLASSES, **norm, class_map=path, class_map_missing='mask', **options),
        'ensemble': lambda **options: create_teacher([build(), build('test_vit')], CLASSES, **norm, **options),
        'stored logits': lambda dtype: Stored(RowLayout(CLASSES)),
        'stored largest logits': lambda dtype: Stored(RowLayout(CLASSES, topk=3)),
    }

    def make(kind, dtype='float32'):
        teacher = kinds[kind](dtype=dtype)
        teacher(torch.zeros(BATCH, 3, 32, 32))
        return teacher
    return make


def on_a_gpu(teacher, mode):
    """Return what a teacher does on CUDA, as a function of the images."""
    tensors = (*teacher.named_parameters(), *teacher.named_buffers())
    state = {name: mode.from_tensor(tensor).to('cuda') for name, tensor in tensors}
    return lambda images: functional_call(teacher, state, (images,))


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
        target = mixup_target(target, CLASSES, 0.7, 0.1)
    with NoneOfTheHost():
        for batch in range(2):
            result = task(images, target)
            result['loss'].backward()
            dispatch_clip_grad(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            totals.update(result, result['loss'], divisor=2, batch_idx=batch, samples=BATCH)
    return totals


def test_reading_a_value_back_is_an_error_on_the_meta_device_and_on_a_gpu_that_is_not_there():
    with pytest.raises(RuntimeError):
        bool(torch.empty((), device=META) > 0)
    with pytest.raises(RuntimeError):
        torch.empty(3, device=META) + torch.ones(3)
    torch.empty(3, device=META) + torch.ones(())
    with pytest.raises(AssertionError, match='aten.add.Tensor of cpu and meta'), NoneOfTheHost():
        torch.empty(3, device=META) + torch.ones(())
    with pytest.raises(DataDependentOutputException), FakeTensorMode():
        torch.empty((), device='cuda').item()


LIVE = ['teacher', 'resized', 'class map', 'ensemble']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'amp'])
@pytest.mark.parametrize('kind', LIVE)
def test_teacher_of_each_precision_reads_nothing_back(make_teacher, kind, dtype):
    teacher = make_teacher(kind, dtype).to(META)
    with NoneOfTheHost():
        logits = teacher(torch.empty(BATCH, 3, 32, 32, device=META))
    assert logits.shape == (BATCH, teacher.num_classes) and logits.dtype == torch.float32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('kind', LIVE)
def test_teacher_of_each_precision_goes_through_on_a_gpu(make_teacher, kind, dtype):
    teacher = make_teacher(kind, dtype)
    with FakeTensorMode() as mode:
        logits = on_a_gpu(teacher, mode)(torch.empty(BATCH, 3, 32, 32, device='cuda'))
    assert logits.device.type == 'cuda' and logits.shape == (BATCH, teacher.num_classes)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize('plain', [False, True], ids=['closed', 'plain'])
@pytest.mark.parametrize('mixed', [False, True], ids=['hard', 'mixed'])
@pytest.mark.parametrize('name', KD_LOSSES)
def test_step_of_each_loss_reads_nothing_back(make_teacher, name, mixed, plain):
    teacher = make_teacher('teacher').to(META) if KD_LOSSES[name].needs_teacher else None
    totals = train_step(name, teacher, mixed, double_backward=plain)
    assert totals.sums.device == META
    assert {'loss', 'task_loss', 'kd_loss', *KD_LOSSES[name].component_names} == set(totals.names)


@pytest.mark.parametrize('name', [name for name in TEACHED if 'logit_std' in KD_LOSSES[name].hyper_parameters()])
def test_step_with_standardised_logits_reads_nothing_back(make_teacher, name):
    train_step(name, make_teacher('teacher').to(META), mixed=True, logit_std=True)


@pytest.mark.parametrize('mixed', [False, True], ids=['hard', 'mixed'])
@pytest.mark.parametrize('kind', ['class map', 'ensemble', 'stored logits', 'stored largest logits'])
@pytest.mark.parametrize('name', TEACHED)
def test_step_with_each_kind_of_teacher_reads_nothing_back(make_teacher, name, kind, mixed):
    train_step(name, make_teacher(kind).to(META), mixed)


def test_step_of_plain_sgd_reads_nothing_back(make_teacher):
    train_step('kd', make_teacher('teacher').to(META), mixed=False, opt='momentum')


@pytest.mark.parametrize('options', [{}, {'dtype': 'float32'}, {'topk': 3}], ids=['float16', 'float32', 'largest'])
def test_packing_logits_reads_nothing_back(options):
    layout = RowLayout(CLASSES, **options)
    with NoneOfTheHost():
        assert layout.pack(torch.empty(BATCH, CLASSES, device=META)).shape == (BATCH, layout.row_bytes)


def test_validation_reads_nothing_back_before_its_end():
    target = torch.empty(BATCH, dtype=torch.int64, device=META)
    expected = torch.empty(2 * BATCH, dtype=torch.int64, device=META)
    student = AgreementEvaluator(expected, META, max_samples=2 * BATCH - 1)
    teacher = TeacherEvaluator(2, META, max_samples=2 * BATCH - 1)
    with NoneOfTheHost():
        for _ in range(2):
            student.update(torch.empty(BATCH, CLASSES, device=META), target)
            teacher.update(torch.empty(BATCH, 2, CLASSES, device=META), target)
    assert teacher.predictions().shape == (2 * BATCH,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        student.compute()


@contextlib.contextmanager
def autocast_of_a_gpu_that_is_not_there():
    """Fake tensors may be on CUDA, under its float16 autocast: `torch.autocast` itself does nothing without a GPU."""
    was_on, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    with FakeTensorMode() as mode:
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', torch.float16)
        try:
            yield mode
        finally:
            torch.set_autocast_enabled('cuda', was_on)
            torch.set_autocast_dtype('cuda', dtype)
            torch.clear_autocast_cache()


def forward_on_a_gpu(name, mixed, teacher=None):
    """Return what the task does with a batch."""
    student = timm.create_model('test_resnet', num_classes=CLASSES, device='cuda')
    task = KDTask(student, create_kd_loss(name), teacher, smoothing=0.1 if mixed else 0.0, device=torch.device('cuda'))
    target = torch.zeros(BATCH, dtype=torch.int64, device='cuda')
    if mixed:
        target = mixup_target(target, CLASSES, 0.7, 0.1)
    return task(torch.empty(BATCH, 3, 32, 32, device='cuda'), target)


def check_precisions(result):
    output = result.pop('output')
    assert output.device.type == 'cuda' and output.dtype == torch.float16  # the autocast acts
    assert {(each.device.type, each.dtype) for each in result.values()} == {('cuda', torch.float32)}


@pytest.mark.parametrize('mixed', [False, True], ids=['hard', 'mixed'])
@pytest.mark.parametrize('name', [name for name, loss in KD_LOSSES.items() if not loss.needs_teacher])
def test_forward_under_float16_autocast_goes_through_on_a_gpu(name, mixed):
    """Forward alone: backward asks for a CUDA context."""
    with autocast_of_a_gpu_that_is_not_there():
        check_precisions(forward_on_a_gpu(name, mixed))


@pytest.mark.parametrize('mixed', [False, True], ids=['hard', 'mixed'])
@pytest.mark.parametrize(('dtype', 'inside'), [('bfloat16', torch.bfloat16), ('amp', torch.float16)])
@pytest.mark.parametrize('name', TEACHED)
def test_forward_with_a_teacher_under_float16_autocast_goes_through_on_a_gpu(make_teacher, name, dtype, inside, mixed):
    teacher, precisions = make_teacher('teacher', dtype), []
    teacher.model.register_forward_hook(lambda module, images, logits: precisions.append(logits.dtype))
    with autocast_of_a_gpu_that_is_not_there() as mode:
        check_precisions(forward_on_a_gpu(name, mixed, on_a_gpu(teacher, mode)))
    assert precisions == [inside]
