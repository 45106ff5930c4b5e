"""Runs compared: figures against those computed by hand from the files that the runs left."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import Process
from PIL import Image

from timm_kd.files import FolderLock
from timm_kd.report.__main__ import main
from timm_kd.report.groups import group_runs, tabulate
from timm_kd.report.runs import find_runs, read_run

COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'eval_agreement']


def write_run(folder: Path, top1: list[float], seed: int = 0, teacher: float | None = None, epochs: int = 2, **flags):
    """Write the folder of a run, as the script leaves it."""
    folder.mkdir(parents=True)
    args = dict(model='resnet18', lr=0.1, epochs=epochs, seed=seed, output='out', experiment=folder.name, workers=seed,
                data='/somewhere/cifar', kd_loss=None, teacher=None) | flags
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([epoch, 2.0 - epoch, 1.5 - epoch / 10, value, 90, 0.1, value + 10]
                         for epoch, value in enumerate(top1))
    timing = [{'epoch': epoch, 'seconds': 3600, 'train_seconds': 1000, 'images': 50_000} for epoch in range(len(top1))]
    (folder / 'run.json').write_text(json.dumps({
        'command': f'train-kd /somewhere/cifar --seed {seed}',
        'teacher': None if teacher is None else [{'source': 'resnet34', 'top1': teacher}],
        'timing': timing,
    }))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A baseline of three seeds, nkd of two, and a run of another learning rate."""
    for seed, top1 in enumerate((60.0, 61.0, 62.0)):
        write_run(tmp_path / f'ce-{seed}', [50.0, top1], seed)
    for seed, top1 in enumerate((64.0, 66.0)):
        write_run(tmp_path / f'nkd-{seed}', [70.0, top1], seed, teacher=73.0, kd_loss='nkd', teacher_dtype='auto')
    write_run(tmp_path / 'other-lr', [40.0, 41.0], lr=0.5)
    return tmp_path


def rows_of(*paths: Path, **options):
    runs, problems = find_runs(list(paths))
    assert not problems
    return {row.group.label: row for row in tabulate(group_runs(runs), **options)}


def test_runs_that_differ_in_seed_and_places_alone_are_one_group(study):
    rows = rows_of(study)
    assert [len(row.group.runs) for row in rows.values()] == [2, 3, 1]
    assert next(iter(rows)).startswith('kd_loss=nkd lr=0.1')


def test_figures_are_mean_and_deviation_over_the_seeds(study):
    nkd = next(iter(rows_of(study).values())).figures
    assert (nkd['last top1'].mean, nkd['last top1'].deviation) == (65.0, pytest.approx(2 ** 0.5))
    assert nkd['best top1'].mean == 70.0
    assert nkd['agreement'].mean == 75.0
    assert nkd['teacher top1'].mean == 73.0
    assert nkd['images/s'].mean == 50.0


def test_difference_to_the_baseline_has_the_standard_error_of_two_means(study):
    difference = next(iter(rows_of(study).values())).figures['to baseline']
    assert difference.mean == 4.0
    assert difference.deviation == pytest.approx((2 / 2 + 1 / 3) ** 0.5)


def test_baseline_is_otherwise_equal_and_none_where_there_is_no_such_group(study):
    rows = list(rows_of(study).values())
    assert rows[-1].group.settings['lr'] == 0.5 and rows[-1].figures['to baseline'] is None
    rows = list(rows_of(study, baseline=study / 'other-lr').values())
    assert [row.figures['to baseline'] and row.figures['to baseline'].mean for row in rows] == [24.0, 20.0, None]


def test_another_metric_sorts_by_it_and_a_loss_upwards(study):
    write_run(study / 'short', [99.0], lr=0.01)
    losses = [row.figures['last loss'].mean for row in rows_of(study, metric='eval_loss').values()]
    assert losses == pytest.approx([1.4, 1.4, 1.4, 1.5])
    tops = [row.figures['last top1'].mean for row in rows_of(study).values()]
    assert tops == sorted(tops, reverse=True)


def test_flag_that_some_runs_do_not_know_tells_them_from_no_other(study):
    """As after an update between two seeds, or beside a run of timm's script."""
    def sizes() -> dict[str, int]:
        return {label: len(row.group.runs) for label, row in rows_of(study).items()}

    write_run(study / 'newer', [50.0, 63.0], seed=3, poly_gamma=2.0, teacher_dtype='auto')
    write_run(study / 'timm', [50.0, 63.0], seed=4)
    flags = yaml.safe_load((study / 'timm' / 'args.yaml').read_text())
    del flags['kd_loss'], flags['teacher']
    (study / 'timm' / 'args.yaml').write_text(yaml.safe_dump(flags))
    assert sizes() == {'kd_loss=nkd lr=0.1': 2, 'lr=0.1': 5, 'lr=0.5': 1}
    write_run(study / 'other-gamma', [50.0, 63.0], poly_gamma=3.0)
    assert sum('poly_gamma' in label for label in sizes()) == 2


def test_data_sets_of_another_name_are_told_apart_and_other_places_of_one_are_not(study):
    write_run(study / 'moved', [50.0, 63.0], seed=7, data='/elsewhere/cifar')
    write_run(study / 'digits', [50.0, 63.0], data='/somewhere/digits')
    sizes = {label: len(row.group.runs) for label, row in rows_of(study).items()}
    assert sorted(sizes.values()) == [1, 1, 2, 4]
    assert any('data=digits' in label for label in sizes)


def test_unfinished_and_empty_runs_are_named_as_such(tmp_path, capsys):
    write_run(tmp_path / 'half', [50.0], epochs=3)
    write_run(tmp_path / 'empty', [], epochs=3, lr=0.2)
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert '1 of 3, stopped' in table and '0 of 3, empty' in table


def read_of_the_own_run(folder: Path) -> None:
    # As the push at a run's end, which still has the lock of the folder. The lock is one of processes: the report has
    # to be another one than the run.
    with FolderLock() as lock:
        assert lock.acquire(folder)
        read_run(folder)
        subprocess.run([sys.executable, '-m', 'timm_kd.report', str(folder)], check=True)


def test_run_that_a_process_trains_is_in_progress_even_after_it_has_read_its_own_folder(tmp_path):
    write_run(tmp_path / 'now', [50.0], epochs=3)
    run = Process(read_of_the_own_run, (tmp_path / 'now',), tmp_path / 'printed')
    assert run.wait(60) == 0, run.stderr
    assert '1 of 3, in progress' in run.stdout


def test_run_of_the_script_records_the_time_and_the_images_of_its_epochs(train, capsys):
    run = train('--epochs 2 --batch-size 16 --grad-accum-steps 2')
    assert [(epoch['epoch'], epoch['images']) for epoch in run.record['timing']] == [(0, 160), (1, 160)]
    assert all(0 < epoch['train_seconds'] < epoch['seconds'] for epoch in run.record['timing'])
    assert run.record['num_epochs'] == 2
    assert main([str(run.folder)]) == 0
    top1 = f'{run.rows[-1]["eval_top1"]:.2f}'
    assert top1 in capsys.readouterr().out.splitlines()[2]


def test_folder_of_timms_script_without_run_json_is_reported(study, capsys):
    write_run(study / 'timm', [50.0, 58.0], lr=0.3)
    (study / 'timm' / 'run.json').unlink()
    assert main([str(study)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if '0.3' in line)
    assert '58.00' in row


@pytest.mark.parametrize('name, text, said', [
    ('summary.csv', 'epoch,eval_top1\n0,fifty\n', "summary.csv is damaged: could not convert string to float: 'fifty'"),
    ('summary.csv', 'epoch,eval_top1\n0,1,2\n', 'summary.csv is damaged: line 2'),
    ('summary.csv', '\x00\x01', 'summary.csv is damaged: its first line names no epoch'),
    ('run.json', '{"command": ', 'run.json is damaged'),
    ('run.json', '[]', 'run.json is damaged: it holds a list'),
    ('args.yaml', 'a: [', 'args.yaml is damaged'),
])
def test_damaged_file_is_one_line_and_the_other_runs_are_reported(study, capsys, name, text, said):
    (study / 'ce-0' / name).write_text(text)
    assert main([str(study)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count('\n') == 1
    assert '65.00' in printed.out


def test_folder_without_runs_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / 'gone')]) == 2
    assert capsys.readouterr().err == (
        f'timm_kd.report: error: {tmp_path}: no run in it.\n'
        f'timm_kd.report: error: {tmp_path / "gone"}: no such folder.\n'
    )


@pytest.mark.parametrize('flags, said', [
    (['--metric', 'top1'], '--metric top1: no summary.csv has such a column'),
    (['--baseline', 'nowhere'], '--baseline nowhere: none of the runs'),
])
def test_wrong_flag_names_itself(study, capsys, flags, said):
    assert main([str(study), *flags]) == 2
    assert said in capsys.readouterr().err


def test_reader_that_has_seen_enough_is_no_error(study):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, '-m', 'timm_kd.report', str(study), '--csv', str(study / 'table.csv')]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert (study / 'table.csv').exists()


def test_csv_has_the_figures_in_full(study):
    assert main([str(study), '--csv', str(study / 'table.csv')]) == 0
    with open(study / 'table.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['last top1']) for row in rows] == [65.0, 61.0, 41.0]
    assert float(rows[0]['to baseline ±']) == pytest.approx((2 / 2 + 1 / 3) ** 0.5)


def test_page_holds_table_curves_commands_and_links_and_nothing_from_elsewhere(study):
    page = study / 'pages' / 'report.html'
    page.parent.mkdir()
    assert main([str(study), '--html', str(page), '--png', str(study / 'curves.png')]) == 0
    text = page.read_text()
    assert '65.00 ± 1.41' in text and 'train-kd /somewhere/cifar --seed 1' in text and '<svg' in text
    assert 'href="../nkd-0"' in text
    namespaces = text.replace('http://www.w3.org/', '').replace('http://purl.org/', '').replace(
        'http://creativecommons.org/', '').replace('https://matplotlib.org/', '')
    assert 'http' not in namespaces
    corner = Image.open(study / 'curves.png').convert('RGBA').getpixel((0, 0))
    assert corner == (255, 255, 255, 255)  # a transparent picture would have black text on a dark page


def test_names_of_runs_and_flags_are_text_on_the_page(tmp_path):
    write_run(tmp_path / '<script>alert(1)<', [50.0, 51.0], model='<b>"&$x^2$', lr=0.3)
    write_run(tmp_path / 'plain', [50.0, 51.0])
    assert main([str(tmp_path), '--html', str(tmp_path / 'page.html')]) == 0
    text = (tmp_path / 'page.html').read_text()
    assert '<script>alert' not in text and '<b>"' not in text
    assert '&lt;script&gt;alert(1)&lt;' in text


def test_without_matplotlib_the_table_is_there_and_a_line_says_how_to_get_curves(study, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert main([str(study), '--html', str(study / 'page.html')]) == 0
    printed = capsys.readouterr()
    assert '65.00' in printed.out and 'pip install' in printed.err
    assert '<svg' not in (study / 'page.html').read_text()


def test_hundred_runs_of_three_hundred_epochs_take_less_than_five_seconds(tmp_path):
    for number in range(100):
        write_run(tmp_path / f'run-{number}', [number / 10 + epoch / 10 for epoch in range(300)], seed=number % 5,
                  epochs=300, lr=number // 5, **{f'flag_{index}': index for index in range(200)})
    command = [sys.executable, '-m', 'timm_kd.report', str(tmp_path), '--html', str(tmp_path / 'page.html')]
    usage = os.times()
    assert subprocess.run(command, capture_output=True).returncode == 0
    spent = os.times()
    # Of the processor: the tests beside this one have their share of the clock.
    assert spent.children_user + spent.children_system - usage.children_user - usage.children_system < 5
