"""The student that timm builds is checked, and is afterwards what timm built."""
import pytest
import timm
import torch

from timm_kd.cli import parse_args
from timm_kd.errors import UsageError
from timm_kd.process import Process
from timm_kd.setup import create_student


@pytest.fixture
def create(tmp_path):
    """Creates a student, seeded."""
    def build(*flags: str) -> torch.nn.Module:
        args, _ = parse_args([str(tmp_path), '--num-classes', '10', '--img-size', '32', '--device', 'cpu', *flags])
        torch.manual_seed(0)
        return create_student(args, Process(torch.device('cpu')), None)[0]
    return build


@pytest.fixture
def start_from(create):
    """Creates a `test_resnet` with the weights of a file."""
    return lambda path: create('--model', 'test_resnet', '--pretrained', '--pretrained-path', path)


@pytest.fixture
def weights(tmp_path):
    """Saves the weights of another seed, changed by the function; returns the file and what it holds."""
    def save(change=lambda state: state, **options) -> tuple[str, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        state = change(timm.create_model('test_resnet', **options).state_dict())
        torch.save(state, tmp_path / 'weights.pth')
        return str(tmp_path / 'weights.pth'), state
    return save


def assert_equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    assert [key for key in state if not torch.equal(state[key], other[key])] == []


@pytest.mark.parametrize('model', ['test_resnet', 'test_vit'])
@pytest.mark.parametrize('flags', [(), ('--split-bn', '--aug-splits', '3'), ('--train-img-sizes', '48', '64')], ids=str)
def test_checked_student_and_random_streams_are_those_of_timm(model, flags, create):
    if flags and model == 'test_vit':
        flags = (*flags, '--model-kwargs', 'dynamic_img_size=True')
    student = create('--model', model, *flags)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    options = dict(img_size=32) if model == 'test_vit' else {}
    expected = timm.create_model(model, num_classes=10, **options).state_dict()
    assert torch.equal(drawn, torch.rand(3))
    assert_equal({key: value for key, value in student.state_dict().items() if key in expected}, expected)
    assert student.training


def test_pretrained_file_of_another_class_count_gives_all_but_the_head(start_from, weights):
    path, saved = weights(num_classes=7)
    student = start_from(path).state_dict()
    body = [key for key in saved if not key.startswith('fc.')]
    assert_equal({key: student[key] for key in body}, {key: saved[key] for key in body})
    assert student['fc.weight'].shape == (10, saved['fc.weight'].shape[1])


def test_pretrained_file_leaves_the_random_streams_as_timm_does(start_from, weights):
    path, _ = weights(num_classes=10)
    start_from(path)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    overlay = dict(file=path, num_classes=-1)
    timm.create_model('test_resnet', num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize('change', [
    lambda state: {**state, 'extra.buffer': torch.zeros(3)},
    lambda state: {f'module.{key}': value for key, value in state.items()},
    lambda state: {'state_dict': state, 'epoch': 3},
    lambda state: {key: value for key, value in state.items() if not key.startswith('layer1')},
], ids=['extra', 'of DDP', 'checkpoint', 'a part'])
def test_pretrained_file_with_more_or_less_than_the_model_is_taken(change, start_from, weights):
    path, saved = weights(change)
    student = start_from(path).state_dict()
    saved = saved.get('state_dict', saved)
    key = next(key for key in saved if key.endswith('layer2.0.conv1.weight'))
    assert torch.equal(student['layer2.0.conv1.weight'], saved[key])


def test_pretrained_file_saved_from_this_very_seed_is_taken(start_from, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'weights.pth')
    start_from(str(tmp_path / 'weights.pth'))


@pytest.mark.parametrize('level', ['INFO', 'ERROR'])
def test_pretrained_file_of_other_names_is_refused_with_some_of_both(level, start_from, weights, caplog):
    caplog.set_level(level)  # other ranks than the first log errors alone
    path, _ = weights(lambda state: {f'encoder.{key}': value for key, value in state.items()})
    with pytest.raises(UsageError) as refused:
        start_from(path)
    for words in (f'--pretrained-path {path}', '--model test_resnet', 'lacks conv1.0.weight', 'holds encoder.conv1.0'):
        assert words in str(refused.value)
    assert any(record.name == 'timm.models._builder' for record in caplog.records) == (level == 'INFO')
