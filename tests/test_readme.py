"""The README: its Python runs, its commands parse, its paths exist, and its figures are those of what it describes."""
import re
import shlex
from pathlib import Path

import pytest

from timm_kd.cli import build_parser
from timm_kd.cli.kd_flags import knob_dests
from timm_kd.errors import ExitCode
from timm_kd.hub.__main__ import main as hub_main
from timm_kd.losses import KD_LOSSES
from timm_kd.teacher_cache.__main__ import _parser as teacher_cache_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
SHELL = ''.join(block for language, block in BLOCKS if language == 'sh')
COMMANDS = SHELL.replace('\\\n', ' ').splitlines()


def words_after(name: str) -> list[list[str]]:
    """The words behind a program's name, of each command that runs it."""
    return [shlex.split(command.partition(name)[2]) for command in COMMANDS if name in command]


@pytest.mark.parametrize('code', [block for language, block in BLOCKS if language == 'python'])
def test_python_runs(code):
    exec(compile(code, 'README.md', 'exec'), {})


@pytest.mark.parametrize('words', words_after('train_kd.py'), ids=' '.join)
def test_flags_of_the_training_commands_parse(words):
    args, unknown = build_parser().parse_known_args(words)
    assert not unknown and args.data == '/data/imagenet'


@pytest.mark.parametrize('words', words_after('-m timm_kd.teacher_cache'), ids=' '.join)
def test_flags_of_the_teacher_cache_commands_parse(words):
    options, training_flags = teacher_cache_parser().parse_known_args(words)
    assert bool(training_flags) == (options.command == 'fill')
    assert not build_parser().parse_known_args(training_flags)[1]


def test_the_hub_command_lacks_nothing_but_the_run(capsys):
    words, = words_after('-m timm_kd.hub')
    with pytest.raises(SystemExit) as end:
        hub_main(words)
    assert end.value.code == 2
    assert 'output/train/EXPERIMENT' in capsys.readouterr().err


def test_make_targets_exist():
    targets = re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    named = re.findall(r'make ([a-z]+)', ' '.join([*COMMANDS, *re.findall(r'`([^`]+)`', README)]))
    assert {'demo', 'test'} <= set(named) <= set(targets)


@pytest.mark.parametrize('path', sorted({*re.findall(r'(?:tests|hparams|benchmarks)/[\w/]+\.\w+', README)}))
def test_paths_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize('anchor', re.findall(r'\]\(#([^)]+)\)', README))
def test_links_within_the_page_have_a_heading(anchor):
    headings = re.findall(r'^#+ (.+)$', README, re.MULTILINE)
    assert anchor in {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize(
    ('figure', 'recipe'),
    re.findall(r'(\d\d\.\d\d)[^|\[]*\[`\w+`\]\((hparams/\w+\.yaml)\)', README),
)
def test_published_figures_are_those_of_the_recipes(figure, recipe):
    assert re.search(r'^# Published top-1 on ImageNet-1k: ([\d.]+\d)', (ROOT / recipe).read_text(), re.M)[1] == figure


def test_every_recipe_is_in_the_table():
    recipes = {path.name for path in (ROOT / 'hparams').glob('*.yaml')} - {'digits_demo.yaml'}
    assert recipes == set(re.findall(r'\(hparams/(\w+\.yaml)\)', README))


LOSS_ROW = re.compile(r'^\| `(\w+)`(?=.*arxiv|.*same).*\| (?:`(.*)`(?:, warm-up .*)?|none) \|$', re.M)


@pytest.mark.parametrize(('loss', 'flags'), LOSS_ROW.findall(README))
def test_loss_table_states_the_defaults(loss, flags):
    args = build_parser().parse_args(shlex.split(flags))
    stated = {knob: getattr(args, dest) for dest, knob in knob_dests().items() if dest != 'kd_logit_std'}
    defaults = {name: value for name, value in KD_LOSSES[loss].hyper_parameters().items() if name != 'logit_std'}
    stated = {name: value for name, value in stated.items() if value is not None}
    assert stated == {name: defaults[name] for name in stated}
    assert loss == 'tfkd' or stated.keys() == defaults.keys()


def test_loss_table_states_the_warm_ups():
    stated = re.findall(r'^\| `(\w+)`.*, warm-up 1/(\d+) of the epochs \|$', README, re.M)
    assert [(name, 1 / int(share)) for name, share in stated] == [
        (name, loss.default_warmup) for name, loss in KD_LOSSES.items() if loss.default_warmup]


def test_exit_codes_are_those_of_the_script():
    section = README.partition('## Exit codes')[2].partition('\n## ')[0]
    assert {int(code) for code in re.findall(r'^\| (\d+) \|', section, re.M)} == set(ExitCode)
