"""The labels and weights read back from what timm's own Mixup and FastCollateMixup make."""
import numpy as np
import pytest
import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.mixup import mixup_target

from timm_kd.losses.targets import read_target

BATCH = 64


def read(target, smoothing=0.0, num_classes=None, dtype=torch.float32):
    return read_target(target, torch.zeros(len(target), num_classes or target.shape[1], dtype=dtype), smoothing, True)


def rebuild(labels, num_classes):
    """Return the unsmoothed dense target that labels and weights stand for."""
    return torch.zeros(len(labels.index), num_classes).scatter_add_(1, labels.index, labels.weight)


def mixed_target(mixup_class, mode, smoothing, num_classes, prob):
    """Return a dense target of timm; the same seed gives the same mix whatever the smoothing."""
    np.random.seed(11)
    mixup = mixup_class(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=prob, mode=mode, label_smoothing=smoothing, num_classes=num_classes)
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(num_classes, (BATCH,), generator=generator)
    if mixup_class is Mixup:
        return mixup(torch.rand(BATCH, 3, 8, 8, generator=generator), target)[1]
    images = torch.randint(256, (BATCH, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return mixup([(image.numpy(), int(label)) for image, label in zip(images, target, strict=True)])[1]


@pytest.mark.parametrize('prob', [1.0, 0.5, 0.0])
@pytest.mark.parametrize('num_classes', [4, 1000])
@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.3])
@pytest.mark.parametrize(('mixup_class', 'mode'), [
    (Mixup, 'batch'), (Mixup, 'pair'), (Mixup, 'elem'),
    (FastCollateMixup, 'batch'), (FastCollateMixup, 'pair'), (FastCollateMixup, 'elem'), (FastCollateMixup, 'half'),
])
def test_smoothing_is_undone_in_every_mode_of_timm(mixup_class, mode, smoothing, num_classes, prob):
    unsmoothed = mixed_target(mixup_class, mode, 0.0, num_classes, prob)
    labels = read(mixed_target(mixup_class, mode, smoothing, num_classes, prob), smoothing)
    torch.testing.assert_close(rebuild(labels, num_classes), unsmoothed, rtol=0, atol=1e-6)
    assert torch.equal(labels.weight[:, 1] > 0, (unsmoothed > 0).sum(1) == 2)
    assert (labels.weight[:, 0] >= labels.weight[:, 1]).all()
    assert torch.equal(labels.weight.sum(1), torch.ones(len(unsmoothed)))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize(('classes', 'lam'), [([3, 1, 2, 0], 1.0), ([3, 1, 1, 3], 0.3)], ids=['unmixed', 'equal'])
def test_row_of_a_single_class_repeats_it_with_weight_zero(classes, lam, smoothing):
    labels = read(mixup_target(torch.tensor(classes), 7, lam, smoothing), smoothing)
    assert labels.index.tolist() == [[label, label] for label in classes]
    assert labels.weight.tolist() == [[1.0, 0.0]] * 4


def test_tie_keeps_both_labels_at_one_half():
    labels = read(mixup_target(torch.tensor([3, 1]), 7, 0.5, 0.1), 0.1)
    assert labels.index.sort(dim=1).values.tolist() == [[1, 3], [1, 3]]
    torch.testing.assert_close(labels.weight, torch.full((2, 2), 0.5))


@pytest.mark.parametrize('lam', [1e-3, 1e-5, 1e-7])
def test_faint_second_label_is_kept(lam):
    """With an off value of 1e-4, float32 resolves a share of 1e-7 next to it."""
    labels = read(mixup_target(torch.tensor([3, 1]), 1000, lam, 0.1), 0.1)
    assert labels.index.tolist() == [[1, 3], [3, 1]]
    torch.testing.assert_close(labels.weight[:, 1], torch.tensor([lam, lam]), rtol=1e-3, atol=0)


def test_two_classes_are_read_as_a_pair():
    labels = read(mixup_target(torch.tensor([0, 1]), 2, 0.7, 0.1), 0.1)
    assert labels.index.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(labels.weight, torch.tensor([[0.7, 0.3], [0.7, 0.3]]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dense_targets_of_other_precisions_are_read(dtype):
    labels = read(mixup_target(torch.tensor([3, 1, 2, 2]), 10, 0.7, 0.1).to(dtype), 0.1)
    assert labels.index.tolist() == [[3, 2], [1, 2], [2, 1], [2, 3]]
    assert labels.weight.dtype == torch.float32
    torch.testing.assert_close(labels.weight[:, 0], torch.full((4,), 0.7), rtol=0, atol=0.01)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('mode', ['elem', 'pair'])
def test_shares_of_a_mixup_of_half_precision_images_add_up(mode, dtype):
    """There lam and 1 - lam are rounded apart, to a sum of 1.004 in bfloat16."""
    np.random.seed(11)
    mixup = Mixup(mixup_alpha=0.8, mode=mode, label_smoothing=0.1, num_classes=4)
    hard = torch.arange(BATCH) % 2  # every second pair is of one class
    hard[BATCH // 2:] = 0
    _, target = mixup(torch.rand(BATCH, 3, 8, 8, dtype=dtype), hard)
    labels = read(target, 0.1)
    assert torch.equal(labels.weight[:, 1] > 0, hard != hard.flip(0))
    assert torch.equal(labels.weight.sum(1), torch.ones(BATCH))
    exact = target.double()
    exact = read(exact / exact.sum(1, keepdim=True), 0.1)  # the shares are those of the rounded lam and 1 - lam
    torch.testing.assert_close(labels.weight, exact.weight.float(), rtol=0, atol=5e-4)


def test_hard_targets_have_one_label_whatever_the_smoothing():
    labels = read(torch.tensor([3, 1], dtype=torch.int32), 0.1, num_classes=5)
    assert labels.index.tolist() == [[3], [1]]
    assert labels.weight.tolist() == [[1.0], [1.0]]


def test_smoothing_other_than_mixups_is_refused():
    with pytest.raises(ValueError, match=r'smoothing 0.0: pass the smoothing'):
        read(mixup_target(torch.tensor([3, 1]), 10, 0.7, 0.1), 0.0)


def test_targets_are_read_without_looking_at_values_when_asked_not_to():
    """On meta tensors nothing can be read back, as on a GPU nothing should be."""
    logits = torch.zeros(4, 5, device='meta')
    hard = read_target(torch.zeros(4, dtype=torch.int64, device='meta'), logits, 0.1, check=False)
    dense = read_target(torch.zeros(4, 5, device='meta'), logits, 0.1, check=False)
    assert (hard.index.shape, dense.index.shape) == ((4, 1), (4, 2))
