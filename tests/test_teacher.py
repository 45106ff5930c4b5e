"""The teacher itself: equal to timm's, frozen, in its own precision, and found out when it is broken."""

import copy
import json
import math

import pytest
import timm
import torch
from helpers import build
from timm.task import LogitDistillationTask
from torch import nn

from timm_kd.errors import UsageError
from timm_kd.teacher import Teacher
from timm_kd.teacher.fast import is_convolutional, resolve_dtype

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


def batch(size: int = 32, chans: int = 3, n: int = 4) -> torch.Tensor:
    return torch.randn(n, chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('student_norm', [IMAGENET, {'mean': (0.5,) * 3, 'std': (0.5,) * 3}], ids=['other', 'same'])
def test_logits_are_those_of_the_teacher_in_timms_own_task(student_norm):
    student, model = build('test_efficientnet', seed=1), build()
    student.pretrained_cfg.update(student_norm)
    task = LogitDistillationTask(student, copy.deepcopy(model), verbose=False)
    with torch.no_grad():
        expected = task.teacher(task.teacher.normalize_input(batch(), task.student_mean, task.student_std))
    seen = Teacher(model, 10, **student_norm, dtype='float32')(batch())
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_logits_are_float32_without_gradient():
    logits = Teacher(build(), 10, dtype='bfloat16')(batch().requires_grad_())
    assert logits.dtype == torch.float32 and not logits.requires_grad


def test_is_in_eval_mode_from_the_start_and_when_its_holder_trains():
    teacher = Teacher(build('test_efficientnet', drop_rate=0.5).train(), 10)
    assert not any(m.training for m in teacher.modules())
    holder = nn.ModuleList([teacher]).train()
    assert not any(m.training for m in teacher.modules()) and holder.training
    torch.testing.assert_close(teacher(batch()), teacher(batch()), rtol=0, atol=0)


@pytest.mark.parametrize('fold_bn', [False, True])
def test_no_parameter_and_no_running_statistic_changes(fold_bn):
    teacher = Teacher(build().train(), 10, dtype='float32', fold_bn=fold_bn)
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    teacher.train()(batch())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_images_are_left_untouched(dtype):
    images = batch()
    kept = images.clone()
    Teacher(build(), 10, **IMAGENET, img_size=48, dtype=dtype)(images)
    assert torch.equal(images, kept) and images.is_contiguous()


def test_float32_teacher_is_deaf_to_the_students_autocast():
    teacher = Teacher(build(), 10, dtype='float32')
    alone = teacher(batch())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(teacher(batch()), alone)


def test_amp_teacher_runs_inside_the_students_autocast():
    model = build()
    teacher = Teacher(copy.deepcopy(model), 10, dtype='amp')
    assert next(teacher.parameters()).dtype == torch.float32
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = model(batch())
        assert torch.equal(teacher(batch()), expected.float())
    assert not torch.equal(teacher(batch()), expected.float())


def test_bfloat16_logits_are_close_to_float32():
    exact, narrow = (Teacher(build(), 10, **IMAGENET, dtype=d)(batch()) for d in ('float32', 'bfloat16'))
    assert not torch.equal(exact, narrow)
    assert (exact - narrow).abs().max() < 0.02 * (exact.max() - exact.min())


def test_half_precision_images_suit_a_float32_teacher():
    teacher = Teacher(build(), 10, **IMAGENET, dtype='float32')
    images = batch().bfloat16()
    torch.testing.assert_close(teacher(images), teacher(images.float()))


def test_auto_precision_is_bfloat16_exactly_where_the_cpu_multiplies_it(auto_dtype):
    teacher = Teacher(build(), 10, dtype='auto')
    assert {p.dtype for p in teacher.parameters()} == {auto_dtype}
    named = Teacher(build(), 10, dtype=str(auto_dtype).removeprefix('torch.'))
    assert teacher.fingerprint() == named.fingerprint()
    assert torch.equal(teacher(batch()), named(batch()))


@pytest.mark.parametrize('fast', ['_is_amx_tile_supported', '_is_avx512_bf16_supported'])
def test_either_kind_of_bfloat16_unit_is_enough(fast, monkeypatch):
    for probe in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe == fast)  # an error where torch renames it
    assert resolve_dtype('auto', torch.device('cpu')) == torch.bfloat16


@pytest.mark.parametrize(('name', 'expected'), [
    ('test_resnet', True), ('test_convnext', True), ('test_efficientnet', True), ('test_vit', False),
])
def test_channels_last_is_for_convolutional_models(name, expected):
    assert is_convolutional(build(name)) is expected


def test_convolutional_teacher_keeps_weights_in_channels_last():
    teacher = Teacher(build(), 10)
    assert teacher.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)


class Answers(nn.Module):
    """A linear classifier whose forward returns what `wrap` makes of its logits."""

    def __init__(self, wrap):
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 10)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.head(x.flatten(1)))


def test_pair_of_a_distilled_model_is_averaged_in_float32(auto_dtype):
    teacher = Teacher(Answers(lambda z: (z, 3 * z)), 10)
    first = teacher.model.head(batch(8).flatten(1).to(auto_dtype))
    assert torch.equal(teacher(batch(8)), (first.float() + (3 * first).float()) / 2)


def test_dictionary_with_logits_is_understood():
    model = Answers(lambda z: {'loss': None, 'logits': z})
    assert Teacher(model, 10)(batch(8)).shape == (4, 10)


def filled(parameter: str, value: float, model: nn.Module) -> nn.Module:
    """Fill a parameter of a model."""
    nn.init.constant_(model.get_parameter(parameter), value)
    return model


@pytest.mark.parametrize(('model', 'num_classes', 'dtype', 'said'), [
    (build(), 10, 'int8', "`dtype` 'int8'"),
    (build(), 7, 'auto', 'has 10 classes, the student 7'),
    (Answers(lambda z: z), 7, 'auto', 'has 10 classes, the student 7'),  # it tells by its answers alone
    (build(num_classes=0), 7, 'auto', 'no classifier'),
    (Answers(lambda z: {'features': z}), 10, 'auto', "teacher 'Answers' .* returns no logits"),
    (Answers(lambda z: z[:, :, None]), 10, 'auto', "teacher 'Answers' .* returns no logits"),
    (Answers(lambda z: (z, z[:, :1])), 10, 'auto', "teacher 'Answers' .* returns no logits"),
    (filled('fc.bias', math.nan, build()), 10, 'auto', "'ResNet' returns NaN or infinite logits on the first batch"),
    (filled('head.weight', 3e4, Answers(lambda z: z)), 10, 'float16', '`dtype` float32'),  # the way out of an overflow
])
def test_model_that_cannot_teach_is_refused_at_the_first_batch_at_the_latest(model, num_classes, dtype, said):
    with pytest.raises(UsageError, match=said):
        Teacher(model, num_classes, dtype=dtype)(torch.ones(4, 3, 8, 8))


def test_broken_images_are_not_blamed_on_the_teacher():
    with pytest.raises(UsageError, match='first batch of images'):
        Teacher(build(), 10)(torch.full((1, 3, 32, 32), float('nan')))


def test_weights_hash_follows_the_weights_alone():
    one, same, other = (Teacher(build(seed=s), 10) for s in (0, 0, 1))
    assert one.weights_hash() == same.weights_hash() != other.weights_hash()
    assert Teacher(build(seed=0), 10, **IMAGENET).weights_hash() == one.weights_hash()
    assert len(one.weights_hash()) == 64


def test_fingerprint_tells_apart_whatever_changes_the_logits(tmp_path):
    (tmp_path / 'map.txt').write_text('1\n0\n2\n3\n4\n5\n6\n7\n8\n9')
    ways = [{}, IMAGENET, {'img_size': 48}, {'dtype': 'bfloat16'}, {'dtype': 'amp'}, {'in_chans': 1}]
    ways.append({'class_map': tmp_path / 'map.txt'})
    prints = [json.dumps(Teacher(build(), 10, **{'dtype': 'float32', **way}).fingerprint()) for way in ways]
    prints.append(json.dumps(Teacher(build(seed=1), 10, dtype='float32').fingerprint()))
    assert len(set(prints)) == len(prints)
    assert json.dumps(Teacher(build(), 10, dtype='float32').fingerprint()) == prints[0]


def test_start_up_line_names_what_it_does():
    # 11.69 M parameters: torchvision's table of ResNet-18.
    line = Teacher(timm.create_model('resnet18'), 1000, mean=(0.5,) * 3, std=(0.5,) * 3, dtype='float32').describe()
    for part in ('resnet18', '11.69 M parameters', 'float32', 'channels-last', '0.485'):
        assert part in line
