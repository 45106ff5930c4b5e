"""The command line: timm's flags as timm has them, and what the flags of distillation resolve to and imply."""
import inspect
import re
import shlex
import sys

import pytest
import torch
import yaml
from helpers import TIMM_FLAGS
from timm.data import Mixup
from timm.loss import create_classification_loss, resolve_class_weights
from timm.utils import ParseKwargs

from timm_kd.cli import build_parser, parse_args, resolve_kd
from timm_kd.losses import KD_LOSSES, create_kd_loss
from timm_kd.version import __version__

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


# distillation


def weights(task, distill):
    return {'task_loss_weight': task, 'distill_loss_weight': distill}


def test_nothing_named_is_plain_training(tmp_path):
    assert resolve_kd(parse(tmp_path)) is None


@pytest.mark.parametrize('flags, settings', [
    # the loss and the teacher
    ('--teacher resnet34', {'loss': 'kd', 'teacher': 'resnet34', 'teacher_dtype': 'auto'}),
    ('--teacher resnet34 --teacher resnet50', {'teacher': ['resnet34', 'resnet50']}),
    ('--kd-loss tfkd', {'loss': 'tfkd', 'teacher': None}),
    ('--kd-loss tfkd --teacher resnet18', {'loss': 'tfkd', 'teacher': 'resnet18'}),
    ('--kd-model-name resnet34 --kd-loss nkd', {'loss': 'nkd', 'teacher': 'resnet34'}),
    # the precision of timm's script, for its own flag
    ('--kd-model-name resnet34', {'loss': 'kd', 'teacher': 'resnet34', 'teacher_dtype': 'float32'}),
    ('--kd-model-name resnet34 --amp', {'teacher_dtype': 'amp'}),
    ('--kd-model-name resnet34 --model-dtype bfloat16', {'teacher_dtype': 'bfloat16'}),
    ('--kd-model-name resnet34 --amp --teacher-dtype float16', {'teacher_dtype': 'float16'}),
    ('--kd-model-name resnet34 --teacher resnet34 --amp', {'teacher_dtype': 'auto'}),
    # weights: unset, those of the loss; else by timm's rule
    ('--kd-loss kd --teacher resnet34', weights(1.0, 1.0)),
    ('--kd-loss dkd --teacher resnet34', weights(1.0, 1.0)),
    ('--kd-loss nkd --teacher resnet34', weights(1.0, 1.0)),
    ('--kd-loss tfnkd', weights(1.0, 1.0)),
    ('--kd-loss tfkd', weights(0.9, 0.1)),
    ('--kd-loss tfkd --distill-loss-weight 3', weights(1.0, 3.0)),
    ('--kd-loss tfkd --task-loss-weight 0.25', weights(0.25, 0.75)),
    ('--kd-loss tfkd --task-loss-weight 0.25 --distill-loss-weight 3', weights(0.25, 3.0)),
    # warm-up: unset, that of the loss; else what is given, 0 too
    ('--kd-loss dkd --teacher resnet34 --epochs 240', {'warmup_epochs': 20}),
    ('--kd-loss dkd --teacher resnet34 --epochs 100', {'warmup_epochs': 8}),
    ('--kd-loss dkd --teacher resnet34 --epochs 15', {'warmup_epochs': 1}),
    ('--kd-loss dkd --teacher resnet34 --epochs 1', {'warmup_epochs': 1}),
    ('--kd-loss kd --teacher resnet34 --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss nkd --teacher resnet34 --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss tfnkd --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss tfkd --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss dkd --teacher resnet34 --epochs 240 --kd-warmup-epochs 0', {'warmup_epochs': 0}),
    ('--kd-loss dkd --teacher resnet34 --epochs 240 --kd-warmup-epochs 3', {'warmup_epochs': 3}),
    # parameters: those given alone, 0 too
    ('--kd-loss dkd --teacher resnet34 --kd-beta 2 --kd-temperature 1 --kd-logit-std',
     {'loss_parameters': {'beta': 2.0, 'temperature': 1.0, 'logit_std': True}}),
    ('--kd-loss nkd --teacher resnet34 --kd-gamma 0', {'loss_parameters': {'gamma': 0.0}}),
])
def test_flags_resolve_to_a_distillation(tmp_path, flags, settings):
    resolved = resolve_kd(parse(tmp_path, *shlex.split(flags)))
    assert {name: getattr(resolved, name) for name in settings} == settings


def test_args_of_a_plain_run_before_the_warmup_could_be_unset_are_read_again(tmp_path):
    (tmp_path / 'args.yaml').write_text('kd_warmup_epochs: 0\n')
    assert resolve_kd(parse(tmp_path, '-c', str(tmp_path / 'args.yaml'))) is None


@pytest.mark.parametrize('loss', [name for name, loss in KD_LOSSES.items() if 'temperature' in loss.hyper_parameters()])
def test_temperature_may_sharpen(tmp_path, loss):
    settings = resolve_kd(parse(tmp_path, '--kd-loss', loss, '--teacher', 'resnet34', '--kd-temperature', '0.25'))
    assert create_kd_loss(loss, **settings.loss_parameters).temperature == 0.25


def test_teacher_cache_implies_replayable_data(tmp_path):
    args = parse(tmp_path, '--teacher', 'resnet34', '--teacher-cache', str(tmp_path / 'logits'))
    assert args.replayable_data


def test_several_crops_of_an_image_imply_replayable_data(tmp_path):
    assert not parse(tmp_path, '--crops-per-image', '1').replayable_data
    # An image alone in its batch is mixed with itself; an even number of images never is.
    for flags in ('--crops-per-image 4', '--crops-per-image 8 -b 8 --mixup 1', '--crops-per-image 4 -b 24 --cutmix 1'):
        assert parse(tmp_path, *flags.split()).replayable_data


def test_teacher_model_goes_with_a_file(tmp_path):
    weights = tmp_path / 'teacher.pth'
    weights.touch()
    assert parse(tmp_path, '--teacher', str(weights), '--teacher-model', 'resnet34', '--teacher-ema').teacher_ema
