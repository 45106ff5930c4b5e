"""The splits of a data set agree on their classes and share no image; files that cannot be read are named."""
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers import RunsCode, run_script
from PIL import Image
from timm.data import create_dataset

from timm_kd.cli.messages import in_flags
from timm_kd.data import class_names, create_datasets
from timm_kd.errors import UsageError
from timm_kd.teacher_cache.key import fingerprint_dataset


@pytest.fixture
def root(digits, tmp_path) -> Path:
    """The digits in a folder of its own, whose class folders a test may move: `train/<class>`, `validation/<class>`."""
    for split in ('train', 'validation'):
        (tmp_path / 'digits' / split).mkdir(parents=True)
        for label in range(10):
            (tmp_path / 'digits' / split / str(label)).symlink_to(digits / split / str(label))
    return tmp_path / 'digits'


def pack(root: Path, *splits: str) -> None:
    """Pack the folder of each split into a tar beside it."""
    for split in splits:
        with tarfile.open(root / f'{split}.tar', 'w', dereference=True) as file:
            for name in sorted(os.listdir(root / split)):
                file.add(root / split / name, name)


def write_unreadable(folder: Path, count: int) -> None:
    """Write files that are no images."""
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f'{index}.png').write_bytes(b'no image')


TARS = dict(train_split='train.tar', val_split='validation.tar')


def refused(root: Path, num_classes: int = 10, **options) -> str:
    with pytest.raises(UsageError) as error:
        create_datasets(str(root), num_classes=num_classes, **options)
    message = in_flags(str(error.value))
    assert '\n' not in message and message.endswith('.')
    return message


@pytest.mark.parametrize('options', [{}, TARS], ids=['folders', 'tars'])
def test_validation_without_some_classes_keeps_the_indices_of_training(options, root, caplog):
    for label in (0, 4):
        (root / 'validation' / str(label)).unlink()
    if options:
        pack(root, 'train', 'validation')
    caplog.set_level('INFO', 'timm_kd.data')
    train_set, eval_set = create_datasets(str(root), num_classes=10, **options)
    labels = [int(Path(name).parent.name) for name in eval_set.filenames()]
    assert [target for _, target in eval_set] == labels and set(labels) == {1, 2, 3, 5, 6, 7, 8, 9}
    assert [target for _, target in train_set] == [int(Path(name).parent.name) for name in train_set.filenames()]
    assert class_names(train_set) == [str(label) for label in range(10)]
    (message,) = [record.getMessage() for record in caplog.records if record.name == 'timm_kd.data']
    assert '8 of the 10 classes (not 0, 4)' in message


def test_teacher_is_validated_on_the_right_classes_where_one_folder_is_empty(root, digits_teacher, tmp_path):
    flags = f'--teacher {digits_teacher} --teacher-dtype float32 --lr 1e-9'
    whole = run_script(flags, root, tmp_path, 'whole')
    (root / 'validation' / '2').unlink()
    (root / 'validation' / '2').mkdir()
    run = run_script(flags, root, tmp_path)
    right, wrong = run.record['teacher'][0]['top1'], 100 - whole.record['teacher'][0]['top1']
    assert 100 - right <= wrong * 100 / 90 + 0.01  # of 90 images, at most those wrong before are wrong
    assert run.record['student']['class_names'] == [str(label) for label in range(10)]


@pytest.mark.parametrize('suffix', ['', '.tar'])
def test_equal_classes_leave_the_data_set_as_timm_makes_it(suffix, root):
    pack(root, 'train', 'validation')
    splits = [f'train{suffix}', f'validation{suffix}']
    datasets = create_datasets(str(root), num_classes=10, train_split=splits[0], val_split=splits[1])
    for dataset, split in zip(datasets, splits, strict=True):
        expected = create_dataset('', root=str(root), split=split)
        assert fingerprint_dataset(dataset) == fingerprint_dataset(expected)
        assert [target for _, target in dataset] == [target for _, target in expected]


@pytest.mark.parametrize('options', [{}, TARS, {'name': 'torch/image_folder'}], ids=['folders', 'tars', 'torchvision'])
def test_renamed_class_is_refused_with_the_names_of_both_splits(options, root):
    (root / 'validation' / '3').rename(root / 'validation' / 'three')
    if 'train_split' in options:
        pack(root, 'train', 'validation')
    message = refused(root, **options)
    assert 'three in validation alone, 3 in training alone' in message and '--val-split validation' in message


def rename_case(root: Path) -> None:
    (root / 'train' / '0').rename(root / 'train' / 'zero')
    (root / 'validation' / '0').rename(root / 'validation' / 'Zero')


def empty_training_folder(root: Path) -> None:
    (root / 'train' / '0').unlink()
    (root / 'train' / '0').mkdir()


@pytest.mark.parametrize(('change', 'names'), [
    (rename_case, 'Zero in validation alone, zero in training alone'),
    (empty_training_folder, '0 in validation alone, nothing in training alone'),
    (lambda root: shutil.copytree(root / 'train' / '0', root / 'validation' / '.a'), '.a in validation alone'),
    (lambda root: shutil.copytree(root / 'train' / '0', root / 'validation' / 'group' / 'a'), 'a in validation alone'),
    (lambda root: shutil.copy(root / 'train' / '0' / '000.png', root / 'validation'), "'' in validation alone"),
], ids=['upper case', 'empty training folder', 'hidden', 'nested', 'image outside of a class'])
def test_class_of_validation_alone_is_refused(change, names, root):
    change(root)
    assert names in refused(root)


def test_subset_is_refused_where_torchvision_numbers_the_classes(root):
    (root / 'validation' / '3').unlink()
    assert 'nothing in validation alone, 3 in training alone' in refused(root, name='torch/image_folder')


def test_class_map_numbers_both_splits(root, tmp_path):
    (tmp_path / 'classes.txt').write_text('\n'.join('9876543210') + '\n\n')
    (root / 'validation' / '3').unlink()
    datasets = create_datasets(str(root), num_classes=10, class_map=str(tmp_path / 'classes.txt'))
    for dataset in datasets:
        assert [target for _, target in dataset] == [9 - int(Path(name).parent.name) for name in dataset.filenames()]
    assert class_names(datasets[0]) == list('9876543210')


@pytest.mark.parametrize('place', ['.', 'train'])
def test_class_map_is_found_beside_the_data(place, root):
    (root / place / 'classes.txt').write_text('\n'.join('9876543210'))
    train_set, _ = create_datasets(str(root), num_classes=10, class_map='classes.txt')
    assert class_names(train_set) == list('9876543210')


def test_classes_merged_by_a_class_map_have_no_list_of_names(root, tmp_path):
    (tmp_path / 'parity.pkl').write_bytes(pickle.dumps({str(label): label % 2 for label in range(10)}))
    datasets = create_datasets(str(root), num_classes=2, class_map=str(tmp_path / 'parity.pkl'))
    assert {target for dataset in datasets for _, target in dataset} == {0, 1}
    assert class_names(datasets[0]) is None


def test_class_map_that_runs_code_is_refused_unrun(root, tmp_path):
    (tmp_path / 'classes.pkl').write_bytes(pickle.dumps({'0': RunsCode(tmp_path / 'marker')}))
    message = refused(root, class_map=str(tmp_path / 'classes.pkl'))
    assert f'--class-map {tmp_path}/classes.pkl' in message and 'a plain dict' in message
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize(('name', 'content', 'reason'), [
    ('map.pkl', b'', 'Ran out of input'),
    ('map.pkl', b'no pickle at all', 'expected a .txt'),
    ('map.pkl', pickle.dumps({str(label): label for label in range(10)})[:-20], 'truncated'),
    ('map.pkl', pickle.dumps(['0', '1']), 'expected a dict'),
    ('map.pkl', pickle.dumps({'0': '1'}), "'1' is no index"),
    ('map.pkl', pickle.dumps({'0': -1}), '-1 is no index'),
    ('map.pkl', pickle.dumps({'0': [0]}), '[0] is no index'),
    ('map.txt', b'', 'it names no class'),
    ('map.txt', b'\xff\xfe\x00', "can't decode"),
    ('map.json', b'{}', '.json'),
])
def test_malformed_class_map_is_refused_with_what_is_wrong(name, content, reason, root, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = refused(root, class_map=str(tmp_path / name))
    assert message.startswith(f'--class-map {tmp_path / name}: ') and reason in message


def test_class_map_that_fits_no_folder_is_named(root, tmp_path):
    (tmp_path / 'map.txt').write_text('0 zero\n1 one\n')
    assert f'--class-map {tmp_path / "map.txt"} (does it name the classes?)' in refused(
        root, class_map=str(tmp_path / 'map.txt'))


def test_index_of_a_class_map_beyond_the_model_is_refused(root, tmp_path):
    (tmp_path / 'map.txt').write_text('\n'.join(str(label) for label in range(12)))
    assert '12 classes in --train-split train' in refused(root, class_map=str(tmp_path / 'map.txt'))


def test_names_without_an_order_of_their_own_are_refused(root):
    (root / 'train' / '3').rename(root / 'train' / '04')
    assert 'classes 04 and 4' in refused(root).replace('4 and 04', '04 and 4')


@pytest.mark.parametrize(('folder', 'options', 'advice'), [
    ('train', {}, 'give {root};'),
    ('validation', {}, 'give {root};'),
    ('flat', {}, 'a folder for each split, train and validation'),
    ('train.tar', {}, '--train-split train.tar --val-split validation.tar'),
    ('.', {'train_split': 'train[:90%]', 'val_split': 'train[90%:]'}, 'reads {root}/train for'),
    ('.', {'val_split': 'training'}, '--val-split training'),
    ('fit_and_test', {'train_split': 'fit', 'val_split': 'tset'}, 'reads {root}/fit_and_test/fit for'),
    ('fit_and_test', {'train_split': 'fti', 'val_split': 'test'}, 'reads {root}/fit_and_test for'),
    ('flat', {'name': 'torch/image_folder'}, 'a folder for each split, train and validation'),
])
def test_validation_on_training_images_by_mistake_is_refused(folder, options, advice, root):
    shutil.copytree(root / 'train', root / 'flat')
    shutil.copytree(root / 'train', root / 'fit_and_test' / 'fit')
    shutil.copytree(root / 'train', root / 'fit_and_test' / 'test')
    pack(root, 'train')
    message = refused(root / folder, **options)
    assert advice.format(root=root) in message and "--val-split ''" in message


@pytest.mark.parametrize('folder', ['train', 'train.tar'])
def test_one_split_alone_trains_without_validation(folder, root):
    pack(root, 'train')
    train_set, eval_set = create_datasets(str(root / folder), num_classes=10, val_split='')
    assert len(train_set) == 160 and eval_set is None


def test_split_that_is_not_there_is_refused_without_validation_too(root):
    assert '--train-split fit' in refused(root, train_split='fit', val_split='')


def test_same_split_is_validated_on_where_the_flags_say_so(root):
    train_set, eval_set = create_datasets(str(root), num_classes=10, val_split='train')
    assert train_set.filenames() == eval_set.filenames()


def test_split_that_is_a_link_to_the_other_is_taken(root):
    shutil.rmtree(root / 'validation')
    (root / 'validation').symlink_to('train')
    train_set, eval_set = create_datasets(str(root), num_classes=10)
    assert len(train_set) == len(eval_set) == 160


def test_tars_in_a_folder_are_read_where_the_splits_name_them(root):
    pack(root, 'train', 'validation')
    for split in ('train', 'validation'):
        shutil.rmtree(root / split)
    assert '--train-split train.tar' in refused(root)
    assert [len(dataset) for dataset in create_datasets(str(root), num_classes=10, **TARS)] == [160, 100]


def test_damaged_tar_is_named(root):
    (root / 'train.tar').write_bytes(b'no tar')
    assert str(root / 'train.tar') in refused(root / 'train.tar', val_split='')


def test_fewer_classes_than_the_model_are_one_warning_that_names_the_split(root, tmp_path):
    run = run_script('--num-classes 12', root, tmp_path)
    (warning,) = [line for line in run.log if 'classes, the model 12' in line]
    assert warning.startswith(f'`train_split` train of {root} has 10 classes') and '`num_classes` 10?' in warning


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_images_that_cannot_be_read_end_the_run_with_the_name_of_a_file(split, workers, root, tmp_path):
    (root / split / '7').unlink()
    write_unreadable(root / split / '7', 12)
    run = run_script(f'--workers {workers} --batch-size 16', root, tmp_path)
    assert run.exit_code == 1
    assert run.error.splitlines()[-1].startswith(f'train-kd: error: {root / split}/7/')
    assert 'and the 9 images after it cannot be read' in run.error and 'Traceback' not in run.error


def test_images_of_a_tar_that_cannot_be_read_are_named_with_the_tar(root):
    shutil.rmtree(root / 'train')
    write_unreadable(root / 'train' / '0', 12)
    pack(root, 'train')
    train_set, _ = create_datasets(str(root / 'train.tar'), num_classes=10, val_split='')
    with pytest.raises(RuntimeError, match=r'^0/3.png of .*train.tar and the 9 images after it cannot be read'):
        train_set[3]


def test_image_of_too_many_pixels_is_named(root, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    _, eval_set = create_datasets(str(root), num_classes=10)
    with pytest.raises(RuntimeError, match=rf'^{root}/validation/0/000.png cannot be read: .*decompression bomb'):
        eval_set[0]


def test_unreadable_images_up_to_nine_are_skipped_as_timm_does(root):
    shutil.rmtree(root / 'train')
    write_unreadable(root / 'train' / '0', 9)
    Image.new('RGB', (4, 4)).save(root / 'train' / '0' / '9.png')
    train_set, _ = create_datasets(str(root), num_classes=10, val_split='')
    assert train_set[0][0].size == (4, 4)
