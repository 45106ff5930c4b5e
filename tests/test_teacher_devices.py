"""No GPU is needed to see that a teacher would run on one: no host sync in a step, and no tensor of another device."""

import functools

import helpers
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from timm_kd.teacher import Teacher, create_teacher

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
OF_THE_STUDENT = {'mean': (0.1, 0.2, 0.3), 'std': (0.2, 0.3, 0.4)}


build = functools.partial(helpers.build, num_classes=5)


@pytest.fixture(params=['renormalised', 'resized', 'class map', 'ensemble'])
def teacher_of(request, tmp_path):
    """Makes a teacher of a precision that has answered its first batch, the only one that is looked at."""
    (tmp_path / 'map.json').write_text('[3, null, 1]')
    made = {
        'renormalised': lambda dtype: Teacher(build(), 5, **OF_THE_STUDENT, dtype=dtype),
        'resized': lambda dtype: Teacher(build('test_vit'), 5, **OF_THE_STUDENT, img_size=64, dtype=dtype),
        'class map': lambda dtype: Teacher(
            build(), 3, class_map=tmp_path / 'map.json', class_map_missing='mask', dtype=dtype,
        ),
        'ensemble': lambda dtype: create_teacher([build(), build('test_vit')], 5, **OF_THE_STUDENT, dtype=dtype),
    }[request.param]

    def make(dtype: str) -> nn.Module:
        teacher = made(dtype)
        teacher(IMAGES)
        return teacher
    return make


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'amp'])
def test_step_reads_no_value_and_leaves_no_tensor_behind(teacher_of, dtype):
    """On the `meta` device a tensor has no value, and none of another device goes with it."""
    teacher = teacher_of(dtype).to('meta')
    logits = teacher(IMAGES.to('meta'))
    assert logits.device.type == 'meta' and logits.shape == (2, teacher.num_classes) and logits.dtype == torch.float32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_step_goes_through_on_a_gpu_that_is_not_there(teacher_of, dtype):
    teacher = teacher_of(dtype)
    with FakeTensorMode() as mode:
        state = {
            name: mode.from_tensor(tensor).to('cuda')
            for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers())
        }
        logits = functional_call(teacher, state, (torch.empty(2, 3, 32, 32, device='cuda'),))
    assert logits.device.type == 'cuda' and logits.shape == (2, teacher.num_classes) and logits.dtype == torch.float32
