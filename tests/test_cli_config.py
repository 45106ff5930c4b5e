"""YAML config files: checked against the flags, overridden by the command line, and args.yaml read back."""
import logging
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import TIMM_FLAGS
from timm.data import resolve_data_config
from timm.models import resolve_model_input_args

from timm_kd.cli import parse_args, resolve_kd

RECIPES = Path(__file__).parents[1] / 'hparams'


@pytest.fixture(autouse=True)
def warnings_alone(caplog):
    caplog.set_level(logging.WARNING)


@pytest.fixture
def words(tmp_path):
    """The command line with a config file of the given text, and further arguments."""
    def write(text: str, *argv: str, data: bool = True) -> list[str]:
        path = tmp_path / 'config.yaml'
        path.write_text(text)
        return [*([str(tmp_path)] if data else []), '--config', str(path), *argv]
    return write


@pytest.fixture
def parse(words):
    return lambda *args, **options: parse_args(words(*args, **options))[0]


@pytest.fixture
def refuse(words, refusal):
    return lambda *args: refusal(words(*args))


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
    ('input_size: [224, 224]', 'expected 3'),
    ('scale: []', 'at least one'),
    ('mean: [0.5, x, 0.5]', 'expected a number'),
    ('train_size_schedule: rising', 'constant, progressive'),
    ('kd_loss: nkdd', 'kd, dkd, nkd, tfnkd, tfkd'),
    ('model_kwargs: depth=3', 'expected a mapping'),
    ('teacher: {name: resnet34}', 'expected one value'),
    ('wandb_tags: [a, --help]', "'--help'"),
    ('wandb_tags: [a, -c, b]', "'-c'"),
    ('lr: ""', "'': expected a number"),
])
def test_bad_value_is_refused_naming_file_and_key(refuse, line, says):
    error = refuse(line)
    assert f'config.yaml: {line.partition(":")[0]}: ' in error
    assert says in error


@pytest.mark.parametrize('text', ['- lr\n- 0.1\n', 'lr\n', 'lr: [0.1\n', 'a: b: c\n'])
def test_file_that_is_no_mapping_is_refused(refuse, text):
    assert 'config.yaml: ' in refuse(text)


@pytest.mark.parametrize('text, sentence', [
    ('smoothing: 2', 'config.yaml: smoothing: 2.0: expected a value of at least 0 and below 1'),
    ('lr: .inf', 'config.yaml: lr: inf: expected a finite number'),
    ('mean: [0.5, .nan, 0.5]', 'config.yaml: mean: nan'),
    ('sched: cosin', 'config.yaml: sched: cosin: expected one of cosine'),
    ('aug_splits: 1', '--aug-splits 1'),
    ('bce_loss: true\nloss: ce', '--bce-loss and --loss ce'),
    ('kd_loss: dkd\nteacher: resnet34\nkd_gamma: 2', '--kd-gamma 2.0'),
])
def test_range_name_and_meaning_are_checked_as_on_the_command_line(refuse, text, sentence):
    assert sentence in refuse(text)


def test_empty_file_changes_nothing(parse, tmp_path):
    assert parse('# nothing\n') == parse_args([str(tmp_path)])[0]


def test_unknown_key_is_a_warning_with_the_nearest(parse, caplog):
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


@pytest.mark.parametrize('text, argv, values', [
    ('input_size: [3, 224, 256]', '--img-size 32', {'img_size': 32, 'input_size': None, 'in_chans': 3}),
    ('input_size: [1, 224, 224]', '--img-size 32', {'img_size': 32, 'input_size': None, 'in_chans': 1}),
    ('input_size: [3, 224, 256]', '--in-chans 1', {'img_size': None, 'input_size': [1, 224, 256], 'in_chans': 1}),
    ('input_size: [3, 9, 9]', '--in-chans 1 --img-size 8', {'img_size': 8, 'input_size': None, 'in_chans': 1}),
    ('{img_size: 96, in_chans: 1}', '--input-size 3 64 64', {'img_size': None, 'input_size': [3, 64, 64],
                                                            'in_chans': None}),
    ('{img_size: 96, in_chans: 1}', '--img-size 64', {'img_size': 64, 'in_chans': 1}),
    ('model_kwargs: {img_size: 96, depth: 2}', '--img-size 64', {'img_size': 64, 'model_kwargs': {'depth': 2}}),
    ('bce_loss: true', '--loss ce', {'bce_loss': False, 'loss': 'ce'}),
    ('loss: jsd', '--bce-loss', {'bce_loss': True, 'loss': 'bce'}),
    ('{jsd_loss: true, aug_splits: 3}', '--bce-loss', {'bce_loss': True, 'jsd_loss': False, 'aug_splits': 3}),
    ('drop_path: 0.2', '--drop-connect 0.1', {'drop_path': None, 'drop_connect': 0.1}),
    ('drop_connect: 0.2', '--drop-path 0.1', {'drop_path': 0.1, 'drop_connect': None}),
    ('lr: 0.1', '--lr-base 0.2', {'lr': None, 'lr_base': 0.2}),
    ('{cutmix_minmax: [0.2, 0.8], mixup: 0.8}', '--cutmix 0', {'cutmix_minmax': None, 'cutmix': 0, 'mixup': 0.8}),
    ('initial_checkpoint: gone.pth', '--pretrained', {'initial_checkpoint': '', 'pretrained': True}),
    ('{pretrained: true, pretrained_path: gone.pth}', f'--initial-checkpoint {__file__}',
     {'pretrained': False, 'pretrained_path': None}),
    ('pretrained: true', f'--pretrained-path {__file__}', {'pretrained': True, 'pretrained_path': __file__}),
    ('amp: true', '--model-dtype bfloat16', {'amp': False, 'model_dtype': 'bfloat16'}),
    ('{torchcompile: true, torchcompile_mode: default}', '--torchscript', {'torchcompile': None,
                                                                          'torchcompile_mode': None}),
    ('{opt: adamw, opt_kwargs: {betas: [0.9, 0.99], amsgrad: true}}', '--opt-betas 0.8 0.9',
     {'opt_betas': [0.8, 0.9], 'opt_kwargs': {'amsgrad': True}}),
    ('kd_model_name: resnet34', '--teacher resnet50', {'kd_model_name': None, 'teacher': 'resnet50'}),
    ('teacher: [resnet34, resnet50]', '--kd-model-name resnet18', {'kd_model_name': 'resnet18', 'teacher': None}),
    ('{pretrained: true, initial_checkpoint: gone.pth}', "--initial-checkpoint ''",
     {'pretrained': True, 'initial_checkpoint': ''}),
    ('{kd_model_name: resnet34, kd_loss: tfkd}', "--teacher ''", {'kd_model_name': None, 'teacher': None}),
])
def test_flag_of_the_command_line_replaces_what_the_file_says_of_the_same_thing(parse, caplog, text, argv, values):
    args = parse(text, *shlex.split(argv))
    assert {dest: getattr(args, dest) for dest in values} == values
    assert not caplog.records


@pytest.mark.parametrize('text, argv, dests', [
    ('{sched: wsd, lr_decay_fn: cosine}', '--sched cosine', ['lr_decay_fn']),
    ('{sched: rsqrt, lr_stable_timescale: 3}', '--sched step', ['lr_stable_timescale']),
    ('{teacher: %(file)s, teacher_model: resnet18, teacher_ema: true}', '--teacher resnet34',
     ['teacher_model', 'teacher_ema']),
    ('{teacher: resnet34, kd_loss: tfkd, teacher_img_size: 64, no_teacher_eval: true}', "--teacher ''",
     ['teacher_img_size', 'no_teacher_eval']),
    ('{teacher: resnet34, kd_temperature: 3, distill_loss_weight: 2, kd_warmup_epochs: 3}', "--teacher ''",
     ['kd_temperature', 'distill_loss_weight', 'kd_warmup_epochs']),
])
def test_what_describes_a_replaced_schedule_or_teacher_goes_with_it(parse, caplog, text, argv, dests):
    args = parse(text % {'file': __file__}, *shlex.split(argv))
    assert not any(getattr(args, dest) for dest in dests)
    assert all(dest in caplog.text for dest in dests)


def test_parameters_of_a_replaced_task_loss_go_with_it(parse, caplog):
    args = parse('{loss: poly, poly_epsilon: 1}', '--bce-loss')
    assert (args.poly_epsilon, args.loss, args.bce_loss) == (2.0, 'bce', True)
    assert 'bce has none: the poly_epsilon of the config file is left out.' in caplog.text


def test_architecture_of_the_file_stays_with_another_weights_file(parse):
    text = 'teacher: gone.pth\nteacher_model: resnet18\n'
    assert parse(text, '--teacher', __file__).teacher_model == 'resnet18'


def test_weights_file_below_the_home_folder_is_a_file(parse, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'teacher.pth').touch()
    assert parse('teacher: ~/teacher.pth\nteacher_model: resnet18\n').teacher_model == 'resnet18'


def test_args_yaml_of_a_run_with_a_teacher_trains_without_it(tmp_path, caplog):
    text = parse_args([str(tmp_path), '--teacher', 'resnet34', '--kd-temperature', '3'])[1]
    (tmp_path / 'args.yaml').write_text(text)
    args = parse_args(['-c', str(tmp_path / 'args.yaml'), '--teacher', ''])[0]
    assert resolve_kd(args) is None and args == parse_args([str(tmp_path)])[0]
    assert [record.message for record in caplog.records] == [
        'there is no teacher: the kd_temperature of the config file is left out.']


@pytest.mark.parametrize('recipe', sorted(RECIPES.glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes_take_another_image_size(recipe, tmp_path):
    args = parse_args([str(tmp_path), '-c', str(recipe), '--img-size', '32'])[0]
    assert resolve_data_config(vars(args))['input_size'] == (3, 32, 32)
    model = resolve_model_input_args(args.model, vars(args), num_classes=args.num_classes)
    assert timm.create_model(**model, device='meta')(torch.zeros(2, 3, 32, 32, device='meta')).shape[0] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
class TestOnAMachineWithoutGPU:
    def test_device_of_a_file_is_a_choice_as_the_flag_is(self, refuse):
        assert '--device cuda: torch finds no CUDA device' in refuse('device: cuda')
        assert '--device cuda: torch finds no CUDA device' in refuse('', '--device', 'cuda')

    def test_device_of_a_file_gives_way_to_the_flag(self, parse):
        assert parse('device: cuda', '--device', 'cpu').device == 'cpu'

    def test_default_that_args_yaml_writes_out_is_no_choice(self, parse, timm_args_yaml):
        assert parse(timm_args_yaml, data=False).device == 'cuda'

    def test_device_that_args_yaml_holds_is_a_choice_where_it_is_not_the_default(self, refuse, timm_args_yaml):
        assert '--device cuda:1' in refuse(timm_args_yaml.replace('device: cuda', 'device: cuda:1'))


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
    args = parse(timm_args_yaml, data=False)
    assert not caplog.records
    assert resolve_kd(args) is None
    assert args.kd_temperature is None
    assert args.decay_epochs == 90


@pytest.mark.parametrize('flags, parameters', [
    ('--kd-model-name resnet34', {'temperature': 4.0}),
    # no choice of a loss without a teacher, unless the command line makes it
    ('--kd-loss tfkd', {}),
    ('--kd-loss tfnkd', {}),
    ('--kd-loss tfkd --kd-temperature 4', {'temperature': 4.0}),
])
def test_temperature_of_timm_args_yaml_counts_with_a_teacher(parse, timm_args_yaml, flags, parameters):
    assert resolve_kd(parse(timm_args_yaml, *flags.split(), data=False)).loss_parameters == parameters


def test_parameters_of_a_replaced_loss_go_with_it(parse, caplog):
    recipe = 'kd_loss: nkd\nteacher: resnet34\nkd_gamma: 2\nkd_temperature: 3\n'
    settings = resolve_kd(parse(recipe, '--kd-loss', 'dkd'))
    assert (settings.loss, settings.loss_parameters) == ('dkd', {'temperature': 3.0})
    assert 'kd_gamma' in caplog.text


def test_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, text = parse_args([str(tmp_path), '-c', 'resnet18_r34_nkd'])
    assert text == parse_args([str(tmp_path), '-c', 'resnet18_r34_nkd.yaml'])[1]
    assert (args.model, args.kd_loss) == ('resnet18', 'nkd')
    assert text == parse_args([str(tmp_path), '-c', str(RECIPES / 'resnet18_r34_nkd.yaml')])[1]


def test_file_comes_before_the_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'resnet18_r34_nkd').write_text('epochs: 7\n')
    assert parse_args([str(tmp_path), '-c', 'resnet18_r34_nkd'])[0].epochs == 7


def test_config_key_is_not_followed(parse, caplog):
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
    assert parse_args(['--config', str(tmp_path / 'args.yaml')]) == (args, text)
    assert not caplog.records
