"""README and docs/: their commands run, links and paths exist, figures and tables are those of what they describe."""
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from test_layers import LAYERS

from timm_kd.cli import build_parser
from timm_kd.cli.config import RECIPES
from timm_kd.cli.kd_flags import knob_dests
from timm_kd.errors import ExitCode
from timm_kd.hub.__main__ import main as hub
from timm_kd.losses import KD_LOSSES
from timm_kd.report.__main__ import main as report
from timm_kd.teacher_cache.__main__ import _parser as teacher_cache_parser
from timm_kd.train import main as train

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_kd'
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *sorted(ROOT.glob('docs/*.md')))
}
README, ALL = PAGES['README.md'], '\n'.join(PAGES.values())


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page that are in a language."""
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The command lines of a page."""
    return ''.join(blocks(text, 'sh')).replace('\\\n', ' ').splitlines()


COMMANDS = commands(ALL)


def words_after(name: str) -> list[list[str]]:
    """The words behind a program's name, of each command that runs it."""
    return [shlex.split(command.partition(name)[2]) for command in COMMANDS if name in command]


@pytest.mark.parametrize('code', blocks(ALL, 'python'))
def test_python_runs(code):
    exec(compile(code, 'page', 'exec'), {})


@pytest.mark.parametrize('words', words_after('train_kd.py'), ids=' '.join)
def test_flags_of_the_training_commands_parse(words):
    args, unknown = build_parser().parse_known_args(words)
    assert not unknown and args.data in ('/data/imagenet', 'flowers')
    assert args.config in (None, '', 'args.yaml') or args.config in RECIPES


@pytest.mark.parametrize('words', words_after('-m timm_kd.teacher_cache'), ids=' '.join)
def test_flags_of_the_teacher_cache_commands_parse(words):
    options, training_flags = teacher_cache_parser().parse_known_args(words)
    assert bool(training_flags) == (options.command == 'fill')
    assert not build_parser().parse_known_args(training_flags)[1]


@pytest.mark.parametrize('words', words_after('-m timm_kd.hub'), ids=' '.join)
def test_the_hub_commands_lack_nothing_but_the_run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        hub(words)
    assert end.value.code == 2
    assert words[1].startswith('output/train/') and words[1] in capsys.readouterr().err


@pytest.mark.parametrize('words', words_after('-m timm_kd.report'), ids=' '.join)
def test_the_report_commands_lack_nothing_but_the_runs(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report(words) == 2
    assert words[0].startswith('output/train') and words[0] in capsys.readouterr().err


def test_make_targets_exist():
    targets = re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    named = re.findall(r'\bmake ([a-z]+)', '\n'.join([*COMMANDS, *re.findall(r'`([^`\n]+)`', ALL)]))
    assert {'demo', 'test'} <= set(named) <= set(targets)


PATH = re.compile(r'\b(?:tests|hparams|benchmarks|docs|timm_kd)/[a-z\d_/]+\.\w+')


@pytest.mark.parametrize('path', sorted({*PATH.findall(ALL)}))
def test_paths_exist(path):
    assert (ROOT / path).is_file()


def anchors(text: str) -> set[str]:
    """What a link to a heading of a page can name."""
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize(('page', 'target'), [
    (page, target) for page, text in PAGES.items() for target in re.findall(r'\]\((?!https?:)([^)]+)\)', text)])
def test_links_lead_to_a_file_and_its_heading(page, target):
    path, _, anchor = target.partition('#')
    linked = (ROOT / page).parent / path if path else ROOT / page
    assert linked.exists()
    assert not anchor or anchor in anchors(linked.read_text())


def test_every_page_is_linked_from_the_readme():
    assert {page for page in PAGES if page != 'README.md'} <= set(re.findall(r'\]\(([\w/.-]+)\)', README))


def test_the_picture_of_the_demo_is_small():
    assert (ROOT / 'docs/demo.png').stat().st_size < 150_000


@pytest.mark.parametrize(
    ('figure', 'recipe'),
    re.findall(r'(\d\d\.\d\d)[^|\[]*\[`\w+`\]\((hparams/\w+\.yaml)\)', README),
)
def test_published_figures_are_those_of_the_recipes(figure, recipe):
    assert re.search(r'^# Published top-1 on ImageNet-1k: ([\d.]+\d)', (ROOT / recipe).read_text(), re.M)[1] == figure


def test_every_recipe_is_in_the_table():
    recipes = {path.name for path in (ROOT / 'hparams').glob('*.yaml')} - {'digits_demo.yaml'}
    assert recipes == set(re.findall(r'\(hparams/(\w+\.yaml)\)', README))


def test_the_readme_has_every_loss_and_whether_it_needs_a_teacher():
    rows = dict(re.findall(r'^\| `(\w+)` \| (yes|no)\b', README, re.M))
    assert rows == {name: 'yes' if loss.needs_teacher else 'no' for name, loss in KD_LOSSES.items()}


LOSS_ROW = re.compile(r'^\| `(\w+)`(?=.*arxiv|.*same).*\| (?:`(.*)`(?:, warm-up .*)?|none) \|$', re.M)


def test_the_loss_table_has_every_loss():
    assert {loss for loss, _ in LOSS_ROW.findall(PAGES['docs/losses.md'])} == KD_LOSSES.keys()


@pytest.mark.parametrize(('loss', 'flags'), LOSS_ROW.findall(PAGES['docs/losses.md']))
def test_loss_table_states_the_defaults(loss, flags):
    args = build_parser().parse_args(shlex.split(flags))
    stated = {knob: getattr(args, dest) for dest, knob in knob_dests().items() if dest != 'kd_logit_std'}
    defaults = {name: value for name, value in KD_LOSSES[loss].hyper_parameters().items() if name != 'logit_std'}
    stated = {name: value for name, value in stated.items() if value is not None}
    assert stated == {name: defaults[name] for name in stated}
    assert loss == 'tfkd' or stated.keys() == defaults.keys()


def test_loss_table_states_the_warm_ups():
    stated = re.findall(r'^\| `(\w+)`.*, warm-up 1/(\d+) of the epochs \|$', PAGES['docs/losses.md'], re.M)
    assert [(name, 1 / int(share)) for name, share in stated] == [
        (name, loss.default_warmup) for name, loss in KD_LOSSES.items() if loss.default_warmup]


def test_exit_codes_are_those_of_the_script():
    section = PAGES['docs/resume.md'].partition('## Exit codes')[2].partition('\n## ')[0]
    assert {int(code) for code in re.findall(r'^\| (\d+) \|', section, re.M)} == set(ExitCode)


# docs/architecture.md

ROOMS = re.compile(r'\b[a-z_]+(?:\.py|/(?!\w))')


def test_the_layers_are_those_that_the_imports_keep_to():
    page = blocks(PAGES['docs/architecture.md'].partition('## Layers')[2], '')[0].splitlines()
    stated = [{room.removesuffix('.py').removesuffix('/') for room in ROOMS.findall(layer)} for layer in page]
    assert stated == LAYERS[::-1]


@pytest.mark.parametrize('place', sorted({*ROOMS.findall(PAGES['docs/architecture.md'])} | {
    *re.findall(r'`([a-z_]+/[a-z_]+\.py)`', PAGES['docs/architecture.md'])}))
def test_the_map_names_what_is_there(place):
    assert [*PACKAGE.rglob(place), *ROOT.glob(place), *ROOT.glob(f'tests/{place}')]


# the walk-through on one's own images

STAND_INS = {
    'resnet50.a1_in1k': 'test_resnet', 'resnet50': 'test_resnet', 'mobilenetv3_small_100': 'test_efficientnet',
    '20': '2', '60': '2',
}
SMALL = '--device cpu --img-size 32 --workers 0 --batch-size 16 --warmup-epochs 0'.split()


def test_the_walk_through_on_own_images_runs_from_fine_tuning_to_the_push(digits, tmp_path, monkeypatch, capsys):
    for split in ('train', 'validation'):
        for number, flower in enumerate(('daisy', 'rose')):
            shutil.copytree(digits / split / str(number), tmp_path / 'flowers' / split / flower)
    monkeypatch.chdir(tmp_path)
    walk = [command for command in commands(README) if 'flowers' in command or 'output/train/' in command]
    programs = []
    for command in walk:
        _, program, *words = shlex.split(command.replace('-m ', ''))
        programs.append(program)
        if program == 'train_kd.py':
            small = [STAND_INS.get(word, word) for word in words if word not in ('--pretrained', '--amp')]
            train([*small, *SMALL])
        elif program == 'timm_kd.report':
            capsys.readouterr()
            assert report(words) == 0
            table = capsys.readouterr().out
            assert 'to baseline' in table and 'output/train/teacher/model_best.pth.tar' in table
        else:
            hub(words)
    assert programs == ['train_kd.py'] * 3 + ['timm_kd.report', 'timm_kd.hub']
    exported, = (path.parent for path in Path('output/train/distilled').rglob('model.safetensors'))
    assert timm.create_model(f'local-dir:{exported}', pretrained=True).num_classes == 2
    assert 'nkd' in (exported / 'README.md').read_text()
