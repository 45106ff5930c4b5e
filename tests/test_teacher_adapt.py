"""Images for the teacher: another normalisation, another size, other channels."""


import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import build
from PIL import Image

from timm_kd.errors import UsageError
from timm_kd.teacher import Teacher
from timm_kd.teacher.adapt import InputAdapter

HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


def picture(chans: int = 3, size: int = 32, n: int = 2) -> torch.Tensor:
    """Raw pixels in [0, 1]."""
    return torch.rand(n, chans, size, size, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (images - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def adapter(in_chans=3, student=HALF, chans=3, teacher=IMAGENET, **kwargs) -> InputAdapter:
    return InputAdapter(in_chans, student['mean'], student['std'], chans, teacher['mean'], teacher['std'], **kwargs)


AVERAGE = {key: (sum(values) / 3,) for key, values in IMAGENET.items()}


@pytest.mark.parametrize(('chans', 'norm', 'known'), [
    (3, HALF, HALF),
    (1, {'mean': (0.3,), 'std': (0.2,)}, {'mean': (0.3,), 'std': (0.2,)}),
    (1, AVERAGE, IMAGENET),  # three values for grey images, which timm's loader averages
    (1, AVERAGE, {'mean': None, 'std': None}),
], ids=['colour', 'grey', 'grey, three values', 'grey, unknown'])
def test_images_arrive_as_the_teachers_own_loader_would_give_them(chans, norm, known):
    seen = adapter(in_chans=chans, student=known)(normalised(picture(chans), **norm))
    expected = normalised(picture(chans).expand(-1, 3, -1, -1), **IMAGENET)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('known', [
    IMAGENET, {'mean': None, 'std': None}, {**HALF, 'mean': None}, {**HALF, 'std': None},
], ids=['the same', 'none', 'no mean', 'no std'])
def test_images_that_are_or_are_taken_for_normalised_as_the_teachers_cost_nothing(known):
    images = picture()
    assert adapter(student=known)(images) is images


def test_colour_image_is_turned_grey_as_pillow_does_it():
    pixels = (picture(n=1) * 255).byte()
    grey = np.asarray(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).convert('L'))
    seen = adapter(chans=1, teacher={'mean': (0.3,), 'std': (0.2,)})(normalised(pixels / 255, **HALF))
    expected = normalised(torch.from_numpy(grey.copy())[None, None] / 255, (0.3,), (0.2,))
    assert (seen - expected).abs().max() < 0.51 / 255 / 0.2  # Pillow rounds to whole grey levels


@pytest.mark.parametrize('method', ['bilinear', 'bicubic'])
def test_resize_is_antialiased_as_pillows(method):
    image = picture(chans=1, size=64, n=1)
    resample = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}[method]
    expected = np.asarray(Image.fromarray(image[0, 0].numpy()).resize((20, 28), resample))
    none = {'mean': (0.0,), 'std': (1.0,)}
    seen = adapter(1, none, 1, none, size=(28, 20), interpolation=method)(image)
    torch.testing.assert_close(seen[0, 0], torch.from_numpy(expected.copy()), rtol=1e-4, atol=1e-4)


def test_narrow_teacher_gets_images_resized_in_float32():
    seen = adapter(size=(16, 16), dtype=torch.bfloat16)(normalised(picture(), **HALF).half())
    exact = adapter(size=(16, 16))(normalised(picture(), **HALF).half())
    assert torch.equal(seen, exact.bfloat16())


@pytest.mark.parametrize(('name', 'kwargs', 'asked', 'size', 'interpolation'), [
    ('test_vit', {'dynamic_img_size': False}, None, 160, 'bicubic'),  # a fixed size is given unasked
    ('test_resnet', {}, 64, 64, 'bilinear'),
    ('test_resnet', {}, None, 32, None),
])
def test_teacher_gets_the_size_that_it_has_or_was_asked_for(name, kwargs, asked, size, interpolation):
    model, images = build(name, **kwargs), picture(size=32)
    if interpolation:
        images = torch.nn.functional.interpolate(images, (size, size), mode=interpolation, antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(Teacher(model, 10, img_size=asked, dtype='float32')(picture()), model(images))


def test_size_that_a_built_model_cannot_take_is_refused():
    with pytest.raises(UsageError, match='`img_size` 64.*160x160'):
        Teacher(build('test_vit', dynamic_img_size=False), 10, img_size=64)


@pytest.mark.parametrize(('name', 'built_for', 'images'), [
    ('test_vit', {'img_size': 64}, picture(size=64)),
    ('test_resnet', {'in_chans': 5}, picture(5)),
])
def test_model_is_built_by_timm_for_the_asked_size_and_for_multi_band_images(tmp_path, name, built_for, images):
    timm.models.save_for_hf(build(name), tmp_path, safe_serialization=True)
    teacher = Teacher(str(tmp_path), 10, **built_for, dtype='float32')
    expected = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **built_for).eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), expected(images), rtol=1e-4, atol=1e-4)


def test_grey_images_leave_the_stem_of_an_rgb_teacher_alone(tmp_path):
    model = build('test_resnet')
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    teacher = Teacher(str(tmp_path), 10, in_chans=1, mean=(0.3,), std=(0.2,), dtype='float32')
    grey = picture(1)
    with torch.no_grad():
        expected = model(normalised(grey.expand(-1, 3, -1, -1), **HALF))
    torch.testing.assert_close(teacher(normalised(grey, (0.3,), (0.2,))), expected, rtol=1e-4, atol=1e-5)


def test_module_that_is_not_timms_has_grey_images_repeated_too():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    grey = picture(1)
    with torch.no_grad():
        expected = model(normalised(grey.expand(-1, 3, -1, -1), **IMAGENET))  # timm's assumption on such a module
    seen = Teacher(model, 10, in_chans=1, mean=(0.3,), std=(0.2,), dtype='float32')(normalised(grey, (0.3,), (0.2,)))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_size_that_the_patches_do_not_divide_names_the_way_out():
    with pytest.raises(UsageError, match='refuses images of 40x40 .*`img_size`'):
        Teacher(build('test_vit'), 10)(picture(size=40))


def test_channels_that_a_built_model_cannot_take_are_refused():
    with pytest.raises(UsageError, match='takes 3 channels, the images have 5'):
        Teacher(build('test_resnet'), 10, in_chans=5)


def test_standard_deviation_of_0_is_the_teachers_fault_and_said_so():
    model = build('test_resnet')
    model.pretrained_cfg['std'] = (0.5, 0.0, 0.5)
    with pytest.raises(UsageError, match=r"teacher 'ResNet' gives \(0\.5, 0\.0, 0\.5\) as the standard deviation"):
        Teacher(model, 10, **HALF)
