"""The demo: its data, its commands, its table and figure, and all of it once, in small."""
import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_kd.cli import parse_args, resolve_kd
from timm_kd.demo.__main__ import BASELINE, CONFIG, LOSSES, main, student_flags, train
from timm_kd.demo.digits import write_digits


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
    teacher = tmp_path / 'train' / 'teacher' / 'last.pth.tar'
    teacher.parent.mkdir(parents=True)
    teacher.touch()
    recipe = [str(data), '-c', CONFIG]
    plain, _ = parse_args([*recipe, '--seed', '1'])
    args, _ = parse_args([*recipe, *student_flags(tmp_path, loss, seed=1)])
    changed = {name for name, value in vars(args).items() if value != getattr(plain, name)}
    assert changed <= {'kd_loss', 'teacher', 'teacher_model'}
    kd = resolve_kd(args)
    assert (kd and (kd.loss, kd.teacher)) == {
        BASELINE: None, 'nkd': ('nkd', str(teacher)), 'dkd': ('dkd', str(teacher)), 'tfnkd': ('tfnkd', None),
    }[loss]


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
    monkeypatch.chdir(tmp_path)  # it needs nothing of the clone
    main(['--quick', '--losses', 'nkd', '--output', str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / 'results.md').read_text() in printed
    assert {path.name for path in (tmp_path / 'train').iterdir()} == {'teacher', 'cross-entropy-0', 'nkd-0'}
    top1 = {}
    for loss in ('cross-entropy', 'nkd'):
        with open(tmp_path / f'train/{loss}-0/summary.csv', newline='') as file:
            row, = csv.DictReader(file)
        top1[loss] = float(row['eval_top1'])
    for loss, difference in (('cross-entropy', ''), ('nkd', f'{top1["nkd"] - top1["cross-entropy"]:.2f}')):
        cells = [cell.strip() for cell in re.search(rf'^\| {loss} .*$', printed, re.M)[0].strip('|').split('|')]
        assert cells[4:6] == [f'{top1[loss]:.2f}', difference]
    assert f'{float(row["eval_agreement"]):.2f}' in cells
    colours = {tuple(colour[:3]) for _, colour in Image.open(tmp_path / 'curves.png').getcolors(maxcolors=1 << 20)}
    blue, vermillion = (0x00, 0x72, 0xb2), (0xd5, 0x5e, 0x00)  # the first of Okabe and Ito's, a line for each loss
    assert {blue, vermillion} <= colours
