"""The demo: its data, its commands, its table and figure, and all of it once, in small."""
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_kd.cli import parse_args, resolve_kd
from timm_kd.demo.__main__ import LOSSES, main
from timm_kd.demo.digits import write_digits
from timm_kd.demo.report import Result, draw_curves, result_table
from timm_kd.demo.training import BASELINE, CONFIG, read_curve, student_flags, teacher_file, train

ROOT = Path(__file__).parents[1]
SUMMARY = """\
epoch,train_loss,eval_loss,eval_top1,eval_top5,lr
9,1.5,1.25,61.5,95.0,0.001
19,0.5,0.75,80.25,99.0,0.0
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('demo') / 'digits'
    write_digits(folder, train_images=200, few_images=50)
    return folder


def indices(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob('*.png')}


def test_every_digit_is_in_exactly_one_of_train_and_validation(data):
    train, validation = indices(data / 'train'), indices(data / 'validation')
    assert len(train) == 200 and len(validation) == 1597 and not train & validation


def test_the_few_images_are_a_part_of_train_with_equal_classes(data):
    assert indices(data / 'few') < indices(data / 'train')
    assert [len(list((data / 'few' / str(label)).iterdir())) for label in range(10)] == [5] * 10


def test_images_show_the_digits_of_scikit_learn_in_the_folder_of_their_label(data):
    digits = load_digits()
    for path in (data / 'few').rglob('*.png'):
        index = int(path.stem)
        assert path.parent.name == str(digits.target[index])
        shown = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(shown.ravel(), digits.images[index].ravel())[0, 1] > 0.95


def test_the_split_is_the_same_each_time(data, tmp_path):
    write_digits(tmp_path, train_images=200, few_images=50)
    assert indices(tmp_path / 'few') == indices(data / 'few')


@pytest.mark.parametrize('loss', [BASELINE, *LOSSES])
def test_students_differ_from_the_recipe_in_loss_and_teacher_alone(data, tmp_path, loss):
    teacher = teacher_file(tmp_path / 'train')
    teacher.parent.mkdir(parents=True)
    teacher.touch()
    recipe = [str(data), '-c', str(ROOT / CONFIG)]
    plain, _ = parse_args([*recipe, '--seed', '1'])
    args, _ = parse_args([*recipe, *student_flags(tmp_path, loss, seed=1)])
    changed = {name for name, value in vars(args).items() if value != getattr(plain, name)}
    assert changed <= {'kd_loss', 'teacher', 'teacher_model'}
    kd = resolve_kd(args)
    assert (kd and (kd.loss, kd.teacher)) == {
        BASELINE: None, 'nkd': ('nkd', str(teacher)), 'dkd': ('dkd', str(teacher)), 'tfnkd': ('tfnkd', None),
    }[loss]


def test_curve_is_the_top1_of_summary_csv_by_epochs_trained(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    assert read_curve(tmp_path) == {10: 61.5, 20: 80.25}


def test_table_has_mean_and_standard_deviation_of_the_last_epoch():
    table = result_table({
        'teacher': [Result({12: 99.5}, 100.0, 40.0)],
        'nkd': [Result({1: 99.0, 2: 90.0}, 88.0, 10.0), Result({1: 99.0, 2: 92.0}, 91.0, 13.0)],
    })
    rows = [[cell.strip() for cell in line.strip('|\n').split('|')] for line in table.splitlines()]
    # Standard deviations of two values a, b: |a - b| / sqrt(2).
    assert rows[2:] == [['teacher', '99.5', '', '40'], ['nkd', '91.0 ± 1.4', '89.5 ± 2.1', '12']]


def test_table_is_one_that_markdown_renders():
    lines = result_table({'teacher': [Result({1: 50.0}, 100.0, 1.0)]}).splitlines()
    assert {line.count('|') for line in lines} == {5} and set(lines[1]) == set('| -')


def test_figure_shows_a_line_for_each_loss_and_the_teacher(tmp_path):
    draw_curves(
        {
            'teacher': [Result({12: 99.0}, 100.0, 1.0)],
            'nkd': [Result({1: 50.0, 2: 90.0}, 88.0, 1.0), Result({1: 60.0, 2: 92.0}, 91.0, 1.0)],
        },
        tmp_path / 'curves.png',
    )
    colors = {tuple(color[:3]) for _, color in Image.open(tmp_path / 'curves.png').getcolors(maxcolors=1 << 20)}
    first_line = (0x1f, 0x77, 0xb4)  # of matplotlib's default cycle
    assert {(0, 0, 0), first_line} <= colors


def test_a_failed_training_ends_the_demo_with_the_end_of_its_log(tmp_path):
    words = [sys.executable, '-c', 'import sys; print("so it broke"); sys.exit(3)']
    with pytest.raises(SystemExit) as stopped:
        train({'broken': words}, tmp_path)
    assert 'so it broke' in str(stopped.value) and 'code 3' in str(stopped.value)


def test_a_folder_that_no_demo_has_made_is_left_alone(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(SystemExit, match='name another folder'):
        main(['--output', str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ['train']


def test_the_demo_runs_from_data_to_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # restored afterwards: the demo goes to the clone
    main(['--quick', '--losses', 'nkd', '--output', str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / 'results.md').read_text() in printed
    assert Image.open(tmp_path / 'curves.png').size == (1050, 630)
    assert {path.name for path in (tmp_path / 'train').iterdir()} == {'teacher', 'cross-entropy-0', 'nkd-0'}
    # The agreement that the demo computes for all is the one that the script reports where there is a teacher.
    with open(tmp_path / 'train/nkd-0/summary.csv', newline='') as file:
        reported = float(next(csv.DictReader(file))['eval_agreement'])
    row = next(line for line in printed.splitlines() if line.startswith('| nkd '))
    assert float(row.split('|')[3]) == pytest.approx(reported, abs=0.05)
