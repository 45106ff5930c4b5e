"""Several teachers: the mean of their probabilities."""


import pytest
import timm
import torch
from helpers import build

from timm_kd.errors import UsageError
from timm_kd.teacher import Teacher, TeacherEnsemble, create_teacher

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_logits_are_the_log_of_the_mean_probability():
    ensemble = create_teacher([build(seed=0), build(seed=1)], 10, dtype='float32')
    with torch.no_grad():
        probs = (build(seed=0)(IMAGES).softmax(1) + build(seed=1)(IMAGES).softmax(1)) / 2
    torch.testing.assert_close(ensemble(IMAGES).exp(), probs)
    torch.testing.assert_close(ensemble(IMAGES).exp().sum(1), torch.ones(3))


def test_each_member_sees_the_images_in_its_own_way():
    norm = {'mean': (0.3, 0.3, 0.3), 'std': (0.2, 0.2, 0.2)}  # neither's own: 0.5 and ImageNet's
    members = [build(seed=0), build('test_efficientnet', seed=1)]
    ensemble = create_teacher(members, 10, **norm, dtype='float32')
    alone = [Teacher(m, 10, **norm, dtype='float32')(IMAGES).softmax(1) for m in members]
    torch.testing.assert_close(ensemble(IMAGES).exp(), sum(alone) / 2)
    assert [m.num_params for m in ensemble.members] == [sum(p.numel() for p in m.parameters()) for m in members]


def test_certain_members_that_disagree_stay_finite():
    ensemble = create_teacher([build(seed=0), build(seed=1)], 10, dtype='float32')
    for member, sure in zip(ensemble.members, (0, 1), strict=True):
        torch.nn.init.zeros_(member.model.fc.weight)
        member.model.fc.bias.copy_(torch.eye(10)[sure] * 1e4)
    expected = torch.tensor([[0.5, 0.5] + [0.0] * 8]).expand(3, -1)
    torch.testing.assert_close(ensemble(IMAGES).exp(), expected)
    assert ensemble(IMAGES).isfinite().all()


def test_class_that_every_member_lacks_stays_masked(tmp_path):
    (tmp_path / 'map.txt').write_text('0\n-1\n2\n')
    ensemble = create_teacher(
        [build(seed=0), build(seed=1)], 3, class_map=str(tmp_path / 'map.txt'), class_map_missing='mask',
    )
    logits = ensemble(IMAGES)
    assert logits[:, 1].eq(float('-inf')).all() and logits[:, [0, 2]].isfinite().all()


def test_is_frozen_and_stays_in_eval_mode():
    ensemble = create_teacher([build(seed=0), build(seed=1)], 10).train()
    assert not any(m.training for m in ensemble.modules())
    assert not any(p.requires_grad for p in ensemble.parameters())


def test_fingerprint_has_that_of_each_member_in_their_order():
    one, two = (create_teacher([build(seed=a), build(seed=b)], 10) for a, b in ((0, 1), (1, 0)))
    assert list(one.fingerprint().values()) == [m.fingerprint() for m in one.members]
    assert one.fingerprint() != two.fingerprint()


def test_member_of_another_class_count_is_refused():
    with pytest.raises(UsageError, match='has 5 classes, the student 10'):
        create_teacher([build(seed=0), build(seed=1, num_classes=5)], 10)


def test_architecture_and_ema_are_for_the_weights_files_among_them(tmp_path):
    timm.models.save_for_hf(build(seed=0), tmp_path / 'folder', safe_serialization=True)
    torch.save({'state_dict': {}, 'state_dict_ema': build(seed=1).state_dict()}, tmp_path / 'last.pth')
    specs = [str(tmp_path / 'folder'), str(tmp_path / 'last.pth')]
    ensemble = create_teacher(specs, 10, model='test_resnet', use_ema=True, dtype='float32')
    expected = create_teacher([build(seed=0), build(seed=1)], 10, dtype='float32')
    assert isinstance(ensemble, TeacherEnsemble)
    torch.testing.assert_close(ensemble(IMAGES), expected(IMAGES))


def test_architecture_without_a_weights_file_is_refused(tmp_path):
    timm.models.save_for_hf(build(seed=0), tmp_path, safe_serialization=True)
    with pytest.raises(UsageError, match='no teacher is one'):
        create_teacher([str(tmp_path)] * 2, 10, model='test_resnet')
