"""The command line: timm's flags as timm has them, and what is refused before anything is built."""
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.data import Mixup
from timm.loss import create_classification_loss, resolve_class_weights
from timm.utils import ParseKwargs

from timm_kd.cli import build_parser, parse_args
from timm_kd.version import __version__

TIMM_FLAGS = json.loads((Path(__file__).parent / 'data' / 'timm_train_flags.json').read_text())
OTHER_DEFAULTS = {'kd_temperature': None, 'decay_epochs': None}
ACTIONS = {action.dest: action for action in build_parser()._actions}
KINDS = {'Store': '_StoreAction', 'StoreTrue': '_StoreTrueAction', 'ParseKwargs': 'ParseKwargs'}


def parse(tmp_path, *argv):
    return parse_args([str(tmp_path), *argv])[0]


@pytest.mark.parametrize('timm_flag', TIMM_FLAGS, ids=lambda timm_flag: timm_flag['dest'])
def test_flag_is_declared_as_in_timm(timm_flag):
    action = ACTIONS[timm_flag['dest']]
    assert action.option_strings == timm_flag['flags']
    assert type(action).__name__ == KINDS[timm_flag['kind']]
    assert (action.type.__name__ if action.type else None) == timm_flag['type']
    assert action.default == OTHER_DEFAULTS.get(action.dest, timm_flag['default'])
    assert action.nargs == timm_flag['nargs']
    assert action.const == timm_flag['const']
    assert (list(action.choices) if action.choices else None) == timm_flag['choices']


def test_every_flag_of_timm_is_accepted_at_its_default_value(tmp_path):
    argv = []
    for timm_flag in TIMM_FLAGS:
        value = timm_flag['default']
        if timm_flag['flags'] and timm_flag['kind'] == 'Store' and value not in (None, [], ''):
            argv += [timm_flag['flags'][-1], *map(str, value if isinstance(value, list) else [value])]
    for flag in ('--kd-temperature', '--device'):  # at its default, but a choice: of a teacher, of a GPU
        argv[argv.index(flag):argv.index(flag) + 2] = []
    args = parse(tmp_path, *argv)
    plain = parse(tmp_path)
    plain.decay_epochs = 90.0
    assert args == plain


def test_plain_command_line_gives_timm_defaults(tmp_path):
    args = vars(parse(tmp_path))
    for timm_flag in TIMM_FLAGS:
        expected = str(tmp_path) if timm_flag['dest'] == 'data' else timm_flag['default']
        assert args[timm_flag['dest']] == OTHER_DEFAULTS.get(timm_flag['dest'], expected)


def test_flags_of_the_task_loss_default_to_what_timms_factory_does(tmp_path):
    args = vars(parse(tmp_path))
    factory = inspect.signature(create_classification_loss).parameters
    flagged = [name for name in factory if name in args and name not in ('bce_target_thresh', 'bce_sum', 'smoothing')]
    assert len(flagged) == 12 and all(args[name] == factory[name].default for name in flagged)
    weights = inspect.signature(resolve_class_weights).parameters
    for name, flag in {'power': 'power', 'beta': 'beta', 'max_weight': 'max'}.items():
        assert args[f'loss_weight_{flag}'] == weights[name].default


def test_groups_of_timm_keep_their_titles():
    for timm_flag in TIMM_FLAGS:
        if timm_flag['group'] not in ('options', 'positional arguments'):
            assert ACTIONS[timm_flag['dest']].container.title == timm_flag['group']


def test_namespace_holds_no_config_key(tmp_path):
    # timm's script keeps its config file apart from the arguments
    assert 'config' not in vars(parse(tmp_path))


def test_two_calls_share_no_mutable_default(tmp_path):
    parse(tmp_path).model_kwargs['depth'] = 3
    assert parse(tmp_path).model_kwargs == {}


def test_text_is_the_namespace_as_yaml(tmp_path):
    args, text = parse_args([str(tmp_path), '--opt-betas', '0.9', '0.99', '--model-kwargs', 'depth=3'])
    assert yaml.safe_load(text) == vars(args)


@pytest.mark.parametrize('flags, values', [
    # keyword arguments are literals where they can be
    ('--opt-kwargs nesterov=False', {'opt_kwargs': {'nesterov': False}}),
    ('--model-kwargs depth=3 act_layer=gelu', {'model_kwargs': {'depth': 3, 'act_layer': 'gelu'}}),
    # timm's names of policies and optimizers
    *((f'--aa {aa}', {'aa': aa}) for aa in ('v0', 'original', 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', '3a')),
    *((f'--opt {opt}', {'opt': opt}) for opt in ('momentum', 'lookahead_adamw', 'adahessian', 'lamb', 'muon')),
    # flags of later timm scripts
    ('--sched wsd --lr-decay-fn cosine --decay-epochs 0.1', {'lr_decay_fn': 'cosine', 'decay_epochs': 0.1}),
    ('--resume auto --experiment x --stop-epoch 3 --save-epochs 1 2',
     {'resume': 'auto', 'stop_epoch': 3, 'save_epochs': [1, 2]}),
])
def test_flags_are_taken(tmp_path, flags, values):
    args = parse(tmp_path, *flags.split())
    assert {dest: getattr(args, dest) for dest in values} == values


def test_keyword_arguments_action_is_a_timm_one():
    assert all(isinstance(action, ParseKwargs) for dest, action in ACTIONS.items() if dest.endswith('_kwargs'))


def test_version_names_the_project_and_timm(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(['--version'])
    assert stop.value.code == 0
    assert f'timm-kd {__version__} (timm 1.' in capsys.readouterr().out


@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as stop:
        parse_args(['--help'])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_everyday_flags_and_distillation_before_the_rest(help_text):
    sections = re.findall(r'^(\S.*):$', help_text, re.MULTILINE)
    assert sections[:4] == [
        'Everyday flags', 'options', 'Knowledge distillation parameters', 'Additions to timm\'s script']
    everyday = help_text.partition('\noptions:\n')[0]
    assert all(f'--{name} ' in everyday for name in ('model', 'config', 'epochs', 'batch-size', 'lr', 'output'))
    assert '(default: 128)' in everyday


def test_help_fits_a_terminal_of_80_columns_and_its_usage_one_line(help_text):
    assert max(map(len, help_text.splitlines())) <= 80
    assert help_text.splitlines()[1] == ''


def test_help_shows_each_flag_once(help_text):
    shown = re.findall(r'^  (?:-\w+(?: \S+)?, )?(--[\w-]+)', help_text, re.MULTILINE)
    flags = [action.option_strings for action in ACTIONS.values() if action.option_strings]
    assert sorted(shown) == sorted(next(name for name in names if name.startswith('--')) for names in flags)


def test_help_names_the_recipes(help_text):
    assert 'resnet18_r34_nkd' in help_text.rpartition('\n\n')[2]


def test_data_sets_by_name_need_no_folder():
    assert parse_args(['--dataset', 'hfds/cifar10'])[0].dataset == 'hfds/cifar10'


def test_mixed_batches_of_odd_size_are_refused_as_timm_would_fail_on_them(refusal, tmp_path):
    with pytest.raises(AssertionError, match='even'):
        Mixup(mixup_alpha=0.8, num_classes=10)(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long))
    assert '--batch-size 3' in refusal([str(tmp_path), '--mixup', '0.8', '-b', '3'])


def test_tensorboard_that_is_not_installed_is_refused(refusal, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)  # what the import system takes for not installed
    assert 'pip install timm-kd[tensorboard]' in refusal([str(tmp_path), '--log-tensorboard'])


def test_missing_data_set_is_refused(refusal):
    assert 'no data set' in refusal([])
