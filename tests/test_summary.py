"""summary.csv as timm writes it, with further columns behind."""
import csv

from timm.utils import update_summary

from timm_kd.run.record import Summary

TRAIN, EVAL = {'loss': 1 / 3}, {'loss': 0.1, 'top1': 200 / 3, 'top5': 100.0}


def test_rows_without_teacher_are_those_of_timms_writer(tmp_path):
    ours = Summary(tmp_path / 'ours.csv')
    for epoch in range(2):
        ours.append(epoch, TRAIN, EVAL, 0.1)
        update_summary(epoch, TRAIN, EVAL, tmp_path / 'timm.csv', lr=0.1)
    rows = [list(csv.reader(open(tmp_path / name, newline=''))) for name in ('ours.csv', 'timm.csv')]
    assert rows[0] == [row for row in rows[1] if row]


def test_columns_of_this_project_come_after_timms(tmp_path):
    summary = Summary(tmp_path / 'summary.csv')
    summary.append(0, {**TRAIN, 'task_loss': 1.0, 'kd_loss': 2.0, 'soft': 3.0}, {**EVAL, 'agreement': 50.0}, 0.1)
    header = (tmp_path / 'summary.csv').read_text().splitlines()[0]
    assert header == (
        'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,eval_agreement,train_task_loss,train_kd_loss,train_soft')


def test_resumed_summary_drops_the_rows_that_are_done_again(tmp_path):
    first = Summary(tmp_path / 'summary.csv')
    for epoch in range(3):
        first.append(epoch, TRAIN, EVAL, 0.1)
    whole = (tmp_path / 'summary.csv').read_bytes()
    resumed = Summary(tmp_path / 'summary.csv', start_epoch=1)
    for epoch in (1, 2):
        resumed.append(epoch, TRAIN, EVAL, 0.1)
    assert (tmp_path / 'summary.csv').read_bytes() == whole


def test_fresh_run_resets_an_old_summary(tmp_path):
    Summary(tmp_path / 'summary.csv').append(7, TRAIN, EVAL, 0.1)
    Summary(tmp_path / 'summary.csv')
    assert not (tmp_path / 'summary.csv').exists()


def test_columns_that_a_resumed_run_adds_stand_behind_blank_ones(tmp_path):
    Summary(tmp_path / 'summary.csv').append(0, TRAIN, EVAL, 0.1)
    Summary(tmp_path / 'summary.csv', start_epoch=1).append(1, {**TRAIN, 'kd_loss': 2.0}, EVAL, 0.1)
    rows = list(csv.DictReader(open(tmp_path / 'summary.csv', newline='')))
    assert [row['train_kd_loss'] for row in rows] == ['', '2.0']


def test_columns_of_a_validation_that_a_resumed_run_adds_stand_where_timm_has_them(tmp_path):
    Summary(tmp_path / 'summary.csv').append(0, TRAIN, None, 0.1)
    Summary(tmp_path / 'summary.csv', start_epoch=1).append(1, TRAIN, EVAL, 0.1)
    assert tuple((tmp_path / 'summary.csv').read_text().splitlines()[0].split(',')) == (
        'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr')
