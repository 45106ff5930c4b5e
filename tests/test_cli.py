"""The command line: timm's flags as timm has them, and what is refused before anything is built."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.data import Mixup
from timm.utils import ParseKwargs

from timm_kd.cli import build_parser, parse_args
from timm_kd.version import __version__

TIMM_FLAGS = json.loads((Path(__file__).parent / 'data' / 'timm_train_flags.json').read_text())
OTHER_DEFAULTS = {'kd_temperature': None, 'decay_epochs': None}
ACTIONS = {action.dest: action for action in build_parser()._actions}
KINDS = {'Store': '_StoreAction', 'StoreTrue': '_StoreTrueAction', 'ParseKwargs': 'ParseKwargs'}


@pytest.fixture
def refuse(capsys, tmp_path):
    """The one line that a refused command line leaves on stderr."""
    def run(*argv: str, data: str | None = str(tmp_path)) -> str:
        with pytest.raises(SystemExit) as stop:
            parse_args([*([data] if data else []), *argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith('train-kd: error: ') and error.count('\n') == 1
        return error
    return run


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


def test_keyword_arguments_are_literals_where_they_can_be(tmp_path):
    args = parse(tmp_path, '--opt-kwargs', 'nesterov=False', '--model-kwargs', 'depth=3', 'act_layer=gelu')
    assert args.opt_kwargs == {'nesterov': False}
    assert args.model_kwargs == {'depth': 3, 'act_layer': 'gelu'}


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


@pytest.mark.parametrize('aa', ['v0', 'original', 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', '3a'])
def test_policies_of_timm_are_accepted(tmp_path, aa):
    assert parse(tmp_path, '--aa', aa).aa == aa


@pytest.mark.parametrize('opt', ['momentum', 'lookahead_adamw', 'adahessian', 'lamb', 'muon'])
def test_optimizers_of_timm_are_accepted(tmp_path, opt):
    assert parse(tmp_path, '--opt', opt).opt == opt


def test_wsd_takes_its_own_flags(tmp_path):
    args = parse(tmp_path, '--sched', 'wsd', '--lr-decay-fn', 'cosine', '--decay-epochs', '0.1')
    assert (args.lr_decay_fn, args.decay_epochs) == ('cosine', 0.1)


def test_flags_of_later_timm_scripts(tmp_path):
    args = parse(tmp_path, '--resume', 'auto', '--experiment', 'x', '--stop-epoch', '3', '--save-epochs', '1', '2')
    assert (args.resume, args.stop_epoch, args.save_epochs) == ('auto', 3, [1, 2])


def test_mixed_batches_of_odd_size_are_refused_as_timm_would_fail_on_them(refuse):
    with pytest.raises(AssertionError, match='even'):
        Mixup(mixup_alpha=0.8, num_classes=10)(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long))
    assert '--batch-size 3' in refuse('--mixup', '0.8', '-b', '3')


REFUSED = [
    # unknown and misspelt
    (['--kd-lose', 'nkd'], ['--kd-lose', '--kd-loss']),
    (['--opt', 'adamv'], ['--opt adamv', 'adam']),
    (['--sched', 'cosin'], ['--sched cosin', 'cosine']),
    (['--aa', 'rnd-m9'], ['--aa rnd-m9']),
    (['--eval-metric', 'top-1'], ['--eval-metric top-1', 'top1']),
    (['--interpolation', 'bicubik'], ['--interpolation bicubik', 'bicubic']),
    (['--amp-dtype', 'fp16'], ['--amp-dtype fp16', 'float16']),
    (['--opt-kwargs', 'caution'], ['--opt-kwargs', 'caution']),
    (['--opt-kwargs', 'cautoin=True'], ['--opt-kwargs', 'cautoin']),
    (['--opt-kwargs', 'lr=0.1'], ['--opt-kwargs lr=0.1', '--lr']),
    # out of range
    (['--batch-size', '0'], ['--batch-size 0']),
    (['--epochs', '0'], ['--epochs 0']),
    (['--log-interval', '0'], ['--log-interval 0']),
    (['--lr', '-0.1'], ['--lr -0.1']),
    (['--lr', 'nan'], ['--lr nan']),
    (['--weight-decay', 'inf'], ['--weight-decay inf']),
    (['--smoothing', '1.0'], ['--smoothing 1.0']),
    (['--reprob', '25'], ['--reprob 25.0']),
    (['--seed', '-1'], ['--seed -1']),
    (['--opt', 'adamw', '--opt-betas', '0.9', '1.5'], ['--opt-betas', '1.5']),
    (['--scale', '1.0', '0.08'], ['--scale 1.0 0.08']),
    (['--cutmix-minmax', '0.5'], ['--cutmix-minmax 0.5']),
    (['--sched', 'wsd', '--epochs', '10', '--decay-epochs', '20'], ['--decay-epochs 20', '--sched wsd', 'length 5']),
    (['--sched', 'wsd', '--epochs', '3'], ['--sched wsd', '--epochs 3', '--warmup-epochs 5', '--warmup-prefix']),
    (['--sched', 'rsqrt', '--epochs', '7'], ['--sched rsqrt', '--epochs 7', 'without', '--decay-epochs']),
    (['--sched', 'rsqrt', '--warmup-epochs', '0'], ['--sched rsqrt', '--warmup-epochs', '--lr-stable-timescale']),
    (['--epochs', '2', '--warmup-epochs', '0', '--lr-cycle-limit', '3', '--lr-cycle-mul', '0.5', '--cooldown-epochs',
      '1'], ['--cooldown-epochs 1', '--lr-cycle-mul 0.5']),
    (['--sched', 'plateau', '--decay-rate', '1'], ['--sched plateau', '--decay-rate 1.0']),
    (['--stop-epoch', '301'], ['--stop-epoch 301', '--epochs 300', '300 epochs']),
    (['--epochs', '10', '--cooldown-epochs', '2', '--stop-epoch', '13'], ['--stop-epoch 13', '12 epochs']),
    (['--lr-noise', '0.5', '--lr-noise-pct', '0'], ['--lr-noise-pct 0.0', 'above 0']),
    (['--lr-decay-fn', 'sqrt'], ['--lr-decay-fn sqrt', '1-sqrt']),
    (['--lr-k-decay', '-1'], ['--lr-k-decay -1']),
    (['--tta', '3', '-b', '16'], ['--tta 3', '--batch-size 16', 'a multiple']),
    (['--sched', 'step', '--decay-epochs', '0'], ['--sched step', '--decay-epochs 0']),
    (['--opt', 'adamw', '--opt-betas', '0.9'], ['--opt-betas 0.9', '--opt adamw']),
    # not there
    (['--resume', 'gone.pth.tar'], ['--resume gone.pth.tar']),
    (['--initial-checkpoint', 'gone.pth'], ['--initial-checkpoint gone.pth']),
    (['--pretrained-path', 'gone.pth'], ['--pretrained-path gone.pth']),
    (['--class-map', 'gone.txt'], ['--class-map gone.txt']),
    (['--class-map', '/'], ['--class-map /', 'folder']),
    (['--pretrained-path', __file__], ['--pretrained-path', __file__, '--pretrained alone']),
    (['--config', 'gone.yaml'], ['--config gone.yaml', 'no such file']),
    (['--config', 'resnet18_r34_nk'], ['--config resnet18_r34_nk', 'resnet18_r34_nkd']),
    (['--config', '/gone/resnet18_r34_nkd'], ['--config /gone/resnet18_r34_nkd']),
    (['--resume', 'auto'], ['--resume auto', '--experiment']),
    # clashes
    (['--data-dir', '/'], ['--data-dir /']),
    (['--aug-splits', '1'], ['--aug-splits 1']),
    (['--aug-splits', '3', '--no-prefetcher'], ['--aug-splits 3', '--no-prefetcher']),
    (['--split-bn', '--resplit', '-b', '15'], ['--batch-size 15', '--split-bn']),
    (['--jsd-loss'], ['--jsd-loss compares', '--aug-splits']),
    (['--loss', 'jsd'], ['error: --loss jsd compares', '--aug-splits']),
    (['--loss', 'jsd', '--aug-splits', '3', '--kd-loss', 'tfnkd'], ['error: --loss jsd', '--kd-loss tfnkd']),
    (['--bce-loss', '--loss', 'ce'], ['--bce-loss', '--loss ce']),
    (['--torchcompile', 'indctor'], ['--torchcompile indctor', 'inductor']),
    (['--torchcompile', '--torchcompile-mode', 'fast'], ['--torchcompile-mode fast', 'max-autotune']),
    (['--torchcompile-mode', 'default'], ['--torchcompile-mode default', '--torchcompile,']),
    (['--amp', '--model-dtype', 'bfloat16'], ['--model-dtype bfloat16', '--amp']),
    (['--torchscript', '--torchcompile'], ['--torchscript', '--torchcompile']),
    (['--lr-decay-fn', 'cosine'], ['--lr-decay-fn cosine', '--sched wsd']),
    (['--sched', 'plateau', '--sched-on-updates'], ['--sched-on-updates']),
    (['--train-batch-sizes', '8', '16'], ['--train-batch-sizes 8 16', '--train-img-sizes']),
    (['--train-img-sizes', '32', '--train-size-probs', '0.5', '0.5'], ['--train-size-probs']),
    (['--hub-private'], ['--hub-private', '--push-to-hub']),
    (['--push-to-hub', 'https://huggingface.co/me/x'], ['--push-to-hub']),
    # not this project's
    (['--naflex-loader'], ['--naflex-loader', 'NaFlex']),
    (['--naflex-max-seq-len', '256'], ['--naflex-max-seq-len 256', 'NaFlex']),
    (['--task', 'multilabel'], ['--task multilabel', 'one class']),
    (['--target-key', 'a,b'], ['--target-key a,b', 'multi-label']),
    (['--loss', 'asl'], ['--loss asl', 'ce, bce, jsd']),
    (['--kd-distill-type', 'feature'], ['--kd-distill-type feature']),
    (['--kd-distill-type', 'token'], ['--kd-distill-type token']),
    (['--kd-loss-type', 'mse'], ['--kd-loss-type mse']),
    (['--kd-student-feature-dim', '64'], ['--kd-student-feature-dim 64']),
    (['--kd-token-distill-type', 'hard'], ['--kd-token-distill-type hard']),
]


@pytest.mark.parametrize('argv, names', REFUSED, ids=[' '.join(argv) for argv, _ in REFUSED])
def test_refused_with_a_line_that_names(refuse, argv, names):
    error = refuse(*argv)
    for name in names:
        assert name in error


def test_tensorboard_that_is_not_installed_is_refused(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)  # what the import system takes for not installed
    assert 'pip install timm-kd[tensorboard]' in refuse('--log-tensorboard')


def test_missing_data_set_is_refused(refuse):
    assert 'no data set' in refuse(data=None)


def test_missing_data_folder_is_refused(refuse):
    assert '/nowhere/imagenet' in refuse(data='/nowhere/imagenet')
