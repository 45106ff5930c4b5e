"""Files of a run on disk: whole or absent, readable by timm, running no code."""
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers import RunsCode
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_kd.errors import UsageError
from timm_kd.run.checkpoint import AtomicSaver, CheckpointWriteError, find_recoveries
from timm_kd.run.resume import (
    ema_random_state,
    find_resume_point,
    read_checkpoint,
    run_state_of,
    set_ema_random_state,
)


def make_saver(folder: Path, cls: type = AtomicSaver, max_history: int = 2) -> CheckpointSaver:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return cls(
        model, optimizer, task=ClassificationTask(model, verbose=False), checkpoint_dir=str(folder),
        recovery_dir=str(folder), max_history=max_history)


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


def test_failed_write_is_an_error_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, 1.0)

    def full_disk(state, path):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(CheckpointWriteError, match='epoch 1.*No space left.*untouched'):
        saver.save_checkpoint(1, 2.0)
    monkeypatch.undo()
    assert torch.load(tmp_path / 'last.pth.tar')['epoch'] == 0
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar']


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, torch.AcceleratorError])
def test_error_of_the_device_during_a_save_is_no_full_disk(tmp_path, monkeypatch, error):
    saver = make_saver(tmp_path)

    def fail(state, path):
        Path(path).write_bytes(b'half')
        raise error('CUDA error: an illegal memory access was encountered')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(error):
        saver.save_checkpoint(0, 1.0)
    assert os.listdir(tmp_path) == []


def make_ema_task() -> ClassificationTask:
    """A task whose EMA timm rounds stochastically, by a generator of its own."""
    torch.manual_seed(0)
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3).bfloat16(), verbose=False)
    task.setup_ema(decay=0.9)
    return task


def test_random_stream_of_the_ema_is_taken_up():
    task, resumed = make_ema_task(), make_ema_task()
    task.update_ema(step=1)
    assert not torch.equal(ema_random_state(task), ema_random_state(resumed))
    set_ema_random_state(resumed, ema_random_state(task))
    assert torch.equal(ema_random_state(task), ema_random_state(resumed))


def test_random_stream_of_an_ema_on_another_kind_of_device_is_left_out_with_a_warning(caplog):
    task = make_ema_task()
    before = ema_random_state(task)
    set_ema_random_state(task, torch.zeros(16, dtype=torch.uint8))  # as a CUDA generator's
    assert torch.equal(ema_random_state(task), before)
    assert len(caplog.messages) == 1 and 'another kind of device' in caplog.text


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full on this system')
def test_full_device_is_an_error_that_says_how_to_go_on(tmp_path):
    saver = make_saver(tmp_path)
    (tmp_path / 'tmp.pth.tar').symlink_to('/dev/full')
    with pytest.raises(CheckpointWriteError, match='--resume auto'):
        saver.save_checkpoint(0, 1.0)


def test_save_that_was_cut_before_its_ranking_is_finished_on_resume(tmp_path):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, 1.0)
    saver.save_checkpoint(1, 2.0)
    # As a kill leaves it between writing `last` and linking its copies.
    (tmp_path / 'checkpoint-1.pth.tar').unlink()
    (tmp_path / 'model_best.pth.tar').unlink()
    (tmp_path / 'model_best.pth.tar').hardlink_to(tmp_path / 'checkpoint-0.pth.tar')
    resumed = make_saver(tmp_path)
    resumed.continue_from(str(tmp_path / 'last.pth.tar'))
    assert (resumed.best_metric, resumed.best_epoch) == (2.0, 1)
    assert torch.load(tmp_path / 'model_best.pth.tar')['epoch'] == 1
    assert torch.load(tmp_path / 'checkpoint-1.pth.tar')['epoch'] == 1


def test_recoveries_are_ordered_by_progress_not_by_name(tmp_path):
    for epoch, update in ((2, 9), (10, 1), (2, 10)):
        (tmp_path / f'recovery-{epoch}-{update}.pth.tar').touch()
    assert [path.name for path in find_recoveries(tmp_path)] == [
        'recovery-2-9.pth.tar', 'recovery-2-10.pth.tar', 'recovery-10-1.pth.tar']


def test_newer_of_last_and_recovery_is_taken(tmp_path):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, 1.0, {'run_id': 'a'})
    saver.save_recovery(1, 3, {'run_id': 'a', 'batch': 4, 'batches': 8, 'epoch_trained': False})
    assert find_resume_point(tmp_path, 'a', replayable=True).name == 'recovery-1-3.pth.tar'
    assert find_resume_point(tmp_path, 'a', replayable=False).name == 'last.pth.tar'
    saver.save_checkpoint(1, 1.0, {'run_id': 'a'})
    assert find_resume_point(tmp_path, 'a', replayable=True).name == 'last.pth.tar'
    assert find_resume_point(tmp_path, 'b', replayable=True) is None


def test_run_state_is_read_with_weights_only(tmp_path):
    make_saver(tmp_path).save_checkpoint(0, 1.0, {'run_id': 'a'})
    assert run_state_of(read_checkpoint(tmp_path / 'last.pth.tar'))['run_id'] == 'a'


def test_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    bomb = tmp_path / 'bomb.pth.tar'
    bomb.write_bytes(pickle.dumps({'state_dict': RunsCode(tmp_path / 'ran')}))
    with pytest.raises(UsageError, match='bomb'):
        read_checkpoint(bomb)
    torch.save({'state_dict': RunsCode(tmp_path / 'ran')}, bomb)
    with pytest.raises(UsageError, match='bomb'):
        read_checkpoint(bomb)
    assert not (tmp_path / 'ran').exists()
