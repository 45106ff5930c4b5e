"""Runs of the script with --teacher-cache: what a run that reads learns is what the live run learned."""
import csv
import functools
import gc
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import Process, full_disk, run_on_ranks
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler

from timm_kd.replay.batches import ReplayBatchSampler, ShuffledSampler
from timm_kd.teacher_cache.__main__ import main as cache_main
from timm_kd.teacher_cache.epoch_file import EpochFile
from timm_kd.train import main

TRAIN, VALIDATION = 6, 4  # images of each class
NUM_SAMPLES = 10 * TRAIN
MIXED = '--mixup 0.4 --cutmix 1.0 --aa rand-m9-mstd0.5-inc1 --reprob 0.4'.split()
MIXING_ENDS = ['--mixup', '0.4', '--mixup-off-epoch', '1']


@pytest.fixture(scope='module')
def images(digits, tmp_path_factory):
    """A few of the digits."""
    root = tmp_path_factory.mktemp('few') / 'digits'
    for split, count in (('train', TRAIN), ('validation', VALIDATION)):
        for label in range(10):
            target = root / split / str(label)
            target.mkdir(parents=True)
            for path in sorted((digits / split / str(label)).iterdir())[:count]:
                shutil.copy(path, target)
    return root


@pytest.fixture(scope='module')
def home(tmp_path_factory, digits_teacher):
    """Where the runs of this file write, and a teacher at a place that each test may empty."""
    home = tmp_path_factory.mktemp('runs')
    shutil.copytree(digits_teacher, home / 'teacher')
    return home


@pytest.fixture
def teacher(home, digits_teacher):
    """The folder of the teacher; back in it for the next test."""
    yield home / 'teacher'
    shutil.rmtree(home / 'teacher', ignore_errors=True)
    shutil.copytree(digits_teacher, home / 'teacher')


def arguments(home, images, name, *flags):
    return [
        str(images), *'--model test_resnet --num-classes 10 --img-size 32 --device cpu --epochs 2 --lr 0.05'.split(),
        *'--batch-size 16 --workers 0 --warmup-epochs 0 --seed 5 --kd-loss nkd --replayable-data'.split(),
        '--teacher', f'local-dir:{home / "teacher"}', '--output', str(home / 'out'), '--experiment', name, *flags,
    ]


@pytest.fixture
def run(home, images):
    """Runs the script in this process; returns its summary.csv."""
    def run(*flags):
        main(arguments(home, images, 'run', *flags))
        return (home / 'out' / 'run' / 'summary.csv').read_text()
    return run


@pytest.fixture
def fill(home, images):
    """Fills a cache ahead of training: all epochs, or a range of them."""
    def fill(*flags, epochs=''):
        only = ['--epochs-range', *epochs.split()] if epochs else []
        cache_main(['fill', *only, *arguments(home, images, 'fill', *flags)])
    return fill


@pytest.fixture(scope='module')
def live(home, images):
    """The summary.csv of the run with the live teacher, made once for each set of flags."""
    @functools.cache
    def live(*flags):
        main(arguments(home, images, 'live', *flags))
        return (home / 'out' / 'live' / 'summary.csv').read_text()
    return live


def cache(folder, *flags, dtype='float32'):
    return ['--teacher-cache', str(folder), '--teacher-cache-dtype', dtype, *flags]


@pytest.fixture(scope='module')
def filled(home, images, tmp_path_factory):
    """A cache of two epochs without mixing, filled by a run."""
    folder = tmp_path_factory.mktemp('cache')
    main(arguments(home, images, 'fill', *cache(folder)))
    return folder


@pytest.fixture
def folder(filled, tmp_path):
    """A copy of that cache, which a test may damage."""
    return shutil.copytree(filled, tmp_path / 'cache')


def change_weights(teacher):
    state = load_file(teacher / 'model.safetensors')
    state['fc.bias'] += torch.linspace(-1, 1, 10)
    save_file(state, teacher / 'model.safetensors')


def refused(capsys, run, *flags, code=2, **options):
    with pytest.raises(SystemExit) as stopped:
        run(*flags, **options)
    assert stopped.value.code == code
    return capsys.readouterr().err


def refused_command(capsys, *argv, code=2):
    return refused(capsys, lambda: cache_main([*map(str, argv)]), code=code)


@pytest.mark.parametrize('flags, dtype', [
    pytest.param(MIXED, 'float32', id='mixed'),
    pytest.param([*MIXED, '--no-prefetcher', '--mixup-mode', 'elem'], 'float32', id='mixed in the loop'),
    pytest.param(MIXING_ENDS, 'float32', id='mixing ends'),
    pytest.param(['--crops-per-image', '2', *MIXED], 'float32', id='crops, mixed'),
    pytest.param(['--crops-per-image', '4', *MIXED[4:]], 'float32', id='crops'),
    pytest.param('--amp --amp-dtype bfloat16 --model-ema --grad-accum-steps 2'.split(), 'float32', id='AMP, EMA'),
    pytest.param([*MIXED, '--teacher-dtype', 'bfloat16'], 'float16', id='bfloat16, which float16 holds'),
])
def test_filling_and_reading_give_the_live_runs_summary_to_the_bit(tmp_path, run, live, teacher, flags, dtype):
    expected = live(*flags)
    assert run(*cache(tmp_path, dtype=dtype), *flags) == expected
    shutil.rmtree(teacher)  # a run that reads loads no teacher
    assert run(*cache(tmp_path, dtype=dtype), *flags, '--workers', '2') == expected


def test_float16_logits_change_the_losses_by_less_than_a_thousandth(tmp_path, run, live, teacher):
    # At the other tests' rate training is chaotic: a difference in the last bit of a logit grows to a percent. So it is
    # under AdamW at any rate, which makes as large a step of a gradient near 0 as of any other.
    flags = [*MIXED, *'--teacher-dtype float32 --opt momentum --lr 0.002'.split()]
    expected = list(csv.DictReader(live(*flags).splitlines()))
    filled = run(*cache(tmp_path, dtype='float16'), *flags)
    shutil.rmtree(teacher)
    assert run(*cache(tmp_path, dtype='float16'), *flags, '--workers', '2') == filled
    for before, after in zip(expected, csv.DictReader(filled.splitlines()), strict=True):
        assert before['train_kd_loss'] != after['train_kd_loss']
        for name in ('train_loss', 'train_task_loss', 'train_kd_loss', 'train_soft', 'train_distributed', 'eval_loss'):
            assert float(after[name]) == pytest.approx(float(before[name]), rel=1e-3), name


@pytest.mark.parametrize('loss', ['kd', 'dkd', 'tfkd'])
def test_the_cache_that_one_loss_filled_serves_the_others(filled, run, live, teacher, loss):
    expected = live('--kd-loss', loss)
    shutil.rmtree(teacher)
    assert run(*cache(filled), '--kd-loss', loss) == expected


def test_several_teachers_are_stored_as_their_mean(tmp_path, run, live, digits_teacher):
    second = shutil.copytree(digits_teacher, tmp_path / 'second')
    change_weights(second)
    flags = ['--teacher', str(second), '--epochs', '1']
    expected = live(*flags)
    run(*cache(tmp_path / 'cache'), *flags)
    shutil.rmtree(second)
    with pytest.raises(SystemExit):
        run(*flags)
    assert run(*cache(tmp_path / 'cache'), *flags) == expected


def test_distinct_epochs_come_round_again(filled, run, teacher):
    shutil.rmtree(teacher)
    rows = run(*cache(filled, '--teacher-cache-epochs', '2'), '--epochs', '5').splitlines()
    assert len(rows) == 1 + 5


def test_a_fill_killed_in_the_middle_goes_on_and_ends_as_the_live_run(tmp_path, home, images, run, live):
    flags = [*MIXED, '--batch-size', '4']
    argv = arguments(home, images, 'killed', *cache(tmp_path / 'cache'), *flags)
    process = Process(main, (argv,), tmp_path, dict(OMP_NUM_THREADS=str(torch.get_num_threads())))
    while process.wait(0.01) is None and present(tmp_path / 'cache' / 'epoch-0000.logits') < 8:
        pass
    process.process.kill()
    assert process.wait() == -signal.SIGKILL
    assert present(tmp_path / 'cache' / 'epoch-0000.logits') >= 8
    assert run(*cache(tmp_path / 'cache'), *flags) == live(*flags)


def present(path):
    """Counts the rows of an epoch's file without opening it as the cache does."""
    if not path.exists() or path.stat().st_size < 8192:
        return 0
    return int(np.count_nonzero(np.fromfile(path, np.uint32, NUM_SAMPLES, offset=4096)))


@pytest.mark.parametrize('crops', ['1', '2'])
def test_two_processes_fill_what_one_process_reads(tmp_path, home, images, run, live, teacher, crops):
    # Half a batch has its sums in another order. No weight moves, so that this difference does not grow.
    crops = ['--crops-per-image', crops, '--reprob', '0.4', '--opt', 'momentum', '--lr', '1e-30']
    flags = [*cache(tmp_path / 'cache'), *crops]
    run_on_ranks(main, (arguments(home, images, 'two', *flags, '--batch-size', '8'),), tmp_path)
    expected = list(csv.DictReader(live(*crops).splitlines()))
    shutil.rmtree(teacher)
    read = list(csv.DictReader(run(*flags).splitlines()))
    assert [row['eval_agreement'] for row in read] == [row['eval_agreement'] for row in expected]
    for before, after in zip(expected, read, strict=True):
        assert float(after['train_loss']) == pytest.approx(float(before['train_loss']), rel=1e-3)


def test_crops_that_a_fill_stored_serve_any_batch_size_and_no_other_number_of_crops(
        tmp_path, fill, run, teacher, capsys,
):
    flags = [*cache(tmp_path), '--reprob', '0.4', '--teacher-dtype', 'float32']
    fill(*flags, '--crops-per-image', '2', '--batch-size', '4')
    assert [present(tmp_path / f'epoch-000{epoch}.logits') for epoch in (0, 1)] == [NUM_SAMPLES] * 2
    assert 'crops_per_image was 2, is now 3' in refused(
        capsys, run, *flags, '--crops-per-image', '3', '--batch-size', '6')
    assert 'crops_per_image was 2, is now not set' in refused(capsys, run, *flags)
    shutil.rmtree(teacher)
    run(*flags, '--crops-per-image', '2', '--batch-size', '10')  # reads all of its rows


def test_changed_flags_and_images_are_refused_by_name(filled, home, images, run, tmp_path, capsys):
    message = refused(capsys, run, *cache(filled), '--hflip', '0', '--seed', '6')
    assert 'images.hflip was 0.5, is now 0.0' in message and 'seed was 5, is now 6' in message
    assert '--teacher-cache-rebuild' in message
    changed = shutil.copytree(images, tmp_path / 'changed')
    (changed / 'train' / '3' / '000.png').unlink()
    message = refused(capsys, lambda: main(arguments(home, changed, 'changed', *cache(filled))))
    assert f'dataset.count was {NUM_SAMPLES}, is now {NUM_SAMPLES - 1}' in message and 'dataset.files was' in message


@pytest.mark.parametrize('flags, field', [
    ('--mean 0.4 0.4 0.4', 'images.mean'),
    ('--std 0.4 0.4 0.4', 'images.std'),
    ('--img-size 40', 'images.input_size'),
    ('--input-img-mode YCbCr', 'images.mode'),
    ('--model-dtype bfloat16', 'images.dtype'),
    ('--no-prefetcher', 'images.prefetcher'),
    ('--color-jitter 0.2', 'images.color_jitter'),
    ('--reprob 0.5 --remode pixel', 'erasing_device'),
    ('--mixup 0.2', 'mixing.mixup'),
    ('--teacher-img-size 64', 'teacher.img_size'),
    ('--teacher-kwargs drop_rate=0.1', 'teacher.kwargs.drop_rate'),
    ('--amp --amp-dtype bfloat16 --teacher-dtype amp', 'teacher.autocast'),
    ('--teacher-class-map map.txt', 'teacher.class_map'),
    ('--teacher-class-map map.txt --teacher-class-map-missing mask', 'teacher.class_map_missing'),
    ('--teacher-model test_resnet2', 'teacher.model'),
    ('--teacher-ema', 'teacher.ema'),
    ('--crops-per-image 2', 'crops_per_image'),
    ('--teacher-cache-topk 3', 'rows.topk'),
    ('--teacher-cache-dtype float16', 'rows.dtype'),
])
def test_a_flag_that_changes_images_or_logits_is_refused(filled, run, tmp_path, monkeypatch, capsys, flags, field):
    monkeypatch.chdir(tmp_path)
    Path('map.txt').write_text('\n'.join(map(str, range(10))))
    monkeypatch.setattr('timm_kd.teacher_cache.key._MAX_SHOWN', 100)
    assert f'{field} was ' in refused(capsys, run, *cache(filled), *flags.split())


@pytest.mark.parametrize('mixing', [['--mixup', '0.4'], ['--resplit', '--reprob', '0.5']], ids=' '.join)
def test_rows_that_depend_on_their_batch_belong_to_its_size_and_mixing(tmp_path, fill, run, capsys, mixing):
    fill(*cache(tmp_path), *mixing, epochs='0 1')
    others = {'--batch-size 8': 'batches.batch_size was 16'}
    if '--mixup' in mixing:
        others |= {
            '--mixup 0.5': 'mixing.mixup was 0.4', '--mixup-off-epoch 1': 'mixing.mixup_off_epoch was 0',
            '--mixup-prob 0.5': 'mixing.mixup_prob was 1.0', '--mixup-mode elem': 'mixing.mixup_mode was "batch"',
            '--cutmix 1': 'mixing.cutmix was 0.0, is now 1.0; mixing.mixup_switch_prob was not set, is now 0.5',
            '--cutmix-minmax 0.2 0.8': 'mixing.cutmix_minmax was null',
        }
    for flags, message in others.items():
        assert message in refused(capsys, run, *cache(tmp_path), *mixing, *flags.split())
    edit_key(tmp_path, 'batches', 'world_size', 2)
    assert 'batches.world_size was 2, is now 1' in refused(capsys, run, *cache(tmp_path), *mixing)


def edit_key(folder, part, name, value):
    key = json.loads((folder / 'key.json').read_text())
    key[part][name] = value
    (folder / 'key.json').write_text(json.dumps(key))


def test_rows_of_another_version_of_timm_are_refused(folder, run, capsys):
    edit_key(folder, 'versions', 'timm', '0.1')
    assert f'versions.timm was "0.1", is now "{timm.__version__}"' in refused(capsys, run, *cache(folder))


def test_a_class_map_is_known_by_its_content(tmp_path, run, capsys):
    class_map = tmp_path / 'map.txt'
    class_map.write_text('\n'.join(map(str, range(10))))
    flags = [*cache(tmp_path / 'cache'), '--teacher-class-map', str(class_map), '--epochs', '1']
    run(*flags)
    class_map.write_text('\n'.join(map(str, reversed(range(10)))))
    assert 'teacher.class_map was' in refused(capsys, run, *flags)


def test_without_augmentation_the_resize_of_validation_decides_the_images(tmp_path, run, capsys):
    flags = [*cache(tmp_path), '--no-aug', '--epochs', '1', '--train-interpolation']
    run(*flags, 'bilinear')
    run(*flags, 'nearest')
    assert 'images.interpolation was' in refused(capsys, run, *flags, 'nearest', '--interpolation', 'nearest')


def test_epochs_without_mixing_cannot_come_round_as_mixed_ones(tmp_path, run, capsys):
    flags = '--mixup 0.4 --mixup-off-epoch 1 --teacher-cache-epochs 1'.split()
    assert '--teacher-cache-epochs 1: the epochs after' in refused(capsys, run, *cache(tmp_path / 'cache'), *flags)


def test_a_cache_without_the_teachers_validation_has_it_made(tmp_path, run, live):
    run(*cache(tmp_path), '--no-teacher-eval')
    assert run(*cache(tmp_path)) == live()


def test_another_teacher_is_refused_and_rebuild_fills_anew(folder, run, teacher, capsys):
    old = (folder / 'epoch-0000.logits').read_bytes()
    change_weights(teacher)
    assert 'teacher.members was' in refused(capsys, run, *cache(folder))
    run(*cache(folder, '--teacher-cache-rebuild'), '--epochs', '1')
    assert (folder / 'epoch-0000.logits').read_bytes() != old
    assert not (folder / 'epoch-0001.logits').exists()


def test_a_run_reads_no_epoch_before_its_first(tmp_path, fill, run, teacher):
    fill(*cache(tmp_path), epochs='1 2')
    shutil.rmtree(teacher)
    assert len(run(*cache(tmp_path), '--start-epoch', '1').splitlines()) == 1 + 1


@pytest.mark.parametrize('flags', [
    ['--train-crop-mode', 'rrc'], ['--input-img-mode', 'RGB'], ['--remode', 'const'], ['--resplit'],
], ids=' '.join)
def test_a_flag_that_changes_no_image_changes_no_key(filled, run, teacher, flags):
    shutil.rmtree(teacher)
    run(*cache(filled), *flags)


def test_students_with_other_crops_keep_a_validation_each(folder, run, teacher):
    crops = [flags.split() for flags in ('', '--crop-pct 0.7', '--interpolation nearest', '--tta 2')]
    first = [run(*cache(folder), *crop) for crop in crops]
    assert len(list(folder.glob('validation-*.npz'))) == len(crops)
    shutil.rmtree(teacher)
    assert [run(*cache(folder), *crop) for crop in crops] == first


def test_other_validation_images_have_a_validation_of_their_own(filled, home, images, teacher, tmp_path):
    folder, others = shutil.copytree(filled, tmp_path / 'cache'), shutil.copytree(images, tmp_path / 'images')
    three, four = (next((others / 'validation' / label).iterdir()) for label in '34')
    shutil.copy(four, three)
    main(arguments(home, others, 'others', *cache(folder)))
    assert len(list(folder.glob('validation-*.npz'))) == 2


def test_a_weights_file_at_another_place_is_the_same_teacher(tmp_path, run, teacher):
    weights = Path(shutil.copy(teacher / 'model.safetensors', tmp_path / 'one.safetensors'))
    flags = ['--teacher-model', 'test_resnet', *cache(tmp_path / 'cache')]
    run('--teacher', str(weights), '--epochs', '1', *flags)
    moved = weights.rename(tmp_path / 'two.safetensors')
    expected = run('--teacher', str(moved), *flags)
    moved.rename(weights)
    assert run('--teacher', str(weights), *flags) == expected
    weights.unlink()
    assert run('--teacher', str(weights), *flags) == expected


def test_a_teacher_that_is_there_is_checked_beside_one_that_is_not(tmp_path, run, digits_teacher, capsys):
    pair = [shutil.copytree(digits_teacher, tmp_path / name) for name in ('a', 'b')]
    flags = ['--teacher', str(pair[0]), '--teacher', str(pair[1]), '--epochs', '1', *cache(tmp_path / 'cache')]
    run(*flags)
    shutil.rmtree(pair[1])
    run(*flags)
    change_weights(pair[0])
    assert 'teacher.members was' in refused(capsys, run, *flags)


def test_an_incomplete_cache_without_its_teacher_is_refused(filled, run, teacher, capsys):
    shutil.rmtree(teacher)
    assert f'--teacher local-dir:{teacher}' in refused(capsys, run, *cache(filled), '--epochs', '3')


def test_filling_ahead_leaves_nothing_for_the_teacher_to_do(tmp_path, fill, run, live, teacher, capsys):
    for epochs in ('1 2', '0 1'):  # as two machines would
        fill(*cache(tmp_path), *MIXING_ENDS, epochs=epochs)
    expected = live(*MIXING_ENDS)
    shutil.rmtree(teacher)
    assert run(*cache(tmp_path), *MIXING_ENDS) == expected
    capsys.readouterr()
    cache_main(['info', str(tmp_path)])
    shown = capsys.readouterr().out
    assert 'epoch-0001.logits  48 rows (100.0 %)' in shown and '48 an epoch, by position, 10 classes' in shown


def test_a_fill_goes_on_at_the_first_row_that_is_absent(filled, folder, fill, caplog):
    file = EpochFile(folder / 'epoch-0000.logits', NUM_SAMPLES, 40, writable=True)
    order = ReplayBatchSampler(BatchSampler(ShuffledSampler(range(NUM_SAMPLES), 1, 0), 16, True), seed=5).rows(0, 3)[0]
    file.checksums[order[16 + 5:]] = 0
    file.close()
    fill(*cache(folder), epochs='0 1')
    assert 'Teacher cache: 1 epochs, 32 images' in caplog.text
    assert (folder / 'epoch-0000.logits').read_bytes() == (filled / 'epoch-0000.logits').read_bytes()


@pytest.mark.parametrize('epochs, reason', [
    ('1 3', 'the flags schedule 2 epochs'), ('1 1', 'holds no epoch'), ('1 0', 'holds no epoch'),
    ('-1 1', 'holds no epoch'),
])
def test_filling_epochs_that_the_flags_do_not_schedule_is_refused(tmp_path, fill, capsys, epochs, reason):
    assert f'--epochs-range {epochs}: {reason}' in refused(capsys, fill, *cache(tmp_path), epochs=epochs)


def test_filling_ahead_stores_what_a_run_stores_under_amp_and_each_distinct_epoch_once(
        tmp_path, fill, run, caplog,
):
    flags = '--amp --amp-dtype bfloat16 --teacher-dtype amp --teacher-cache-epochs 1'.split()
    run(*cache(tmp_path / 'run'), *flags)
    fill(*cache(tmp_path / 'fill'), *flags)
    assert 'Teacher cache: 1 epochs, 48 images' in caplog.text
    by_run, by_fill = (sorted((tmp_path / name).glob('epoch-*')) for name in ('run', 'fill'))
    assert [path.read_bytes() for path in by_run] == [path.read_bytes() for path in by_fill]


def test_a_fill_ends_with_the_room_on_its_disk(tmp_path, fill, capsys):
    with full_disk(8192 + 40 * 20):
        message = refused(capsys, fill, *cache(tmp_path / 'cache'), '--no-teacher-eval', code=1)
    assert f'--teacher-cache {tmp_path}/cache' in message and 'the disk is full' in message
    assert 'store less with --teacher-cache-epochs or --teacher-cache-topk' in message


def test_info_shows_teacher_rows_disk_and_key(filled, home, digits_teacher, capsys):
    parameters = sum(value.numel() for value in timm.create_model('test_resnet', num_classes=10).parameters())
    cache_main(['info', str(filled)])
    lines = capsys.readouterr().out.splitlines()
    metrics = yaml.safe_load(str(np.load(next(filled.glob('validation-*.npz')))['metrics']))[0]
    sizes = [512 * os.stat(filled / f'epoch-000{epoch}.logits').st_blocks for epoch in range(2)]
    assert lines[:-1] == [
        f'{filled}: teacher logits',
        f'teacher   local-dir:{home / "teacher"} (test_resnet, {parameters} parameters)',
        f'          top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % in validation',
        f'rows      {NUM_SAMPLES} an epoch, by sample, 10 classes as float32',
        *(f'epoch-000{epoch}.logits  48 rows (80.0 %), {size / 1e6:.2f} MB' for epoch, size in enumerate(sizes)),
        f'in all    {sum(sizes) / 1e6:.2f} MB on disk',
    ]
    key = json.loads(lines[-1].removeprefix('key'))
    assert key['seed'] == 5 and key['images']['input_size'] == [3, 32, 32] and 'rows' not in key


def test_info_names_how_many_logits_are_kept_and_takes_no_flags(tmp_path, fill, capsys):
    fill(*cache(tmp_path, '--teacher-cache-topk', '1'), '--epochs', '1')
    capsys.readouterr()
    cache_main(['info', str(tmp_path)])
    assert '10 classes as float32, the 1 largest' in capsys.readouterr().out
    assert '--seed 5: info takes a folder' in refused_command(capsys, 'info', tmp_path, '--seed', '5')


def test_a_members_file_that_was_deleted_is_written_again(filled, folder, run, teacher):
    (folder / 'members.json').unlink()
    run(*cache(folder))
    assert (folder / 'members.json').read_bytes() == (filled / 'members.json').read_bytes()


def test_verify_throws_nothing_away(tmp_path, home, images, capsys):
    changed = shutil.copytree(images, tmp_path / 'images')
    flags = [*cache(tmp_path / 'cache', '--teacher-cache-rebuild'), '--epochs', '1']
    cache_main(['fill', *arguments(home, changed, 'rebuilt', *flags)])
    before = (tmp_path / 'cache' / 'epoch-0000.logits').read_bytes()
    (changed / 'train' / '3' / '000.png').unlink()
    assert 'dataset.count was' in refused_command(capsys, 'verify', tmp_path / 'cache', '--teacher-cache-rebuild')
    assert (tmp_path / 'cache' / 'epoch-0000.logits').read_bytes() == before


def test_verify_drops_damaged_rows_for_the_next_run(filled, folder, run, live, tmp_path, monkeypatch, capsys):
    with open(folder / 'epoch-0000.logits', 'r+b') as raw:
        raw.seek(8192 + 40 * 7)
        raw.write(b'damaged')
    monkeypatch.chdir(tmp_path)  # the flags that it was filled with are found from anywhere
    refused_command(capsys, 'verify', folder, code=1)
    assert present(folder / 'epoch-0000.logits') == present(filled / 'epoch-0000.logits') - 1
    assert run(*cache(folder)) == live()
    cache_main(['verify', str(folder)])


def masked(logits):
    logits[:, 3] = -np.inf
    return logits


@pytest.mark.parametrize('change, holds', [
    (lambda logits: logits * np.float32(1.01), True),
    (lambda logits: logits * np.float32(1.05), False),
    (lambda logits: np.random.default_rng(0).standard_normal(logits.shape, np.float32), False),
    (masked, False),
], ids=['by 1 %', 'by 5 %', 'noise', 'a class that the teacher does not mask'])
def test_verify_allows_a_difference_of_two_percent(folder, caplog, capsys, change, holds):
    file = EpochFile(folder / 'epoch-0001.logits', NUM_SAMPLES, 40, writable=True)
    rows = np.flatnonzero(file.checksums)
    data = np.empty((len(rows), 40), np.uint8)
    file.read(rows, data)
    file.write(rows, change(data.view(np.float32)).view(np.uint8))
    file.close()
    command = 'verify', str(folder), '--batches', '3'
    cache_main(command) if holds else refused_command(capsys, *command, code=1)
    assert 'epoch 0: 0 damaged rows; 3 of 3 batches computed again' in caplog.text
    assert 'epoch 1: 0 damaged rows; 3 of 3 batches computed again' in caplog.text


@pytest.mark.parametrize('flags', [
    '--mixup 0.4 --cutmix 1 --mixup-prob 0.9 --mixup-switch-prob 0.4 --mixup-mode elem --mixup-off-epoch 1 '
    '--teacher-cache-topk 3 --teacher-img-size 40 --aa rand-m5 --reprob 0.4 --remode pixel --recount 2 --no-prefetcher',
    '--cutmix-minmax 0.2 0.8 --teacher-dtype amp --amp --amp-dtype bfloat16',
    '--hflip 0.3 --vflip 0.1 --scale 0.5 1 --ratio 0.8 1.2 --color-jitter 0.2 --color-jitter-prob 0.5 '
    '--grayscale-prob 0.1 --gaussian-blur-prob 0.1 --train-interpolation bilinear --train-crop-mode rkrc --resplit '
    '--mean 0.4 0.4 0.4 --std 0.3 0.3 0.3 --reprob 0.4 --teacher-class-map map.txt --teacher-class-map-missing mask',
    '--crops-per-image 2 --aa rand-m5 --reprob 0.4',
    '--no-aug --model-dtype bfloat16 --channels-last --interpolation nearest --crop-pct 0.9 '
    '--input-img-mode YCbCr --class-map classes.txt',
], ids=['mixed', 'precision', 'augmented', 'crops', 'plain'])
def test_verify_shows_the_teacher_what_the_fill_showed_it_from_any_folder(
        tmp_path, home, images, teacher, monkeypatch, flags,
):
    (tmp_path / 'work').mkdir()
    (tmp_path / 'else').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    Path('digits').symlink_to(images)
    Path('teacher').symlink_to(teacher)
    Path('map.txt').write_text('\n'.join(map(str, [*range(9), -1])))
    Path('classes.txt').write_text('\n'.join(map(str, range(10))))
    argv = ['--data-dir', 'digits', *arguments(home, images, 'filled', '--epochs', '1', '--teacher', 'teacher')[1:]]
    place = argv.index(f'local-dir:{teacher}')
    del argv[place - 1:place + 1]
    cache_main(['fill', *argv, *cache(tmp_path / 'cache'), *flags.split()])
    monkeypatch.chdir(tmp_path / 'else')
    cache_main(['verify', str(tmp_path / 'cache'), '--batches', '3'])


def test_verify_runs_nothing_that_the_flags_in_the_folder_name(folder, tmp_path, monkeypatch):
    (tmp_path / 'planted.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    flags = yaml.safe_load((folder / 'args.yaml').read_text())
    flags.update(
        device_modules=['planted'], dataset_trust_remote_code=True, log_wandb=True, log_tensorboard=True,
        push_to_hub='someone/else', resume=str(tmp_path / 'planted.py'), initial_checkpoint=str(tmp_path / 'x'),
        model_kwargs={'checkpoint_path': 'x'}, teacher_kwargs={'checkpoint_path': 'x'}, output=str(tmp_path / 'out'),
        teacher_cache_rebuild=True, teacher_cache=str(tmp_path / 'other'), config='x', workers=10 ** 6,
    )
    (folder / 'args.yaml').write_text(yaml.safe_dump(flags))
    cache_main(['verify', str(folder)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['cache', 'planted.py']


@pytest.mark.parametrize('content', ['', '[1]', 'a: [', '!!python/object/apply:os.getcwd []', '\x00'])
def test_verify_says_that_the_flags_in_the_folder_are_damaged(folder, content, capsys):
    (folder / 'args.yaml').write_text(content)
    assert f'{folder}/args.yaml' in refused_command(capsys, 'verify', folder)


def test_verify_reads_no_flags_through_a_link(folder, tmp_path, capsys):
    (folder / 'args.yaml').rename(tmp_path / 'args.yaml')
    (folder / 'args.yaml').symlink_to(tmp_path / 'args.yaml')
    assert 'args.yaml is a link' in refused_command(capsys, 'verify', folder)


@pytest.mark.parametrize('teachers', [1, 2])
@pytest.mark.parametrize('filled_fast', [False, True])
def test_another_kind_of_processor_verifies_a_cache_and_shares_its_fill_in_the_precision_that_it_is_told(
        tmp_path, fill, digits_teacher, pretend, capsys, filled_fast, teachers,
):
    here, there = ('bfloat16', 'float32') if filled_fast else ('float32', 'bfloat16')
    flags = [*cache(tmp_path), *['--teacher', str(digits_teacher)] * (teachers - 1)]
    pretend(filled_fast)
    fill(*flags, epochs='0 1')
    pretend(not filled_fast)
    cache_main(['verify', str(tmp_path)])
    message = refused(capsys, fill, *flags, epochs='1 2')
    assert f'in {here}, and --teacher-dtype auto is {there} on this machine' in message
    fill(*flags, *message.partition(': add ')[2].strip(' .\n').split(), epochs='1 2')
    assert present(tmp_path / 'epoch-0001.logits') == NUM_SAMPLES // 16 * 16
    message = refused(capsys, fill, *flags, '--teacher-dtype', there)
    assert f'teacher.dtype was "auto", is now "{there}"' in message


def test_a_complete_cache_is_read_on_another_kind_of_processor(tmp_path, run, teacher, pretend):
    pretend(True)
    filled = run(*cache(tmp_path / 'cache'))
    pretend(False)
    assert run(*cache(tmp_path / 'cache')) == filled
    shutil.rmtree(teacher)
    assert run(*cache(tmp_path / 'cache'), '--teacher-dtype', 'bfloat16') == filled


@pytest.mark.parametrize('name', ['key.json', 'teacher.json'])
def test_a_damaged_file_is_refused_and_rebuild_clears_it(folder, run, capsys, name):
    (folder / name).write_text('{"teacher": {')
    flags = [*cache(folder), '--epochs', '3']
    assert f'{name} is damaged: use --teacher-cache-rebuild' in refused(capsys, run, *flags)
    gc.collect()  # in a process of its own, the refused run would have ended, and its lock with it
    run(*flags, '--teacher-cache-rebuild')
    assert sorted(path.name for path in folder.glob('epoch-*')) == [f'epoch-000{epoch}.logits' for epoch in range(3)]
