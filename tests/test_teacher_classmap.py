"""Class maps: which of the teacher's classes are the student's."""

import functools
import json

import pytest
import torch
from helpers import build

from timm_kd.errors import UsageError
from timm_kd.losses import create_kd_loss
from timm_kd.teacher import Teacher
from timm_kd.teacher.classmap import load_class_map


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


model = functools.partial(build, num_classes=6)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(('name', 'content'), [
    ('map.txt', '4\n0\n2\n'), ('map.json', [4, 0, 2]), ('map.json', {'0': 4, '1': 0, '2': 2}),
])
def test_mapped_teacher_gives_the_logits_of_the_students_classes(tmp_path, name, content):
    teacher = Teacher(model(), 3, dtype='float32', class_map=write(tmp_path / name, content))
    with torch.no_grad():
        expected = model()(IMAGES)[:, [4, 0, 2]]
    torch.testing.assert_close(teacher(IMAGES), expected)
    assert teacher.num_classes == 3


def test_weights_file_has_a_class_count_of_its_own_under_a_map(tmp_path):
    torch.save(model().state_dict(), tmp_path / 'weights.pth')
    teacher = Teacher(
        str(tmp_path / 'weights.pth'), 2, model='test_resnet', class_map=write(tmp_path / 'map.txt', '5\n1'),
    )
    assert teacher(IMAGES).shape == (2, 2)


# found: line numbers, less one, of n01440764 (tench), n02123045 (tabby), n15075141 (toilet tissue) in timm's lists
@pytest.mark.parametrize(('name', 'size', 'lacking', 'found'), [
    ('imagenet12k', 11821, 7, [216, 1615, 11804]), ('imagenet21k', 21843, 1, [359, 2397, 21817]),
    ('imagenet22k', 21841, 1, [359, 2397, 21815]), ('imagenet22k_ms', 21842, 0, [0, 281, 999]),
])
def test_named_map_picks_the_synsets_of_imagenet_1k(name, size, lacking, found):
    indices = load_class_map(name, 1000, size, missing='mask')
    assert indices.count(-1) == lacking and len(set(indices)) == 1000 - max(lacking - 1, 0)
    assert [indices[c] for c in (0, 281, 999)] == found


def test_22k_of_microsoft_begins_with_imagenet_1k():
    assert load_class_map('imagenet22k_ms', 1000, 21842) == list(range(1000))


def test_lacking_classes_are_listed_and_refused():
    with pytest.raises(UsageError, match=r'lacks 1 of the student.*n04399382.*`class_map_missing` mask'):
        load_class_map('imagenet21k', 1000, 21843)


def test_masked_class_has_no_probability_and_its_rows_no_distillation_term(tmp_path):
    path = write(tmp_path / 'map.json', [3, None, 1])
    logits = Teacher(model(), 3, class_map=path, class_map_missing='mask')(IMAGES)
    assert torch.equal(logits.isinf(), torch.tensor([[False, True, False]] * 2))
    student = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    create_kd_loss('kd')(student, logits, torch.tensor([1, 0]))['kd_loss'].backward()
    assert student.grad[0].abs().sum() == 0 < student.grad[1].abs().sum()


@pytest.mark.parametrize(('name', 'content', 'said'), [
    ('map.txt', '0\n1', 'has 2 entries, the student 3 classes'),
    ('map.txt', '0\n1\n6', '6 out of range: the teacher has 6 classes'),
    ('map.txt', '0\n1\n-2', '-2 out of range'),
    ('map.txt', '0\n1\n1', 'class 1 to several classes'),
    ('map.txt', '0\n1\n-1', r'lacks 1 of the student.s classes \(2\)'),
    ('map.txt', '0\none\n2', 'not a class map'),
    ('map.txt', '', 'has 0 entries'),
    ('map.json', '[0, 1', 'not a class map'),
    ('map.json', '3', 'not a class map'),
    ('map.json', [0, 1, 2.5], 'not a class map'),
    ('map.json', [0, 1, True], 'not a class map'),
    ('map.json', {'cat': 1}, 'not a class map'),
    ('map.json', {'0': 1, '7': 2}, 'class 7'),
    ('map.json', {'0': 1, '2': 2}, r'lacks 1 .*\(1\)'),
    ('map.json', [-1, -1, -1], 'lacks 3 of the student'),
])
def test_wrong_map_is_refused(tmp_path, name, content, said):
    with pytest.raises(UsageError, match=f'`class_map` .*{name}.*{said}'):
        load_class_map(write(tmp_path / name, content), 3, 6)


def test_teacher_of_as_many_classes_needs_a_permutation(tmp_path):
    path = write(tmp_path / 'map.txt', '2\n0\n1')
    assert load_class_map(path, 3, 3) == [2, 0, 1]
    with pytest.raises(UsageError, match='several classes'):
        load_class_map(write(tmp_path / 'map.txt', '2\n0\n0'), 3, 3)


def test_map_that_is_neither_file_nor_name_lists_the_names():
    with pytest.raises(UsageError, match='imagenet12k, imagenet21k, imagenet22k, imagenet22k_ms'):
        load_class_map('imagenet', 3, 6)


@pytest.mark.parametrize(('student', 'teacher', 'said'), [(10, 21843, 'this one has 10'), (1000, 1000, '1000')])
def test_named_map_for_other_class_counts_is_refused(student, teacher, said):
    with pytest.raises(UsageError, match=said):
        load_class_map('imagenet21k', student, teacher)


def test_map_of_missing_classes_alone_is_refused(tmp_path):
    with pytest.raises(UsageError, match='none of the student'):
        load_class_map(write(tmp_path / 'map.json', [-1, -1]), 2, 6, missing='mask')
