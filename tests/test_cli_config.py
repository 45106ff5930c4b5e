"""YAML config files: checked against the flags, overridden by the command line, and args.yaml read back."""
import json
import logging
from pathlib import Path

import pytest
import yaml

from timm_kd.cli import parse_args, resolve_kd

TIMM_FLAGS = json.loads((Path(__file__).parent / 'data' / 'timm_train_flags.json').read_text())


@pytest.fixture
def parse(tmp_path):
    """Parse with a config file of the given text, and further arguments."""
    def run(text: str, *argv: str, data: bool = True):
        path = tmp_path / 'config.yaml'
        path.write_text(text)
        return parse_args([*([str(tmp_path)] if data else []), '--config', str(path), *argv])[0]
    return run


@pytest.fixture
def refuse(parse, capsys):
    """The one line that a refused config file leaves on stderr."""
    def run(text: str, *argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(text, *argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith('train-kd: error: ') and error.count('\n') == 1
        return error
    return run


@pytest.fixture
def timm_args_yaml(tmp_path):
    """What timm's script writes as args.yaml: every flag by dest."""
    values = {timm_flag['dest']: timm_flag['default'] for timm_flag in TIMM_FLAGS}
    return yaml.safe_dump(dict(values, data=str(tmp_path), model='resnet18'))


@pytest.mark.parametrize('line, dest, value', [
    ('lr: 3e-4', 'lr', 3e-4),
    ('lr: "0.5"', 'lr', 0.5),
    ('lr: 1', 'lr', 1.0),
    ('epochs: "5"', 'epochs', 5),
    ('epochs: 5.0', 'epochs', 5),
    ('amp: true', 'amp', True),
    ('experiment: 2024', 'experiment', '2024'),
    ('mean: [0.5, 5e-1, 1]', 'mean', [0.5, 0.5, 1.0]),
    ('lr_noise: 0.5', 'lr_noise', [0.5]),
    ('torchcompile: true', 'torchcompile', 'inductor'),
    ('torchcompile: aot_eager', 'torchcompile', 'aot_eager'),
    ('color_jitter: null', 'color_jitter', None),
    ('dataset: null', 'dataset', ''),
    ('clip_grad:', 'clip_grad', None),
    ('model_kwargs: {act_layer: gelu, layer_scale: 1e-6}', 'model_kwargs', {'act_layer': 'gelu', 'layer_scale': 1e-6}),
])
def test_value_has_the_type_of_its_flag(parse, line, dest, value):
    converted = getattr(parse(line), dest)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize('line, says', [
    ('lr: fast', 'expected a number'),
    ('lr: [0.1]', 'expected one value'),
    ('lr: true', 'expected a number'),
    ('epochs: 1.5', 'expected an integer'),
    ('epochs: 1e2', 'expected an integer'),
    ('epochs: null', 'leave the line out'),
    ('amp: 1', 'expected true or false'),
    ('amp: "true"', 'expected true or false'),
    ('opt: no', 'quote'),
    ('model: {name: resnet18}', 'expected one value'),
    ('input_size: [224, 224]', 'expected 3 values'),
    ('scale: []', 'at least one value'),
    ('mean: [0.5, x, 0.5]', 'expected a number'),
    ('train_size_schedule: rising', 'constant, progressive'),
    ('kd_loss: nkdd', 'kd, dkd, nkd, tfnkd, tfkd'),
    ('model_kwargs: depth=3', 'expected a mapping'),
    ('teacher: {name: resnet34}', 'expected one value'),
])
def test_bad_value_is_refused_naming_file_and_key(refuse, line, says):
    error = refuse(line)
    assert f'config.yaml: {line.partition(":")[0]}: ' in error
    assert says in error


@pytest.mark.parametrize('text', ['- lr\n- 0.1\n', 'lr\n', 'lr: [0.1\n', 'a: b: c\n'])
def test_file_that_is_no_mapping_is_refused(refuse, text):
    assert 'config.yaml: ' in refuse(text)


def test_meaning_is_checked_as_on_the_command_line(refuse):
    assert '--smoothing 2.0' in refuse('smoothing: 2')


def test_empty_file_changes_nothing(parse, tmp_path):
    assert parse('# nothing\n') == parse_args([str(tmp_path)])[0]


def test_unknown_key_is_a_warning_with_the_nearest(parse, caplog):
    with caplog.at_level(logging.WARNING):
        args = parse('batch-size: 64\nlearning: 1\n')
    assert args.batch_size == 128
    assert 'batch-size: ignored' in caplog.text and 'batch_size' in caplog.text
    assert 'learning: ignored' in caplog.text


def test_command_line_overrides_the_file(parse):
    args = parse('lr: 0.5\nepochs: 7\nmodel_kwargs: {depth: 3}\n', '--lr', '0.25', '--model-kwargs', 'width=2')
    assert (args.lr, args.epochs, args.model_kwargs) == (0.25, 7, {'width': 2})


def test_abbreviated_config_flag_reads_the_file_too(tmp_path):
    (tmp_path / 'config.yaml').write_text('epochs: 7\n')
    assert parse_args([str(tmp_path), '--conf', str(tmp_path / 'config.yaml')])[0].epochs == 7


def test_data_folder_of_the_file_is_replaced_by_either_flag(parse, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    assert parse(f'data: {tmp_path}\n', '--data-dir', str(other), data=False).data is None
    assert parse(f'data_dir: {other}\n').data == str(tmp_path)
    assert parse(f'data_dir: {other}\n', data=False).data_dir == str(other)


@pytest.mark.parametrize('text, argv, teacher', [
    ('teacher: resnet34', [], 'resnet34'),
    ('teacher: [resnet34, resnet50]', [], ['resnet34', 'resnet50']),
    ('teacher: [resnet34]', [], 'resnet34'),
    ('teacher: [resnet34, resnet50]', ['--teacher', 'resnet101'], 'resnet101'),
    ('teacher: resnet34', ['--teacher', 'resnet50', '--teacher', 'resnet101'], ['resnet50', 'resnet101']),
    ('{teacher: resnet34, kd_loss: tfkd}', ['--teacher', ''], None),
])
def test_teachers_of_the_command_line_replace_those_of_the_file(parse, text, argv, teacher):
    assert parse(text, *argv).teacher == teacher


def test_args_yaml_of_timm_is_known_in_full_and_trains_plainly(parse, timm_args_yaml, caplog):
    with caplog.at_level(logging.WARNING):
        args = parse(timm_args_yaml, data=False)
    assert not caplog.records
    assert resolve_kd(args) is None
    assert args.kd_temperature is None
    assert args.decay_epochs == 90


def test_temperature_of_timm_args_yaml_counts_with_a_teacher(parse, timm_args_yaml):
    settings = resolve_kd(parse(timm_args_yaml, '--kd-model-name', 'resnet34', data=False))
    assert settings.loss_parameters == {'temperature': 4.0}


def test_temperature_of_timm_args_yaml_is_no_choice_of_a_teacher_free_loss(parse, timm_args_yaml):
    assert resolve_kd(parse(timm_args_yaml, '--kd-loss', 'tfkd', data=False)).loss_parameters == {}
    assert resolve_kd(parse(timm_args_yaml, '--kd-loss', 'tfnkd', data=False)).loss_parameters == {}


def test_temperature_on_the_command_line_counts_beside_timm_args_yaml(parse, timm_args_yaml):
    args = parse(timm_args_yaml, '--kd-loss', 'tfkd', '--kd-temperature', '4', data=False)
    assert resolve_kd(args).loss_parameters == {'temperature': 4.0}


def test_parameters_of_a_replaced_loss_go_with_it(parse, caplog):
    recipe = 'kd_loss: nkd\nteacher: resnet34\nkd_gamma: 2\nkd_temperature: 3\n'
    with caplog.at_level(logging.WARNING):
        settings = resolve_kd(parse(recipe, '--kd-loss', 'dkd'))
    assert (settings.loss, settings.loss_parameters) == ('dkd', {'temperature': 3.0})
    assert 'kd_gamma' in caplog.text


def test_wrong_parameter_inside_one_file_is_refused(refuse):
    assert '--kd-gamma 2.0' in refuse('kd_loss: dkd\nteacher: resnet34\nkd_gamma: 2\n')


def test_config_key_is_not_followed(parse, caplog):
    with caplog.at_level(logging.WARNING):
        args = parse('config: other.yaml\nepochs: 3\n')
    assert args.epochs == 3
    assert 'config: ignored' in caplog.text


@pytest.mark.parametrize('argv', [
    [],
    ['--teacher', 'resnet34', '--teacher', 'resnet50', '--kd-loss', 'nkd', '--kd-temperature', '4'],
    ['--kd-model-name', 'resnet34', '--amp', '--torchcompile'],
    ['--kd-loss', 'tfkd', '--kd-temperature', '4', '--kd-correct-prob', '0.9'],
    ['--teacher', 'resnet34', '--teacher-cache', 'logits', '--teacher-kwargs', 'drop_rate=0.0'],
    ['--opt', 'adamw', '--opt-kwargs', 'amsgrad=True', '--opt-betas', '0.9', '0.95', '--cutmix-minmax', '0.2', '0.8'],
    ['--sched', 'wsd', '--decay-epochs', '0.3', '--save-epochs', '10', '20', '--lr', '3e-7', '--wandb-tags', 'a', 'b'],
], ids=' '.join)
def test_own_args_yaml_reads_back_to_the_same_run(tmp_path, caplog, argv):
    args, text = parse_args([str(tmp_path), *argv])
    (tmp_path / 'args.yaml').write_text(text)
    with caplog.at_level(logging.WARNING):
        assert parse_args(['--config', str(tmp_path / 'args.yaml')]) == (args, text)
    assert not caplog.records
