"""What makes a teacher fast changes no answer: folded batch norms, a compiled forward, images handed on as they are."""

import logging
import shutil

import pytest
import timm
import torch
from timm.data import ImageDataset
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.functional import to_tensor

from timm_kd.losses import create_kd_loss
from timm_kd.task import KDTask
from timm_kd.teacher import Teacher, create_teacher
from timm_kd.teacher.adapt import InputAdapter

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(name: str = 'test_resnet', seed: int = 0) -> nn.Module:
    """A model whose batch norms have the statistics of no new one."""
    torch.manual_seed(seed)
    return with_statistics(timm.create_model(name, num_classes=7))


def with_statistics(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for norm in batch_norms(model):
            for tensor, low, high in (
                (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2.0), (norm.bias, -0.5, 0.5),
                (norm.weight, 0.5, 1.5),
            ):
                tensor.uniform_(low, high)
    return model.eval()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def assert_answers_as(teacher: Teacher, model: nn.Module) -> None:
    expected = model(IMAGES)
    torch.testing.assert_close(teacher(IMAGES), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(('name', 'share_left'), [
    ('test_resnet', 0), ('test_efficientnet', 0), ('regnetx_002', 0),
    ('mobilenetv3_small_050', 0.5), ('repghostnet_050', 0.5),
])
def test_folded_teacher_answers_as_its_model_and_keeps_few_batch_norms_or_none(name, share_left):
    teacher, model = Teacher(build(name), 7, dtype='float32'), build(name)
    assert teacher.folded and len(batch_norms(teacher.model)) <= share_left * len(batch_norms(model))
    assert_answers_as(teacher, model)


def validation_images(digits) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [(to_tensor(image), label) for image, label in ImageDataset(str(digits / 'validation'))]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-4), ('bfloat16', 0.01)])
def test_trained_teacher_keeps_its_logits_and_its_accuracy(digits, digits_teacher, dtype, tolerance):
    images, labels = validation_images(digits)
    raw = {'mean': (0.0,) * 3, 'std': (1.0,) * 3}  # of pixels in [0, 1]
    exact = Teacher(str(digits_teacher), 10, **raw, dtype='float32', fold_bn=False)(images)
    teacher = Teacher(str(digits_teacher), 10, **raw, dtype=dtype)
    assert teacher.folded
    logits = teacher(images)
    assert (logits - exact).abs().max() < tolerance * (exact.max() - exact.min() if dtype == 'bfloat16' else 1)
    assert logits.argmax(1).eq(labels).sum() == exact.argmax(1).eq(labels).sum() > 80


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_fingerprint_is_that_of_the_weights_as_loaded(dtype):
    folded, loaded = (Teacher(build(), 7, dtype=dtype, fold_bn=fold_bn) for fold_bn in (True, False))
    assert folded.folded and not loaded.folded
    assert folded.fingerprint() == loaded.fingerprint()
    assert folded.fingerprint() != Teacher(build(seed=1), 7, dtype=dtype).fingerprint()


def test_folding_leaves_the_given_module_and_the_random_stream_alone():
    model = build()
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Teacher(model, 7, dtype='bfloat16')
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_folded_model_keeps_its_class_and_attributes():
    model = build()
    teacher = Teacher(model, 7)
    assert type(teacher.model) is type(model) and teacher.model.pretrained_cfg == model.pretrained_cfg
    assert teacher.num_params == sum(p.numel() for p in model.parameters())
    assert 'batch norms folded' in teacher.describe()
    assert 'folded' not in Teacher(build(), 7, fold_bn=False).describe()


def test_teacher_in_the_autocast_of_the_student_runs_the_model_as_it_is():
    assert not Teacher(build(), 7, dtype='amp').folded


class Branches(nn.Module):
    """A forward that looks at its values, as `torch.fx` cannot."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 7)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.head((x if x.mean() > 0 else x.relu()).mean((2, 3)))


class SharesConvolution(nn.Module):
    """One convolution before two batch norms: folded into it, the second would be on top of the first."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 7)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.head(self.two(self.conv(self.one(self.conv(x)))).mean((2, 3)))


@pytest.mark.parametrize(('model', 'reason'), [(Branches, 'control flow'), (SharesConvolution, 'off by')])
def test_model_that_cannot_be_folded_runs_as_before_with_one_debug_line(model, reason, caplog):
    torch.manual_seed(0)
    model = with_statistics(model())
    with caplog.at_level(logging.DEBUG, 'timm_kd'):
        teacher = Teacher(model, 7, dtype='float32')
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert not teacher.folded and teacher.model is model
    assert_answers_as(teacher, model)


# compiled

def test_compiled_teacher_says_so_and_answers_alike():
    alone = Teacher(build(), 7, dtype='float32')(IMAGES)
    teacher = Teacher(build(), 7, dtype='float32').compile(backend='aot_eager')
    torch.testing.assert_close(teacher(IMAGES), alone)
    assert 'compiled by aot_eager' in teacher.describe()


@pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs g++ on the CPU')
def test_frozen_weights_are_those_of_each_member_of_an_ensemble():
    def small(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

    plain = create_teacher([small(0), small(1)], 7, dtype='float32')
    compiled = create_teacher([small(0), small(1)], 7, dtype='float32', compile_backend='inductor')
    torch.testing.assert_close(compiled(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)
    assert not torch._inductor.config.freezing
    before = compiled(IMAGES)
    for member in compiled.members:
        nn.init.zeros_(member.model[-1].weight)
    assert torch.equal(compiled(IMAGES), before)  # constants of the compiled code


def test_failure_of_the_compiler_is_one_warning_and_the_eager_teacher(caplog):
    def broken(graph, inputs):
        raise OSError('no compiler here')

    alone = Teacher(build(), 7, dtype='float32')(IMAGES)
    teacher = Teacher(build(), 7, dtype='float32', compile_backend=broken)
    with caplog.at_level(logging.WARNING, 'timm_kd'):
        assert torch.equal(teacher(IMAGES), alone) and torch.equal(teacher(IMAGES), alone)
    assert len(caplog.records) == 1 and 'runs uncompiled, torch.compile failed' in caplog.text


def test_answers_outlive_the_memory_that_a_compiled_forward_uses_again():
    """As with CUDA graphs, whose output is overwritten by the next call."""
    memory = torch.empty(4, 7)

    def reuses_its_output(graph, inputs):
        return lambda *args: (memory.copy_(graph(*args)[0]),)

    teacher = Teacher(build(), 7, dtype='float32', compile_backend=reuses_its_output)
    first = teacher(IMAGES)
    kept = first.clone()
    teacher(-IMAGES)
    assert torch.equal(first, kept) and not torch.equal(memory, kept)


def test_torchcompile_leaves_a_compiled_teacher_its_backend():
    teacher = Teacher(build(), 7, compile_backend='aot_eager')
    task = KDTask(build('test_efficientnet'), create_kd_loss('kd'), teacher=teacher, verbose=False)
    task.compile(backend='eager')
    assert 'compiled by aot_eager' in teacher.describe()


def test_script_compiles_the_teacher_alone(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --teacher-compile aot_eager')
    assert any('compiled by aot_eager' in line and 'batch norms folded' in line for line in run.log)
    assert not any('runs uncompiled' in line for line in run.log)


# images

@pytest.mark.parametrize(('dtype', 'student', 'teacher'), [
    (torch.float32, torch.channels_last, True), (torch.bfloat16, torch.channels_last, True),
    (torch.float32, torch.contiguous_format, False), (torch.float32, torch.channels_last, False),
])
def test_images_that_suit_the_teacher_are_not_copied(dtype, student, teacher):
    images = IMAGES.to(dtype, memory_format=student)
    norm = ((0.5,) * 3, (0.5,) * 3)
    assert InputAdapter(3, *norm, 3, *norm, dtype=dtype, channels_last=teacher)(images) is images


@pytest.mark.parametrize('size', [None, (32, 32)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_images_leave_in_the_precision_and_the_layout_of_a_convolutional_teacher(size, dtype):
    half, other = (0.5,) * 3, (0.3,) * 3
    seen = InputAdapter(3, half, half, 3, other, other, size=size, dtype=dtype, channels_last=True)(IMAGES)
    assert seen.dtype == dtype and seen.is_contiguous(memory_format=torch.channels_last)
