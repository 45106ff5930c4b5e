"""How a run ends: alone in its folder, with one line and an exit code, all of its processes together."""
import errno
import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from helpers import BASE, Process, run_on_ranks, run_script, start_on_ranks
from stopped import at, train_with_signal

from timm_kd import files, meters, train
from timm_kd.files import FolderLock
from timm_kd.hub.__main__ import main as hub_main
from timm_kd.process import get_random_state, set_random_state
from timm_kd.teacher_cache.__main__ import main as cache_main


@pytest.fixture
def command(digits, tmp_path) -> Callable[..., list[str]]:
    """The command line of a run."""
    base = [str(digits), *shlex.split(BASE), '--output', str(tmp_path), '--experiment', 'run']
    return lambda flags='': [*base, *shlex.split(flags)]


@pytest.fixture
def end_together(tmp_path) -> Callable[..., list[Process]]:
    """Starts a function in two processes, and waits for both to end with a code."""
    def end(code: int, function: Callable, *args: object) -> list[Process]:
        runs = start_on_ranks(function, args, tmp_path / 'printed')
        assert [run.wait(120) for run in runs] == [code, code], [run.stderr for run in runs]
        return runs
    return end


def assert_one_line(error: str, *words: str) -> None:
    lines = [line for line in error.splitlines() if 'error:' in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), error
    assert 'Traceback' not in error and 'onnection' not in error


# one run in a folder


def train_and_wait(trained, go_on, argv: list[str]) -> None:
    def wait() -> None:
        trained.set()
        go_on.wait()

    at('update 1', 0, wait)
    train.main(argv)


@pytest.fixture
def living(command, tmp_path):
    """A run that waits after two updates, and what lets it go on."""
    trained, go_on = helpers._context.Event(), helpers._context.Event()
    run = Process(train_and_wait, (trained, go_on, command('--workers 2')), tmp_path / 'printed')
    assert trained.wait(120), run.stderr
    yield run, go_on
    run.process.kill()


def test_second_run_in_a_folder_is_refused_while_the_first_lives(living, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'FolderLock', lambda: FolderLock(patience=0.2))
    first, go_on = living
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    second = run_script('--resume auto', digits, tmp_path)
    assert second.exit_code == 2
    assert_one_line(second.error, '--experiment run', str(tmp_path / 'run'), 'another run')
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()} == before
    go_on.set()
    assert first.wait(120) == 0, first.stderr
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == [
        'args.yaml', 'checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar', 'run.json', 'summary.csv']
    assert run_script('--resume auto --epochs 2', digits, tmp_path).exit_code == 0


def test_killed_run_leaves_its_folder_free_at_once(living, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'FolderLock', lambda: FolderLock(patience=0.0))
    living[0].process.kill()  # its workers live on for some seconds
    living[0].wait()
    assert run_script('--resume auto', digits, tmp_path).exit_code == 0


def hold_lock(held, folder: Path) -> None:
    with FolderLock() as lock:
        assert lock.acquire(folder)
        held.set()


def test_lock_waits_for_a_process_that_is_just_ending(tmp_path):
    held = helpers._context.Event()
    ending = Process(hold_lock, (held, tmp_path), tmp_path / 'printed')
    assert held.wait(60)
    with FolderLock() as lock:
        assert lock.acquire(tmp_path)
    assert ending.wait(60) == 0


def test_file_system_without_locks_has_runs_all_the_same(digits, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(files.fcntl, 'lockf', refuse)
    assert run_script('', digits, tmp_path).exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_folder_that_cannot_be_written_is_refused(digits, tmp_path):
    (tmp_path / 'run').mkdir(mode=0o500)
    run = run_script('', digits, tmp_path)
    assert run.exit_code == 2
    assert_one_line(run.error, '--experiment run', 'Permission denied')


@pytest.mark.parametrize('content', ['{}', '[]', 'text'])
def test_folder_with_the_run_json_of_another_program_is_refused(digits, tmp_path, content):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.json').write_text(content)
    run = run_script('', digits, tmp_path)
    assert run.exit_code == 2
    assert_one_line(run.error, '--experiment', 'run.json')
    assert (tmp_path / 'run' / 'run.json').read_text() == content


# Ctrl-C


def results_of(stdout: str) -> list[int]:
    return [result['epoch'] for result in json.loads(stdout.split('--result\n')[1])['all']]


def test_ctrl_c_ends_the_epochs_and_leaves_the_results_so_far(command, tmp_path):
    argv = command('--epochs 3 --workers 2 --push-to-hub me/student')
    run = Process(train_and_interrupt_without_hub, (argv,), tmp_path / 'printed')
    assert run.wait(120) == 0, run.stderr
    assert 'Traceback' not in run.stderr
    assert '*** Best metric' in run.stderr and '(epoch 0)' in run.stderr
    assert 'not pushed' in run.stderr
    assert results_of(run.stdout) == [0]
    assert json.loads((tmp_path / 'run' / 'run.json').read_text())['best']['epoch'] == 0


def train_and_interrupt_without_hub(argv: list[str]) -> None:
    train.check_access = lambda *args, **kwargs: None
    train_with_signal('update 2', 1, signal.SIGINT, (0,), argv)


def test_ctrl_c_that_reaches_one_process_ends_all(command, end_together):
    argv = command('--epochs 3 --batch-size 8')
    runs = end_together(0, train_with_signal, 'update 2', 1, signal.SIGINT, (1,), argv)
    assert results_of(runs[0].stdout) == [0]
    assert 'Traceback' not in runs[0].stderr + runs[1].stderr


def interrupt_set_up(ranks: tuple[int, ...], argv: list[str]) -> None:
    set_up = train.set_up

    def interrupted(*args):
        if int(os.environ.get('RANK', 0)) in ranks:
            os.kill(os.getpid(), signal.SIGINT)
        return set_up(*args)

    train.set_up = interrupted
    train.main(argv)


def test_ctrl_c_before_training_is_one_line(command, tmp_path):
    run = Process(interrupt_set_up, ((0,), command()), tmp_path / 'printed')
    assert run.wait(120) == 130
    assert_one_line(run.stderr, 'interrupted')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('ranks', [(0,), (1,), (0, 1)], ids=str)
def test_ctrl_c_before_training_ends_all_processes(command, end_together, ranks):
    runs = end_together(130, interrupt_set_up, ranks, command())
    assert_one_line(runs[0].stderr + runs[1].stderr, 'interrupted')


# a full disk, a closed stdout


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full on this system')
@pytest.mark.parametrize('name', ['args.yaml', 'run.json', 'summary.csv'])
def test_full_disk_is_one_line(digits, tmp_path, name):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / f'{name}.tmp').symlink_to('/dev/full')
    run = run_script('', digits, tmp_path)
    assert run.exit_code == 1
    assert_one_line(run.error, name, 'No space left')


def train_with_stdout(kind: str, marker: Path, argv: list[str]) -> None:
    if kind == 'closed':
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open('/dev/full', os.O_WRONLY)
    os.dup2(writer, 1)
    train.check_access = lambda *args, **kwargs: None
    train.push_run = lambda folder, repo, **kwargs: marker.write_text(repo)
    train.main(argv)


@pytest.mark.parametrize('kind', [
    'closed',
    pytest.param('full', marks=pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')),
])
def test_run_whose_stdout_nobody_reads_pushes_all_the_same(command, tmp_path, kind):
    argv = command('--push-to-hub me/student')
    run = Process(train_with_stdout, (kind, tmp_path / 'pushed', argv), tmp_path / 'printed')
    assert run.wait(120) == 0, run.stderr
    assert (tmp_path / 'pushed').read_text() == 'me/student'
    assert 'Traceback' not in run.stderr and 'Exception' not in run.stderr


# a process that fails alone


def train_with_bad_loss(rank: int, argv: list[str]) -> None:
    """Train with a loss that is not finite in one batch of one process."""
    update = meters.StepTotals.update

    def spoilt_update(self, result, loss, divisor, batch_idx, samples):
        if batch_idx == 3 and int(os.environ['RANK']) == rank:
            loss = loss * float('nan')
        update(self, result, loss, divisor, batch_idx, samples)

    meters.StepTotals.update = spoilt_update
    train.main(argv)


@pytest.mark.parametrize('rank', [0, 1])
def test_loss_that_is_not_finite_in_one_process_ends_all(command, end_together, rank):
    runs = end_together(3, train_with_bad_loss, rank, command('--batch-size 8'))
    assert_one_line(runs[0].stderr + runs[1].stderr, 'epoch 0, batch 3: loss is not finite')


def check_losses() -> None:
    torch.distributed.init_process_group('gloo')
    totals = meters.StepTotals(torch.device('cpu'))
    for batch_idx in range(3):
        bad = torch.distributed.get_rank() == 1 and batch_idx > 0
        totals.update({}, torch.tensor(float('nan') if bad else 1.0), divisor=1, batch_idx=batch_idx, samples=4)
    totals.check_finite(epoch=0, allowed_in_a_row=3, distributed=True)  # a loss scaler may skip two in a row
    with pytest.raises(meters.NonFiniteLoss, match='batch 1: loss'):
        totals.check_finite(epoch=0, distributed=True)
    torch.distributed.destroy_process_group()


def test_loss_that_is_not_finite_in_one_process_is_known_to_all(tmp_path):
    run_on_ranks(check_losses, (), tmp_path)


def train_with_teacher(specs: tuple[str, str], argv: list[str]) -> None:
    train.main([*argv, '--teacher', specs[int(os.environ['RANK'])], '--kd-loss', 'kd'])


@pytest.mark.parametrize('rank', [0, 1])
def test_teacher_that_one_process_refuses_ends_all(command, end_together, digits_teacher, tmp_path, rank):
    specs = [f'local-dir:{digits_teacher}'] * 2
    specs[rank] = f'local-dir:{tmp_path}/nowhere'
    runs = end_together(2, train_with_teacher, specs, command())
    assert_one_line(runs[0].stderr + runs[1].stderr, '--teacher', 'nowhere')


def test_checkpoint_that_cannot_be_written_ends_all_processes(command, end_together, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'tmp.pth.tar').symlink_to('/dev/full')
    runs = end_together(1, train.main, command('--epochs 2'))
    assert_one_line(runs[0].stderr + runs[1].stderr, 'could not write the checkpoint', '--resume auto')


def fail_in_one_process(argv: list[str]) -> None:
    if os.environ['RANK'] == '1':
        train.create_optimizer = None
    train.main(argv)


def test_defect_of_one_process_has_one_traceback(command, end_together):
    runs = end_together(1, fail_in_one_process, command())
    assert 'Traceback' in runs[1].stderr and 'Traceback' not in runs[0].stderr


# the other commands


@pytest.mark.parametrize('main, argv, program', [
    (hub_main, ['push', 'nowhere', 'me/student'], 'timm_kd.hub'),
    (cache_main, ['info', 'nowhere'], 'timm_kd.teacher_cache'),
    (cache_main, ['verify', 'nowhere'], 'timm_kd.teacher_cache'),
])
def test_commands_end_alike(main, argv, program, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert_one_line(capsys.readouterr().err, f'{program}: error: ')


# random streams


def test_random_streams_of_an_older_checkpoint_are_taken_up():
    state = get_random_state()
    drawn = torch.rand(3)
    older = {**{name: state[name] for name in ('python', 'numpy', 'torch')}, 'cuda': [torch.zeros(16)] * 2}
    set_random_state(older)
    assert torch.equal(torch.rand(3), drawn)
