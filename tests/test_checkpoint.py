"""Files of a run on disk: whole or absent, readable by timm, running no code."""
import os
from pathlib import Path

import pytest
import timm
import torch
from timm.models import resume_checkpoint
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_kd.errors import CommandError
from timm_kd.process import Process
from timm_kd.run.checkpoint import AtomicSaver, find_recoveries
from timm_kd.run.resume import (
    StartPoint,
    ema_random_state,
    find_resume_point,
    find_start,
    next_epoch,
    set_ema_random_state,
)


def make_saver(folder: Path, cls: type = AtomicSaver) -> CheckpointSaver:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return cls(
        model, optimizer, task=ClassificationTask(model, verbose=False), checkpoint_dir=str(folder),
        recovery_dir=str(folder), max_history=2)


@pytest.fixture
def saver(tmp_path: Path) -> AtomicSaver:
    return make_saver(tmp_path)


def continued(folder: Path, name: str = 'last.pth.tar') -> AtomicSaver:
    saver = make_saver(folder)
    saver.continue_from(str(folder / name))
    return saver


def start_of(source: Path | str, folder: Path, **options) -> StartPoint:
    return find_start(str(source), str(folder), Process(torch.device('cpu')), **options)


def test_history_and_best_are_those_of_timms_saver(tmp_path):
    metrics = [3.0, 1.0, 5.0, 5.0, None, 2.0]
    for name, cls in (('ours', AtomicSaver), ('timm', CheckpointSaver)):
        (tmp_path / name).mkdir()
        saver = make_saver(tmp_path / name, cls)
        for epoch, metric in enumerate(metrics):
            best = saver.save_checkpoint(epoch, metric)
        assert best == (5.0, 2)
    assert sorted(os.listdir(tmp_path / 'ours')) == sorted(os.listdir(tmp_path / 'timm'))
    for name in os.listdir(tmp_path / 'timm'):
        ours, timms = (torch.load(tmp_path / folder / name)['epoch'] for folder in ('ours', 'timm'))
        assert ours == timms


def test_failed_write_is_an_error_and_leaves_the_last_checkpoint(saver, tmp_path, monkeypatch):
    saver.save_checkpoint(0, 1.0)

    def full_disk(state, path):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(CommandError, match='epoch 1.*No space left.*untouched'):
        saver.save_checkpoint(1, 2.0)
    monkeypatch.undo()
    assert torch.load(tmp_path / 'last.pth.tar')['epoch'] == 0
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar']


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, torch.AcceleratorError])
def test_error_of_the_device_during_a_save_is_no_full_disk(saver, tmp_path, monkeypatch, error):

    def fail(state, path):
        Path(path).write_bytes(b'half')
        raise error('CUDA error: an illegal memory access was encountered')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(error):
        saver.save_checkpoint(0, 1.0)
    assert os.listdir(tmp_path) == []


def test_random_stream_of_an_ema_on_another_kind_of_device_is_left_out_with_a_warning(caplog):
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3).bfloat16(), verbose=False)
    task.setup_ema()  # which timm rounds stochastically, by a generator of its own
    before = ema_random_state(task)
    set_ema_random_state(task, torch.zeros(16, dtype=torch.uint8))  # as a CUDA generator's
    assert torch.equal(ema_random_state(task), before)
    assert len(caplog.messages) == 1 and 'another kind of device' in caplog.text


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full on this system')
def test_full_device_is_an_error_that_says_how_to_go_on(saver, tmp_path):
    (tmp_path / 'tmp.pth.tar').symlink_to('/dev/full')
    with pytest.raises(CommandError, match='--resume auto'):
        saver.save_checkpoint(0, 1.0)


@pytest.mark.parametrize('linked', [False, True])
def test_save_that_was_cut_before_its_ranking_is_finished_on_resume(saver, tmp_path, linked):
    saver.save_checkpoint(0, 1.0)
    saver.save_checkpoint(1, 2.0)
    # As a kill leaves it between writing `last` and linking its copies.
    if not linked:
        (tmp_path / 'checkpoint-1.pth.tar').unlink()
    (tmp_path / 'model_best.pth.tar').unlink()
    (tmp_path / 'model_best.pth.tar').hardlink_to(tmp_path / 'checkpoint-0.pth.tar')
    resumed = continued(tmp_path)
    assert (resumed.best_metric, resumed.best_epoch) == (2.0, 1)
    assert torch.load(tmp_path / 'model_best.pth.tar')['epoch'] == 1
    assert torch.load(tmp_path / 'checkpoint-1.pth.tar')['epoch'] == 1


def test_recoveries_are_ordered_by_progress_not_by_name(tmp_path):
    for epoch, update in ((2, 9), (10, 1), (2, 10)):
        (tmp_path / f'recovery-{epoch}-{update}.pth.tar').touch()
    assert [path.name for path in find_recoveries(tmp_path)] == [
        'recovery-2-9.pth.tar', 'recovery-2-10.pth.tar', 'recovery-10-1.pth.tar']


def test_newer_of_last_and_recovery_is_taken(saver, tmp_path):
    saver.save_checkpoint(0, 1.0, {'run_id': 'a'})
    saver.save_recovery(1, 3, {'run_id': 'a', 'batch': 4, 'batches': 8, 'epoch_trained': False})
    assert find_resume_point(tmp_path, 'a', replayable=True).name == 'recovery-1-3.pth.tar'
    assert find_resume_point(tmp_path, 'a', replayable=False).name == 'last.pth.tar'
    saver.save_checkpoint(1, 1.0, {'run_id': 'a'})
    assert find_resume_point(tmp_path, 'a', replayable=True).name == 'last.pth.tar'
    assert find_resume_point(tmp_path, 'b', replayable=True) is None


def test_recovery_file_of_a_trained_epoch_counts_without_replayable_data(saver, tmp_path):
    saver.save_checkpoint(0, 1.0, {'run_id': 'a'})
    saver.save_recovery(1, 7, {'run_id': 'a', 'batch': 8, 'batches': 8, 'epoch_trained': True})
    assert find_resume_point(tmp_path, 'a', replayable=False).name == 'recovery-1-7.pth.tar'
    start = start_of(tmp_path / 'recovery-1-7.pth.tar', tmp_path)
    assert (start.epoch, start.same_epoch) == (1, True)


def test_run_starts_where_its_flags_and_its_data_allow(tmp_path, caplog):
    make_saver(tmp_path).save_recovery(2, 3, {'batch': 4, 'batches': 8, 'epoch_trained': False})
    path = tmp_path / 'recovery-2-3.pth.tar'
    inside = start_of(path, tmp_path, replayable=True)
    assert (inside.epoch, inside.same_epoch) == (2, True) and not caplog.messages
    after = start_of(path, tmp_path)
    assert (after.epoch, after.same_epoch) == (3, False) and 'stands inside epoch 2' in caplog.text
    named = start_of(path, tmp_path, replayable=True, start_epoch=1)
    assert (named.epoch, named.same_epoch) == (1, False)


def test_run_keeps_its_id_in_its_own_folder_alone(tmp_path):
    own, other = tmp_path / 'own', tmp_path / 'other'
    for folder, run_id in ((own, 'a'), (other, 'b')):
        folder.mkdir()
        (folder / 'run.json').write_text(f'{{"run_id": "{run_id}"}}')
    make_saver(own).save_checkpoint(0, 1.0, {'run_id': 'a'})
    continued = start_of('auto', own)
    assert (continued.run_id, continued.in_place, continued.epoch) == ('a', True, 1)
    forked = start_of(own / 'last.pth.tar', other)
    assert forked.run_id not in ('a', 'b') and not forked.in_place and forked.epoch == 1
    (own / 'run.json').unlink()
    assert start_of('auto', own).path == continued.path
    fresh = start_of('', own)
    assert fresh.run_id != 'a' and not fresh.in_place and fresh.path is None


def test_folder_that_timms_script_wrote_is_continued(tmp_path):
    make_saver(tmp_path, CheckpointSaver).save_checkpoint(4, 1.0)
    start = start_of('auto', tmp_path)
    assert (start.path, start.epoch, start.state) == (str(tmp_path / 'last.pth.tar'), 5, {})


@pytest.mark.parametrize('checkpoint, epoch', [
    ({'epoch': 3}, 3), ({'epoch': 3, 'version': 1}, 3), ({'epoch': 3, 'version': 2}, 4), ({'state_dict': {}}, 0),
])
def test_epoch_after_a_checkpoint_is_that_of_timms_script(checkpoint, epoch, tmp_path):
    torch.save({'state_dict': {}, **checkpoint}, tmp_path / 'checkpoint.pth')
    model = torch.nn.Identity()
    assert next_epoch(checkpoint) == (resume_checkpoint(model, str(tmp_path / 'checkpoint.pth')) or 0) == epoch


def test_resumed_saver_removes_the_recovery_files_that_the_interrupted_one_left(saver, tmp_path):
    saver.save_checkpoint(0, 3.0)
    for update in (1, 9):
        saver.save_recovery(1, update)
    resumed = continued(tmp_path, 'recovery-1-9.pth.tar')
    assert (resumed.best_metric, resumed.best_epoch) == (3.0, 0)
    assert resumed.checkpoint_files == saver.checkpoint_files and not (tmp_path / 'checkpoint-1.pth.tar').exists()
    resumed.save_recovery(1, 11, {'batch': 12})
    assert find_resume_point(tmp_path, None, replayable=True).name == 'recovery-1-11.pth.tar'
    assert [path.name for path in find_recoveries(tmp_path)] == ['recovery-1-9.pth.tar', 'recovery-1-11.pth.tar']
    resumed.save_recovery(1, 13)
    assert [path.name for path in find_recoveries(tmp_path)] == ['recovery-1-11.pth.tar', 'recovery-1-13.pth.tar']


def test_last_that_is_ranked_already_is_ranked_once_and_written_no_more(saver, tmp_path):
    for epoch, metric in enumerate([1.0, 3.0]):
        saver.save_checkpoint(epoch, metric)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    resumed = continued(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert resumed.checkpoint_files == saver.checkpoint_files
    for each in (saver, resumed):
        each.save_checkpoint(2, 2.0)
        assert [os.path.basename(path) for path, _ in each.checkpoint_files] == [
            'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar']


def test_epoch_that_was_trained_again_is_ranked_by_its_last_result_alone(saver, tmp_path):
    saver.save_checkpoint(1, 2.0)
    saver.save_checkpoint(1, 1.0)  # after --start-epoch 1
    resumed = continued(tmp_path)
    assert resumed.checkpoint_files == [(str(tmp_path / 'checkpoint-1.pth.tar'), 1.0)]


def test_copy_that_a_kill_left_half_made_is_no_obstacle(tmp_path):
    for name in ('tmp', 'last', 'checkpoint-0', 'model_best'):
        (tmp_path / f'{name}.pth.tar.tmp').write_bytes(b'half')
    make_saver(tmp_path).save_checkpoint(0, 1.0)
    for name in ('last', 'checkpoint-0', 'model_best'):
        assert torch.load(tmp_path / f'{name}.pth.tar')['epoch'] == 0
