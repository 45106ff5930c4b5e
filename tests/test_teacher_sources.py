"""Where a teacher may come from, and what is said when it cannot be had."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import build

from timm_kd.cli.messages import in_flags
from timm_kd.errors import UsageError
from timm_kd.run.log import setup_logging
from timm_kd.teacher import Teacher, create_teacher
from timm_kd.teacher.spec import locate, warn_of_bce

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_is(teacher: Teacher, model: torch.nn.Module, images: torch.Tensor = IMAGES) -> None:
    torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as timm saves it for the Hub; the pickle in it holds other weights than the safetensors file."""
    timm.models.save_for_hf(build(), tmp_path, safe_serialization=True)
    torch.save(build(seed=1).state_dict(), tmp_path / 'pytorch_model.bin')
    return tmp_path


@pytest.mark.parametrize('prefix', ['', 'local-dir:'])
def test_folder_saved_by_timm_prefers_safetensors(folder, prefix):
    assert_is(Teacher(f'{prefix}{folder}', 10, dtype='float32'), build())


def test_folder_with_a_pickle_alone_loads(folder):
    (folder / 'model.safetensors').unlink()
    assert_is(Teacher(str(folder), 10, dtype='float32'), build(seed=1))


def test_class_count_of_a_folder_is_checked_before_its_weights_are_read(folder):
    (folder / 'model.safetensors').write_bytes(b'')
    with pytest.raises(UsageError, match='has 10 classes, the student 5: a head is never rebuilt'):
        Teacher(str(folder), 5)


def test_folder_with_damaged_weights_is_refused(folder):
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=f"teacher 'local-dir:{folder}': .*damaged"):
        Teacher(f'local-dir:{folder}', 10)


def test_model_kwargs_reach_the_architecture(folder):
    assert Teacher(str(folder), 10, model_kwargs={'drop_rate': 0.25}).model.drop_rate == 0.25


@pytest.mark.parametrize('argument', [
    {'model_kwargs': {'no_such': 1}}, {'model_kwargs': {'num_classes': 7}}, {'model': 'test_resnet'}, {'use_ema': True},
], ids=str)
def test_argument_that_does_not_suit_a_folder_is_refused(folder, argument):
    with pytest.raises(UsageError, match=f'`{next(iter(argument))}`'):
        Teacher(str(folder), 10, **argument)


# weights files

def checkpoint(model: torch.nn.Module, arch: str = 'test_resnet', **args) -> dict:
    """As timm's script saves one."""
    return {'state_dict': model.state_dict(), 'arch': arch, 'epoch': 3, 'args': argparse.Namespace(**args)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f'{prefix}{key}': value for key, value in build().state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], str]:
    """Saves a file, and returns its path."""
    def save(content: object) -> str:
        torch.save(content, tmp_path / 'weights.pth')
        return str(tmp_path / 'weights.pth')
    return save


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.pt', '.bin'])
def test_state_dict_file_loads(tmp_path, suffix):
    path = tmp_path / f'weights{suffix}'
    save = safetensors.torch.save_file if suffix == '.safetensors' else torch.save
    save(build().state_dict(), path)
    assert_is(Teacher(str(path), 10, dtype='float32', model='test_resnet'), build())


@pytest.mark.parametrize('content', [
    checkpoint(build(), num_classes=10),
    {'model': build().state_dict(), 'epoch': 3, 'args': argparse.Namespace(model='resnet')},
    {'state_dict': prefixed('module.')},
    {'state_dict': prefixed('_orig_mod.')},
    prefixed('module._orig_mod.'),
], ids=['timm', 'torchvision', 'ddp', 'compiled', 'both'])
def test_training_checkpoint_loads(saved, content):
    teacher = Teacher(saved(content), 10, dtype='float32', model='test_resnet')
    assert_is(teacher, build())
    assert 'state_dict' not in teacher.model.pretrained_cfg  # a second copy of the weights


@pytest.mark.parametrize('use_ema', [False, True])
def test_ema_weights_are_taken_when_asked_for_alone(saved, use_ema):
    path = saved({**checkpoint(build()), 'state_dict_ema': build(seed=1).state_dict()})
    assert_is(Teacher(path, 10, dtype='float32', model='test_resnet', use_ema=use_ema), build(seed=int(use_ema)))


def test_checkpoint_brings_the_normalisation_it_was_trained_with(saved):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    path = saved(checkpoint(build(), mean=list(mean), std=list(std)))
    assert_is(Teacher(path, 10, mean=mean, std=std, dtype='float32', model='test_resnet'), build())


def test_checkpoint_brings_the_size_it_was_trained_at(saved):
    model = build('test_vit', img_size=32)
    path = saved(checkpoint(model, 'test_vit', img_size=32, model_kwargs={}))
    assert_is(Teacher(path, 10, dtype='float32', model='test_vit'), model)


def test_checkpoint_of_grey_images_stays_grey(saved):
    model = build(in_chans=1)
    teacher = Teacher(saved(model.state_dict()), 10, in_chans=1, dtype='float32', model='test_resnet')
    assert_is(teacher, model, IMAGES[:, :1])


@pytest.mark.parametrize(('content', 'options', 'said'), [
    (checkpoint(build()), {}, 'needs `model`, .*test_resnet'),
    (build().state_dict(), {'model': 'test_resnt'}, '`model` test_resnt .*test_resnet'),
    (build().state_dict(), {'model': 'test_efficientnet'}, "' does not fit `model` test_efficientnet: .*Missing"),
    ({key: value for key, value in build().state_dict().items() if key != 'layer2.0.conv1.weight'},
     {'model': 'test_resnet'}, r'layer2\.0\.conv1\.weight'),
    (checkpoint(build()), {'model': 'test_resnet', 'use_ema': True}, "`use_ema`.*' holds no EMA weights"),
    ({}, {'model': 'test_resnet'}, "' holds no state dict"),
    ({'state_dict': {}}, {'model': 'test_resnet'}, "' holds no state dict"),
    ({'epoch': 3}, {'model': 'test_resnet'}, "' holds no state dict"),
    ([1, 2], {'model': 'test_resnet'}, "' holds a list"),
    (torch.zeros(2), {'model': 'test_resnet'}, "' holds a Tensor"),
])
def test_file_that_is_not_what_was_asked_for_is_refused(saved, content, options, said):
    with pytest.raises(UsageError, match=said) as refused:
        Teacher(saved(content), 10, **options)
    assert 'weights.pth' in str(refused.value) or options.get('model') == 'test_resnt'


def test_file_of_another_architecture_is_not_explained_by_its_head(saved):
    path = saved(checkpoint(build('test_convnext'), 'test_convnext'))
    with pytest.raises(UsageError, match='does not fit `model` .*the file says test_convnext') as refused:
        Teacher(path, 5, model='test_convnext2')
    assert 'classes' not in str(refused.value)


def test_file_of_another_class_count_is_refused_with_both_numbers(saved):
    path = saved(build().state_dict())
    with pytest.raises(UsageError, match='has 10 classes, the student 5') as refused:
        Teacher(path, 5, model='test_resnet')
    started_from = f'--model test_resnet --pretrained --pretrained-path {path} --num-classes 5'
    assert started_from in str(refused.value)


@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
@pytest.mark.parametrize('keep', [0, 3000, -2000])
def test_truncated_file_is_refused(tmp_path, name, keep):
    path = tmp_path / name
    (safetensors.torch.save_file if name.endswith('s') else torch.save)(build().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=f"teacher '{path}' cannot be read, it is truncated or not a checkpoint"):
        Teacher(str(path), 10, model='test_resnet')


@pytest.mark.parametrize('content', [b'weights? no.', b'\x80\x02}q\x00.', b'PK\x03\x04 but no archive'])
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / 'weights.pth').write_bytes(content)
    with pytest.raises(UsageError, match=r"teacher .*weights\.pth' (is not a checkpoint|cannot be read)"):
        Teacher(str(tmp_path / 'weights.pth'), 10, model='test_resnet')


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore:.torch.load. received')
@pytest.mark.parametrize('in_folder', [False, True])
def test_advice_to_switch_off_weights_only_is_not_quoted(folder, in_folder):
    """A TorchScript archive: torch says that loading it with `weights_only=False` will likely succeed."""
    (folder / 'model.safetensors').unlink()
    torch.jit.trace(build(), IMAGES).save(folder / 'pytorch_model.bin')
    spec, model = (folder, None) if in_folder else (folder / 'pytorch_model.bin', 'test_resnet')
    with pytest.raises(UsageError, match=r'could run code.*best as \.safetensors') as refused:
        Teacher(spec, 10, model=model)
    assert 'weights_only' not in str(refused.value)


# names

@pytest.mark.parametrize(('spec', 'expected'), [
    ('hf-hub:org/name', ('hub', 'hf-hub:org/name')),
    ('hf_hub:org/name', ('hub', 'hf_hub:org/name')),
    ('org/name', ('hub', 'hf-hub:org/name')),
    ('org/name@v1.0', ('hub', 'hf-hub:org/name@v1.0')),
    ('resnet34', ('timm', 'resnet34')),
    ('resnet34.tv_in1k', ('timm', 'resnet34.tv_in1k')),
    ('mobilenetv2_100', ('timm', 'mobilenetv2_100')),
    ('tv_resnet34', ('timm', 'resnet34.tv_in1k')),  # retired by timm
])
@pytest.mark.filterwarnings('ignore:Mapping deprecated')
def test_spec_is_understood(spec, expected):
    assert locate(spec) == expected


def test_existing_path_goes_before_timm_and_hub_names(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename('resnet34')
    assert locate('resnet34') == ('folder', 'local-dir:resnet34')
    assert locate('resnet34/model.safetensors') == ('file', 'resnet34/model.safetensors')


@pytest.mark.parametrize(('spec', 'said'), [
    ('{}', r'has no config\.json.*`model`'),
    ('local-dir:{}/none', 'no such folder'),
    ('weights.pth', 'no such file'),
    ('weights.safetensors', 'no such file'),
    ('./a/b/last.pth.tar', 'no such file'),
    ('resnet3', 'resnet34'),
    ('resnet34.tv_in1', r'resnet34\.tv_in1k'),
    ('http://example.org/model', 'hf-hub:org/name or local-dir:PATH'),
    ('vit_base_patch16_reg4_gap_256', 'no pretrained weights'),
])
def test_spec_that_leads_nowhere_is_refused(tmp_path, spec, said):
    spec = spec.format(tmp_path)
    with pytest.raises(UsageError, match=f"teacher '{spec}'.*{said}"):
        Teacher(spec, 1000)


@pytest.mark.parametrize('spec', ['output/last', './output/last', '~/output/last'])
def test_mistyped_path_says_that_nothing_is_there_before_it_speaks_of_the_hub(spec, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(UsageError, match=f"teacher '{spec}': (there is )?no such (file or )?folder"):
        Teacher(spec, 1000)


def test_class_count_of_a_timm_name_is_checked_before_a_download():
    with pytest.raises(UsageError, match=r"teacher 'resnet34\.tv_in1k' has 1000 classes, the student 10:"):
        Teacher('resnet34.tv_in1k', 10)


@pytest.mark.parametrize(('name', 'said'), [
    ('resnet34', ['resnet34.a1_in1k', 'resnet34.tv_in1k']), ('resnet101', ['resnet101.a1h_in1k', 'resnet101.tv_in1k']),
    ('resnet34.a1_in1k', None), ('vgg16', None),
])
def test_untagged_name_of_bce_trained_weights_is_warned_of_once(name, said, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_bce(name)
    assert len(caplog.records) == (said is not None)
    assert all(tag in caplog.text for tag in said or [])


def test_list_of_one_is_a_teacher_of_its_own(folder):
    assert isinstance(create_teacher([str(folder)], 10), Teacher)


# the script

@pytest.mark.parametrize(('said', 'in_the_script'), [
    ("teacher 'resnet3' is no file", '--teacher resnet3 is no file'),
    ("teacher 'a b/it's.pth': no such file.", "--teacher a b/it's.pth: no such file."),
    ("`img_size` 64: teacher 'vit' takes 160x160 only.", '--teacher-img-size 64: --teacher vit takes 160x160 only.'),
    ("`model_kwargs` {'a': 1} do not suit the teacher", "--teacher-kwargs {'a': 1} do not suit the teacher"),
    ("teacher cache '/a/b c': its disk is full, store less (`topk`, `num_epochs`) or use `rebuild`.",
     '--teacher-cache /a/b c: its disk is full, store less (--teacher-cache-topk, --teacher-cache-epochs) or use '
     '--teacher-cache-rebuild.'),
    ("class map 'classes.txt': `train_split` train has 9 classes, `num_classes` 8.",
     '--class-map classes.txt: --train-split train has 9 classes, --num-classes 8.'),
    ('run `hf auth login`, or set HF_TOKEN', 'run `hf auth login`, or set HF_TOKEN'),
])
def test_script_speaks_flags_where_the_library_speaks_arguments(said, in_the_script):
    assert in_flags(said) == in_the_script


def test_the_console_speaks_flags_in_warnings_too(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, 'handlers', [])
    monkeypatch.setattr(logging.root, 'level', logging.root.level)
    setup_logging(in_flags)
    logging.getLogger('timm_kd.data').warning('%s has 10 classes, the model 12 (`num_classes` 10?).', '`train_split` a')
    assert capsys.readouterr().err.endswith('--train-split a has 10 classes, the model 12 (--num-classes 10?).\n')
