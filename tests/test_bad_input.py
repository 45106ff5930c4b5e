"""What the script answers to input that cannot work: one line that names the flag and its value, and exit code 2."""
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers import BASE, RunsCode

from timm_kd.train import main

REFUSED = {
    # the student
    'distilled DeiT': (
        '--model deit_tiny_distilled_patch16_224 --teacher {teacher}',
        '--model deit_tiny_distilled_patch16_224', 'deit_tiny_patch16_224',
    ),
    'student of two outputs': (
        '--model inception_v3 --model-kwargs aux_logits=True --img-size 299 --batch-size 2',
        '--model inception_v3 returns a tuple', '--model-kwargs',
    ),
    'student of unpooled features': ("--gp ''", "--gp ''", '--model test_resnet fails on images of 3x32x32'),
    'image size that the student cannot take': (
        '--model test_vit --img-size 33', '--model test_vit fails on images of 3x33x33', '--img-size 33',
    ),
    'one of the image sizes that the student cannot take': (
        '--model test_vit --train-img-sizes 32 40 --model-kwargs dynamic_img_size=True',
        '--model test_vit fails on images of 3x40x40', '--train-img-sizes 32 40',
    ),
    'batch too small for batch norm': ('--batch-size 1', '--batch-size 1', '--model test_resnet fails on images'),
    'unknown student': ('--model resnt50', '--model resnt50', 'resnet50'),
    'unknown model argument': ('--model-kwargs depth=3', '--model test_resnet', "'depth'"),
    # the teacher
    'other class count': (
        '--teacher {teacher} --num-classes 12', '--teacher {teacher} has 10 classes, the student 12',
        'train-kd DATA --model local-dir:{teacher} --pretrained --num-classes 12', '--teacher-class-map',
    ),
    'other class count of timm': (
        '--teacher resnet34.tv_in1k', '--teacher resnet34.tv_in1k has 1000 classes, the student 10',
        'train-kd DATA --model resnet34.tv_in1k --pretrained --num-classes 10',
    ),
    'unknown teacher': ('--teacher resnet3', '--teacher resnet3', 'did you mean resnet34'),
    'file without its architecture': ('--teacher {bad}/vit.pth', '--teacher {bad}/vit.pth needs --teacher-model'),
    'file of a whole model': (
        '--teacher-model test_resnet --teacher {bad}/whole.pth', '--teacher {bad}/whole.pth', 'ResNet', 'state_dict()',
    ),
    # data
    'more classes than the model': ('--num-classes 7', '{digits}: 10 classes', '--num-classes 7'),
    'split that is not there': ('--val-split val2', '--val-split val2', 'train, validation'),
    'batch that is never full': ('--batch-size 500', '--batch-size 500', '160 training images'),
    'images of other channels': ('--in-chans 5', 'images of mode L have 1 channels', '--in-chans'),
    'repeats in one process': ('--aug-repeats 3', '--aug-repeats 3', 'torchrun'),
    'validation images that test-time augmentation leaves over': (
        '--tta 16 --validation-batch-size 32', '--tta 16', '100 images', '--val-split validation',
    ),
    # weights to start from
    'resume truncated': ('--resume {bad}/truncated.pth', '--resume {bad}/truncated.pth cannot be read'),
    'resume text': ('--resume {bad}/text.pth', '--resume {bad}/text.pth is not a checkpoint'),
    'resume another model': ('--resume {bad}/vit.pth', '--resume {bad}/vit.pth: does not fit --model'),
    'start from truncated': (
        '--initial-checkpoint {bad}/truncated.pth', '--initial-checkpoint {bad}/truncated.pth cannot be read',
    ),
    'start from another model': (
        '--initial-checkpoint {bad}/vit.pth', '--initial-checkpoint {bad}/vit.pth does not fit --model test_resnet',
    ),
    'start from other classes': (
        '--initial-checkpoint {bad}/other_classes.pth',
        '--initial-checkpoint {bad}/other_classes.pth does not fit', '--pretrained-path takes all but the head',
    ),
    'pretrained truncated': (
        '--pretrained --pretrained-path {bad}/truncated.pth', '--pretrained-path {bad}/truncated.pth cannot be read',
    ),
    'pretrained list': (
        '--pretrained --pretrained-path {bad}/list.pth', '--pretrained-path {bad}/list.pth holds a list',
    ),
    'start from a list': ('--initial-checkpoint {bad}/list.pth', '--initial-checkpoint {bad}/list.pth holds a list'),
    # the schedule
    'no updates to decay in': (
        '--sched wsd --sched-on-updates --warmup-epochs 0 --batch-size 80',
        '--sched wsd --sched-on-updates: 2 updates', '--decay-epochs',
    ),
    # the machine
    'device that this torch lacks': ('--device xpu', '--device xpu'),
    'no such device': ('--device cuda:99', '--device cuda:99'),
    'output that cannot be': ('--output {bad}/text.pth', '--output {bad}/text.pth'),
}


@pytest.fixture(scope='session')
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are no weights for a `test_resnet` of 10 classes."""
    folder = tmp_path_factory.mktemp('bad')
    good = timm.create_model('test_resnet', num_classes=10)
    torch.save(good, folder / 'whole.pth')
    torch.save(good.state_dict(), folder / 'truncated.pth')
    (folder / 'truncated.pth').write_bytes((folder / 'truncated.pth').read_bytes()[:100_000])
    torch.save(timm.create_model('test_vit', num_classes=10).state_dict(), folder / 'vit.pth')
    torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), folder / 'other_classes.pth')
    torch.save([1, 2], folder / 'list.pth')
    (folder / 'text.pth').write_text('hello')
    return folder


@pytest.fixture
def refuse(digits: Path, tmp_path: Path, refusal: Callable[..., str]) -> Callable[..., str]:
    """Runs the script in vain, and returns the one line that it says."""
    def run(flags: str, data: Path = digits) -> str:
        error = refusal([str(data), *shlex.split(f'{BASE} --output {tmp_path / "output"} {flags}')], main)
        assert not (tmp_path / 'output').exists(), 'something was left behind'
        return error
    return run


@pytest.mark.parametrize('case', REFUSED)
def test_refused_in_one_line_that_names_flag_and_value(case, refuse, bad, digits, digits_teacher):
    def fill(text: str) -> str:
        return text.format(bad=bad, digits=digits, teacher=digits_teacher)

    flags, *words = REFUSED[case]
    message = refuse(fill(flags))
    assert [word for word in words if fill(word) not in message] == []


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('flags', [
    '--teacher-model test_resnet --teacher',
    '--resume',
    '--initial-checkpoint',
    '--pretrained --pretrained-path',
])
def test_pickle_that_would_run_code_runs_nothing(flags, zipped, refuse, tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'weights.pth'
    weights = timm.create_model('test_resnet', num_classes=10).state_dict()
    torch.save({'state_dict': weights, 'extra': RunsCode(marker)}, path, _use_new_zipfile_serialization=zipped)
    message = refuse(f'{flags} {path}')
    assert not marker.exists()
    assert f'{flags.split()[-1]} {path}' in message
    assert 'posix.system, so loading it could run code; it was refused' in message


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
def test_bare_pickle_runs_nothing_whatever_its_name(name, refuse, tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / name
    path.write_bytes(pickle.dumps(RunsCode(marker), protocol=2))
    message = refuse(f'--teacher-model test_resnet --teacher {path}')
    assert not marker.exists()
    assert f'--teacher {path}' in message


def test_pickle_in_a_teachers_folder_runs_nothing(refuse, tmp_path, digits_teacher):
    marker, folder = tmp_path / 'marker', tmp_path / 'teacher'
    folder.mkdir()
    shutil.copy(digits_teacher / 'config.json', folder)
    torch.save({'fc.bias': RunsCode(marker)}, folder / 'pytorch_model.bin')
    message = refuse(f'--teacher {folder}')
    assert not marker.exists()
    assert f'--teacher {folder}' in message and 'could run code' in message and 'best as .safetensors' in message


def test_pickles_of_these_tests_do_run_code_where_nothing_holds_them_back(tmp_path):
    marker = tmp_path / 'marker'
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists()


def test_data_folder_that_is_missing_is_named(refuse, tmp_path):
    assert f'data folder {tmp_path / "none"} does not exist' in refuse('', tmp_path / 'none')


def test_data_folder_without_images_is_named(refuse, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert f'{tmp_path / "empty"}' in refuse('', tmp_path / 'empty')


def test_data_folder_without_class_folders_is_named(refuse, tmp_path, digits):
    flat = tmp_path / 'flat'
    for split in ('train', 'validation'):
        shutil.copytree(digits / split / '0', flat / split)
    message = refuse('', flat)
    assert f'data folder {flat}' in message and 'no class folders' in message


def test_machine_without_a_gpu_trains_on_its_cpu_with_a_warning(digits, tmp_path, caplog):
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    flags = BASE.replace('--device cpu ', '')
    main([str(digits), *shlex.split(f'{flags} --output {tmp_path} --val-split "" --opt momentum --lr 0.01')])
    assert any('No GPU found' in record.message for record in caplog.records if record.levelname == 'WARNING')
