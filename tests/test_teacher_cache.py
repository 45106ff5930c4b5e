"""Stored teacher logits: what is read is what was written, by whomever and however it ended."""
import json
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NUM_CLASSES, NUM_SAMPLES, build, full_disk
from timm.data import FastCollateMixup, create_dataset
from torch.utils.data import BatchSampler

from timm_kd.errors import CommandError, UsageError
from timm_kd.replay import ReplayBatchSampler
from timm_kd.replay.batches import ShuffledSampler
from timm_kd.teacher import Teacher
from timm_kd.teacher_cache import CachedTeacher, CacheFolder, RowLayout
from timm_kd.teacher_cache.cached_teacher import HostCopies
from timm_kd.teacher_cache.epoch_file import EpochFile, epoch_file_size
from timm_kd.teacher_cache.folder import MEMBERS_FILE, epoch_files, read_members, read_rows, read_validation
from timm_kd.teacher_cache.key import fingerprint_dataset, fingerprint_teacher, write_new

ROW = 16  # bytes: four classes in float32


def rows_of(count):
    return np.random.default_rng(0).integers(0, 256, (count, ROW), dtype=np.uint8)


def rows_in(file, rows):
    out = np.empty((len(rows), ROW), np.uint8)
    file.read(np.array(rows), out)
    return out


def present(file, num_rows=100):
    return np.flatnonzero(file.has(np.arange(num_rows))).tolist()


@pytest.mark.parametrize('dtype, exact', [('float32', True), ('float16', False)])
def test_whole_rows_come_back_at_their_precision(dtype, exact):
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)) * 8
    layout = RowLayout(100, dtype)
    rows = layout.pack(logits)
    assert rows.shape == (6, layout.row_bytes) == (6, 100 * (4 if exact else 2))
    back = layout.unpack(rows)
    assert torch.equal(back, logits if exact else logits.half().float())


def test_float16_rows_keep_masked_classes_and_stay_finite_elsewhere():
    logits = torch.tensor([[float('-inf'), 1e5, -1e5, 2.0]])
    assert RowLayout(4).unpack(RowLayout(4).pack(logits)).tolist() == [[float('-inf'), 65504.0, -65504.0, 2.0]]


@pytest.mark.parametrize('num_classes', [50, 40_000])
def test_topk_rows_keep_the_largest_probabilities_and_the_mass_of_the_rest(num_classes):
    logits = torch.randn(5, num_classes, generator=torch.Generator().manual_seed(1)).double() * 3
    layout = RowLayout(num_classes, 'float32', topk=7)
    back = layout.unpack(layout.pack(logits.float()))
    top = logits.topk(7, dim=1).indices
    exact, stored = logits.softmax(1), back.double().softmax(1)
    torch.testing.assert_close(stored.gather(1, top), exact.gather(1, top), rtol=1e-5, atol=0)
    rest = stored.scatter(1, top, 0)
    expected = (1 - exact.gather(1, top).sum(1)) / (num_classes - 7)
    torch.testing.assert_close(rest.amax(1), expected, rtol=1e-4, atol=0)
    assert (rest > 0).sum().item() == 5 * (num_classes - 7)
    assert layout.row_bytes == 7 * (4 + (2 if num_classes == 50 else 4)) + 4


def test_an_epoch_file_gives_back_rows_written_in_any_order(tmp_path):
    file = EpochFile(tmp_path / 'epoch', 100, ROW, writable=True)
    data = rows_of(5)
    file.write(np.array([7, 8, 9, 99, 0]), data)
    file.close()
    file = EpochFile(tmp_path / 'epoch', 100, ROW, writable=False)
    assert np.array_equal(rows_in(file, [99, 8]), data[[3, 1]])
    assert present(file) == [0, 7, 8, 9, 99]


def test_a_row_whose_checksum_is_zero_is_present_all_the_same(tmp_path):
    start = bytes(range(ROW - 4))
    end = (zlib.crc32(start) ^ int.from_bytes(b'\x9d\x0a\xd9\x6d', 'little')).to_bytes(4, 'little')  # whose own is 0
    assert zlib.crc32(start + end) == 0
    file = EpochFile(tmp_path / 'epoch', 100, ROW, writable=True)
    file.write(np.array([3]), np.frombuffer(start + end, np.uint8)[None])
    assert present(file) == [3]
    assert len(file.drop_damaged()) == 0


def test_damaged_rows_are_found_wherever_they_are(tmp_path):
    file = EpochFile(tmp_path / 'epoch', 10_000, ROW, writable=True)
    file.write(np.arange(10_000), rows_of(10_000))
    with open(tmp_path / 'epoch', 'r+b') as raw:
        for row in (0, 4095, 4096, 9_999):
            raw.seek(epoch_file_size(10_000, ROW) - (10_000 - row) * ROW)
            raw.write(bytes(ROW))
    assert file.drop_damaged().tolist() == [0, 4095, 4096, 9_999]


def test_an_epoch_file_cut_short_is_refused(tmp_path):
    EpochFile(tmp_path / 'epoch', 100, ROW, writable=True).close()
    os.truncate(tmp_path / 'epoch', 5000)
    with pytest.raises(UsageError, match=rf'5000 bytes instead of {epoch_file_size(100, ROW)}'):
        EpochFile(tmp_path / 'epoch', 100, ROW, writable=True)


def test_rows_lost_when_the_machine_stopped_count_as_absent(tmp_path):
    path = tmp_path / 'epoch'
    file = EpochFile(path, 100, ROW, writable=True)
    file.write(np.arange(10), rows_of(10))
    # What a power failure leaves: the checksums on disk, a page of rows not, the file never closed.
    with open(path, 'r+b') as raw:
        raw.seek(epoch_file_size(100, ROW) - 97 * ROW)
        raw.write(bytes(ROW))
    again = EpochFile(path, 100, ROW, writable=True)
    assert present(again) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def fill_until_killed(path, started):
    file = EpochFile(path, 100_000, ROW, writable=True)
    data = rows_of(100_000)
    for start in range(0, 100_000, 8):
        file.write(np.arange(start, start + 8), data[start:start + 8])
        started.set()


def test_sigkill_during_a_fill_loses_at_most_the_batch_under_way(tmp_path):
    started = multiprocessing.get_context('fork').Event()
    process = multiprocessing.get_context('fork').Process(target=fill_until_killed, args=(tmp_path / 'epoch', started))
    process.start()
    assert started.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    file = EpochFile(tmp_path / 'epoch', 100_000, ROW, writable=True)
    stored = present(file, 100_000)
    assert 8 <= len(stored) < 100_000
    assert stored == list(range(len(stored)))  # no hole: every batch before the last is there
    assert np.array_equal(rows_in(file, stored), rows_of(100_000)[:len(stored)])


ROWS = {'by': 'sample', 'count': 100, 'classes': 4, 'dtype': 'float32', 'topk': None}
KEY = {'data': {'hflip': 0.5, 'scale': (0.08, 1.0)}, 'seed': 42, 'teacher': [{'source': 'resnet34.tv_in1k'}]}


def folder(path, rebuild=False, teacher=None, **key):
    return CacheFolder(path, {**KEY, 'rows': ROWS, **key}, rebuild, teacher)


def covers(cache, epochs=(0,), num_rows=100):
    """Whether a cache has the first rows of some epochs."""
    return cache.covers(ReplayBatchSampler(BatchSampler(ShuffledSampler(range(num_rows), 1, 0), 1, True), 0), epochs)


def test_the_same_key_opens_a_cache_again(tmp_path):
    folder(tmp_path).close()
    folder(tmp_path, **json.loads(json.dumps(KEY))).close()


def store_rows(cache, epoch=0, num_rows=100):
    file = cache.open_epoch(epoch)
    file.write(np.arange(num_rows), rows_of(num_rows))
    file.close()


def fill(*args, **kwargs):
    """Makes a cache with the rows of an epoch."""
    cache = folder(*args, **kwargs)
    store_rows(cache)
    cache.close()


def test_another_key_is_refused_with_field_values_and_way_out(tmp_path):
    fill(tmp_path)
    with pytest.raises(UsageError) as refused:
        folder(tmp_path, data={'hflip': 0.0, 'scale': (0.08, 1.0)})
    assert 'data.hflip was 0.5, is now 0.0' in str(refused.value)
    assert '`rebuild`' in str(refused.value) and 'another folder' in str(refused.value)


def test_rebuild_throws_away_the_rows_of_another_key(tmp_path):
    first = folder(tmp_path)
    store_rows(first)
    assert covers(first)
    first.close()
    rebuilt = folder(tmp_path, seed=1, rebuild=True)
    assert not covers(rebuilt)
    folder(tmp_path, seed=1).close()  # once it is cleared, others may use it too


def test_rebuild_throws_away_the_rows_of_another_teacher(tmp_path):
    fill(tmp_path, teacher={'weights': 'abc'})
    with pytest.raises(UsageError, match='teacher.weights was "abc", is now "def"'):
        folder(tmp_path, teacher={'weights': 'def'})
    (tmp_path / 'teacher.json').write_text('{"teacher": ')
    with pytest.raises(UsageError, match=r'teacher\.json is damaged: use `rebuild`'):
        folder(tmp_path, teacher={'weights': 'def'})
    rebuilt = folder(tmp_path, teacher={'weights': 'def'}, rebuild=True)
    assert not covers(rebuilt)
    rebuilt.claim_teacher({'weights': 'def'})


def test_a_key_without_rows_gives_way_to_another(tmp_path):
    folder(tmp_path).close()  # a run that was refused for another reason before its first row
    folder(tmp_path, seed=1).close()
    folder(tmp_path, seed=1).close()


@pytest.mark.parametrize('rebuild', [False, True])
def test_a_cache_is_not_cleared_while_another_run_uses_it(tmp_path, rebuild):
    other = folder(tmp_path)
    if rebuild:
        store_rows(other)
    with pytest.raises(UsageError, match='another run is using'):
        folder(tmp_path, seed=1, rebuild=rebuild)
    other.close()


def test_two_runs_fill_one_cache_together(tmp_path):
    one, two = folder(tmp_path), folder(tmp_path)
    files = one.open_epoch(3), two.open_epoch(3)
    files[0].write(np.arange(0, 60), rows_of(100)[:60])
    files[1].write(np.arange(40, 100), rows_of(100)[40:])
    assert present(files[0]) == present(files[1]) == list(range(100))
    assert np.array_equal(rows_in(files[0], range(100)), rows_of(100))


def test_a_cache_covers_a_run_when_the_rows_it_needs_are_there(tmp_path):
    cache = folder(tmp_path)
    for epoch in (0, 1):
        store_rows(cache, epoch, num_rows=90)
    assert covers(cache, [0, 1], num_rows=90)
    assert not covers(cache, [0, 1], num_rows=91)
    assert not covers(cache, [0, 1, 2], num_rows=90)


def test_too_little_disk_is_an_error_with_both_sizes(tmp_path):
    cache = folder(tmp_path, rows={**ROWS, 'count': 10 ** 9, 'classes': 500})
    with pytest.raises(UsageError, match=r'needs 2\d{5}\.\d\d GB more and its disk has \d+\.\d\d GB free'):
        cache.check_space(range(100))


def test_what_is_stored_needs_no_room_again(tmp_path, caplog):
    cache = folder(tmp_path)
    size = epoch_file_size(100, ROW) / 1e6
    with caplog.at_level('INFO'):
        cache.check_space([0, 1])
        assert f'{2 * size:.2f} MB to be written' in caplog.text
        store_rows(cache)
        caplog.clear()
        cache.check_space([0, 1])
        assert f' {size:.2f} MB to be written' in caplog.text


def test_of_two_runs_that_write_a_file_at_once_the_first_stays(tmp_path):
    write_new(tmp_path / 'members.json', 'first')
    write_new(tmp_path / 'members.json', 'second')
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'members.json': 'first\n'}


@pytest.fixture
def open_path():
    """A folder that other users may enter; those of pytest are their owner's alone."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)
        os.chmod(path, 0o755)


def holds_for_a_user_without_rights(check):
    """Whether a check is true in a process that is not root, for which no folder is closed."""
    def run():
        if os.geteuid() == 0:
            os.setuid(65534)
        os._exit(0 if check() else 1)

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    process.join()
    return process.exitcode == 0


def test_a_cache_that_cannot_be_written_is_read(open_path):
    fill(open_path)
    for path in open_path.iterdir():
        path.chmod(0o444)
    open_path.chmod(0o555)

    def read_and_refuse_to_write():
        read_only = folder(open_path)
        with pytest.raises(UsageError, match='cannot be written'):
            read_only.check_space([0, 1])
        return covers(read_only) and np.array_equal(rows_in(read_only.open_epoch(0), range(100)), rows_of(100))

    assert holds_for_a_user_without_rights(read_and_refuse_to_write)


def test_a_cache_in_a_closed_folder_is_refused_by_name(open_path):
    def refused():
        with pytest.raises(UsageError, match=f"teacher cache '{open_path}/cache': Permission denied"):
            folder(open_path / 'cache')
        return True

    (open_path / 'cache').mkdir()
    open_path.chmod(0)
    assert holds_for_a_user_without_rights(refused)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / 'cache').write_text('')
    with pytest.raises(UsageError, match="cache': a folder is needed"):
        folder(tmp_path / 'cache')


def put_in_place(kind, path, elsewhere):
    """Replace a file by something that is none, or is a file elsewhere; returns what the others must leave alone."""
    path.rename(elsewhere)
    if kind == 'link':
        path.symlink_to(elsewhere)
    elif kind == 'dangling link':
        elsewhere.unlink()
        path.symlink_to(elsewhere)
    elif kind == 'hard link':
        os.link(elsewhere, path)
    elif kind == 'pipe':
        os.mkfifo(path)
    else:
        path.mkdir()


def use_everything(path, rebuild):
    cache = folder(path, teacher={'weights': 'abc'}, rebuild=rebuild)
    cache.load_validation('crop', 3)
    covers(cache)
    store_rows(cache)
    cache.close()


@pytest.mark.parametrize('rebuild', [False, True])
@pytest.mark.parametrize('kind', ['link', 'dangling link', 'hard link', 'pipe', 'folder'])
@pytest.mark.parametrize('name', ['key.json', 'lock', 'epoch-0000.logits', 'teacher.json', 'validation-*.npz'])
def test_what_is_no_file_of_the_cache_is_neither_read_nor_written(tmp_path, name, kind, rebuild):
    if kind == 'hard link' and name not in ('lock', 'epoch-0000.logits'):
        pytest.skip('these are never written in place')
    cache = folder(tmp_path / 'cache', teacher={'weights': 'abc'})
    store_rows(cache)
    cache.save_validation('crop', metrics=[], predictions=np.zeros(3, int))
    cache.close()
    place, = (tmp_path / 'cache').glob(name)
    elsewhere = tmp_path / 'elsewhere'
    put_in_place(kind, place, elsewhere)
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    with pytest.raises(UsageError, match=rf'{place.name} is a (link|hard link|folder)'):
        use_everything(tmp_path / 'cache', rebuild)
    assert (elsewhere.read_bytes() if elsewhere.exists() else None) == before


def test_a_link_to_a_folder_is_a_cache_like_any_other(tmp_path):
    (tmp_path / 'place').mkdir()
    (tmp_path / 'cache').symlink_to(tmp_path / 'place')
    use_everything(tmp_path / 'cache', rebuild=False)
    assert (tmp_path / 'place' / 'epoch-0000.logits').is_file()
    (tmp_path / 'nowhere').symlink_to(tmp_path / 'absent')
    with pytest.raises(UsageError, match="nowhere': a folder is needed"):
        folder(tmp_path / 'nowhere')


@pytest.mark.parametrize('rebuild', [False, True])
@pytest.mark.parametrize('files', [
    {'holiday.jpg': b''},
    {'args.yaml': b'model: resnet18', 'summary.csv': b'epoch'},
    {'epoch-0000.logits': b'rows without a key'},
    {'key.json': b'{"private": 1}', 'args.yaml': b'model: resnet18'},
    {'key.json': b'-----BEGIN PRIVATE KEY-----', 'holiday.jpg': b''},
])
def test_a_folder_of_other_files_is_not_taken_for_a_cache(tmp_path, files, rebuild):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match='no teacher cache|not that of a teacher cache|is damaged'):
        folder(tmp_path, rebuild=rebuild)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != 'lock'}
    assert kept == files


@pytest.mark.parametrize('umask', [0o077, 0o022, 0o002])
def test_files_of_a_cache_have_the_permissions_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        cache = folder(tmp_path / 'cache', teacher={'weights': 'abc'})
        store_rows(cache)
        cache.describe([], 'seed: 42')
        cache.save_validation('crop', metrics=[], predictions=np.zeros(3, int))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / 'cache').iterdir()}
    assert len(modes) == 7
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_only_names_that_a_cache_writes_are_its_epochs(tmp_path):
    cache = folder(tmp_path)
    store_rows(cache, epoch=12)
    for name in '99999999999999999999', '12', '00012', '-001', '0012.old', '\u0661\u0662\u0663\u0664', '1e04':
        (tmp_path / f'epoch-{name}.logits').write_bytes(b'')
    assert list(epoch_files(cache.path)) == [12]


@pytest.mark.parametrize('rows', [
    '', '"rows": 3', '"rows": {"by": "sample"}',
    '"rows": {"by": "sample", "count": "9", "classes": 2, "dtype": "float16", "topk": null}',
    '"rows": {"by": "sample", "count": 9, "classes": -2, "dtype": "float16", "topk": null}',
    '"rows": {"by": "sample", "count": 9, "classes": 2, "dtype": "int8", "topk": null}',
    '"rows": {"by": "sample", "count": 0, "classes": 2, "dtype": "float16", "topk": null}',
    '"rows": {"by": "file", "count": 9, "classes": 2, "dtype": "float16", "topk": null}',
])
def test_a_key_that_says_nothing_sensible_of_its_rows_is_damaged(tmp_path, rows):
    (tmp_path / 'key.json').write_text(f'{{{rows}}}')
    with pytest.raises(UsageError, match=r'key\.json is damaged'):
        read_rows(tmp_path)


@pytest.mark.parametrize('text', ['', '[]', '{"format": 2', '[' * 100_000, '\x00'])
def test_a_truncated_key_is_damaged(tmp_path, text):
    (tmp_path / 'key.json').write_text(text)
    with pytest.raises(UsageError, match=r'key\.json is damaged: use `rebuild`'):
        folder(tmp_path)
    folder(tmp_path, rebuild=True).close()


def test_the_teachers_validation_is_kept_and_a_damaged_one_counts_as_absent(tmp_path):
    cache = folder(tmp_path)
    assert cache.load_validation('one crop', 3) == {}
    cache.save_validation('one crop', [{'top1': 66.7, 'top5': 90.0}], np.array([1, 2, 3]))
    cache.save_validation('another', [{'top1': 33.3, 'top5': 50.0}], np.array([3, 2, 1]))
    assert cache.load_validation('one crop', 3)['predictions'].tolist() == [1, 2, 3]
    assert cache.load_validation('another', 3)['predictions'].tolist() == [3, 2, 1]
    assert cache.load_validation('one crop', 4) == {}  # of another number of images
    for path in tmp_path.glob('validation-*.npz'):
        path.write_bytes(b'PK damaged')
    assert cache.load_validation('one crop', 3) == {}


def test_a_data_set_is_known_by_its_files_wherever_it_lies(tmp_path, image_folder):
    def fingerprint(root):
        return fingerprint_dataset(create_dataset('', root=str(root), split='train'))

    original = fingerprint(image_folder)
    moved = shutil.copytree(image_folder, tmp_path / 'moved')
    assert fingerprint(moved) == original
    changed = moved / 'train' / '5' / '2.png'
    changed.write_bytes(changed.read_bytes()[::-1])
    assert fingerprint(moved)['contents'] != original['contents']
    assert fingerprint(moved)['sizes'] == original['sizes']
    changed = moved / 'train' / '0' / '0.png'
    changed.write_bytes(changed.read_bytes() + b'0')
    assert fingerprint(moved)['sizes'] != original['sizes']
    changed.rename(moved / 'train' / '0' / 'other.png')
    assert fingerprint(moved)['files'] != original['files']
    (moved / 'train' / '9').rename(moved / 'train' / 'A')
    assert fingerprint(moved)['classes'] != original['classes']


def test_a_tar_of_images_is_known_by_its_content_and_left_closed(tmp_path, image_folder):
    def pack(name):
        with tarfile.open(tmp_path / name, 'w') as tar:
            for path in sorted((tmp_path / 'images' / 'train').rglob('*.png')):
                tar.add(path, path.relative_to(tmp_path / 'images' / 'train'))
        dataset = create_dataset('', root=str(tmp_path / name), split='train')
        return dataset, fingerprint_dataset(dataset)

    shutil.copytree(image_folder, tmp_path / 'images')
    dataset, original = pack('a.tar')
    assert original['count'] == NUM_SAMPLES and pack('b.tar')[1] == original
    assert dataset.reader.tar_state.tf is None  # workers would share its position
    changed = tmp_path / 'images' / 'train' / '5' / '2.png'
    changed.write_bytes(changed.read_bytes()[::-1])
    repacked = pack('c.tar')[1]
    assert repacked['contents'] != original['contents']
    assert {name: repacked[name] for name in ('files', 'targets')} == \
        {name: original[name] for name in ('files', 'targets')}


def test_a_teacher_is_known_by_its_weights(tmp_path):
    weights = tmp_path / 'teacher.pth'
    weights.write_bytes(b'one')
    first = fingerprint_teacher(str(weights))
    assert fingerprint_teacher(str(weights)) == first
    weights.write_bytes(b'two')
    assert fingerprint_teacher(str(weights)) != first
    tagged, other = (fingerprint_teacher(f'resnet34.{tag}') for tag in ('tv_in1k', 'a1_in1k'))
    assert tagged['weights'] != other['weights']
    one, same, two = (fingerprint_teacher(spec) for spec in ('hf-hub:org/one', 'org/one', 'hf-hub:org/two'))
    assert one == same != two


@pytest.fixture(scope='module')
def teacher():
    return Teacher(build(), num_classes=NUM_CLASSES)


def cached(path, loader, teacher=None, by='sample', dtype='float32', topk=None):
    rows = {'by': by, 'count': NUM_SAMPLES, 'classes': NUM_CLASSES, 'dtype': dtype, 'topk': topk}
    counting = None if teacher is None else Counting(teacher)
    return CachedTeacher(CacheFolder(path, {'rows': rows}), loader.batch_sampler, torch.device('cpu'), counting)


class Counting(torch.nn.Module):
    """A teacher that counts the batches it is asked for."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.members, self.calls = teacher, teacher.members, 0

    def forward(self, images):
        self.calls += 1
        return self.teacher(images)


def epoch_logits(loader, source, epoch, start_batch=0, stop_batch=None):
    """What the training loop sees of an epoch, and how many batches were computed for it."""
    loader.batch_sampler.set_epoch(epoch, start_batch)
    before = source.teacher.calls if source.teacher else 0
    logits = []
    for batch, (images, _) in enumerate(loader, start=start_batch):
        if batch == stop_batch:
            break
        logits.append(source(images))
    source.flush()
    return torch.cat(logits), (source.teacher.calls if source.teacher else 0) - before


MIX = dict(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=NUM_CLASSES)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('mode', [None, 'batch', 'elem'])
def test_reading_gives_what_the_live_teacher_says_of_the_same_images(tmp_path, replayable, teacher, workers, mode):
    settings = dict(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.5, re_mode='pixel')
    mixup, by = (FastCollateMixup(mode=mode, **MIX), 'position') if mode else (None, 'sample')
    filling = replayable(mixup=mixup, **settings)
    filled, computed = epoch_logits(filling, cached(tmp_path, filling, teacher, by=by), epoch=1)
    assert computed == NUM_SAMPLES // 8

    reading = replayable(workers=workers, mixup=mixup, **settings)
    reading.batch_sampler.set_epoch(1)
    live = torch.cat([teacher(images) for images, _ in reading])
    read, computed = epoch_logits(reading, cached(tmp_path, reading, by=by), epoch=1)
    assert computed == 0
    assert torch.equal(read, live) and torch.equal(filled, live)


def test_without_mixing_another_batch_size_and_world_size_read_the_same_rows(tmp_path, replayable, teacher):
    filling = replayable(batch_size=8, re_prob=0.5, re_mode='pixel')
    filled, _ = epoch_logits(filling, cached(tmp_path, filling, teacher), epoch=0)
    order = filling.batch_sampler.rows(0, 5)[0]
    for rank in range(2):
        reading = replayable(batch_size=5, world_size=2, rank=rank, re_prob=0.5, re_mode='pixel')
        read, computed = epoch_logits(reading, cached(tmp_path, reading), epoch=0)
        assert computed == 0
        assert reading.batch_sampler.rows(0, 4)[0].tolist() == order[rank::2].tolist()
        assert torch.equal(read, filled[rank::2])


def test_each_rank_fills_its_rows_of_one_epoch(tmp_path, replayable, teacher):
    for rank in range(2):
        filling = replayable(batch_size=4, world_size=2, rank=rank, mixup=FastCollateMixup(**MIX))
        epoch_logits(filling, cached(tmp_path, filling, teacher, by='position'), epoch=0)
    whole = replayable()
    assert cached(tmp_path, whole, by='position').folder.covers(whole.batch_sampler, [0])


def test_an_interrupted_fill_goes_on_where_it_stopped(tmp_path, replayable, teacher):
    filling = replayable()
    before, computed = epoch_logits(filling, cached(tmp_path, filling, teacher, dtype='float16'), 0, stop_batch=3)
    assert computed == 3
    again, computed = epoch_logits(filling, cached(tmp_path, filling, teacher, dtype='float16'), 0)
    assert computed == NUM_SAMPLES // 8 - 3
    assert torch.equal(again[:len(before)], before)  # what was learned from is what is read


def test_a_batch_of_which_a_row_is_absent_is_computed_anew(tmp_path, replayable, teacher):
    loader = replayable()
    whole, _ = epoch_logits(loader, cached(tmp_path, loader, teacher), 0)
    file = EpochFile(tmp_path / 'epoch-0000.logits', NUM_SAMPLES, 4 * NUM_CLASSES, writable=True)
    file.write(np.array([7]), np.zeros((1, 4 * NUM_CLASSES), np.uint8))  # what a read of it would bring
    file.checksums[7] = 0
    file.close()
    again, computed = epoch_logits(loader, cached(tmp_path, loader, teacher), 0)
    assert computed == 1 and torch.equal(again, whole)


def test_copies_arrive_in_the_order_they_were_started():
    copies = HostCopies(torch.device('cpu'))
    for number in range(3):
        copies.start(np.array([number]), torch.full((1, 4), number, dtype=torch.uint8))
    arrived = list(copies.arrived())
    assert [rows.tolist() for rows, _ in arrived] == [[0], [1], [2]]
    assert [data.tolist() for _, data in arrived] == [[[number] * 4] for number in range(3)]
    assert not list(copies.arrived(wait=True))


def test_after_the_distinct_epochs_the_first_comes_again(tmp_path, replayable, teacher):
    loader = replayable(num_epochs=2)
    source = cached(tmp_path, loader, teacher)
    first = [epoch_logits(loader, source, epoch)[0] for epoch in range(2)]
    second = [epoch_logits(loader, source, epoch) for epoch in (2, 3)]
    assert [computed for _, computed in second] == [0, 0]
    assert torch.equal(second[0][0], first[0]) and torch.equal(second[1][0], first[1])
    assert not torch.equal(first[0], first[1])


def test_the_batch_that_is_asked_about_follows_from_the_sampler(tmp_path, replayable, teacher):
    loader = replayable(workers=2, re_prob=0.5, re_mode='pixel')
    source = cached(tmp_path, loader, teacher)
    whole, _ = epoch_logits(loader, source, 0)
    resumed, computed = epoch_logits(loader, source, 0, start_batch=3)
    assert computed == 0 and torch.equal(resumed, whole[3 * 8:])
    epoch_logits(loader, source, 0, stop_batch=2)  # left in the middle
    again, computed = epoch_logits(loader, source, 0)
    assert computed == 0 and torch.equal(again, whole)
    images, _ = next(iter(loader))
    source(images)
    with pytest.raises(RuntimeError, match='Batch 1 has 8 rows, not 7: ask once for each batch'):
        source(images[:7])
    for _ in range(2, len(loader)):
        source(images)
    with pytest.raises(RuntimeError, match='Batch 5 has 0 rows, not 8'):
        source(images)


def test_an_epochs_file_is_complete_on_disk_after_its_last_batch(tmp_path, replayable, teacher):
    loader = replayable()
    source = cached(tmp_path, loader, teacher)
    loader.batch_sampler.set_epoch(0)
    for images, _ in loader:
        source(images)
    assert (tmp_path / 'epoch-0000.logits').read_bytes()[0] == 0  # nothing is unsynced
    assert cached(tmp_path, loader).folder.covers(loader.batch_sampler, [0])


def test_an_error_of_training_is_not_masked_by_the_copies_on_their_way(tmp_path, replayable, teacher):
    class BrokenDevice(torch.nn.Module):
        def synchronize(self):
            raise RuntimeError('CUDA error: the second')

    loader = replayable()
    with pytest.raises(RuntimeError, match='the first'), cached(tmp_path, loader, teacher) as source:
        source(next(iter(loader))[0])
        source._copies._pending.append((BrokenDevice(), np.arange(8), torch.zeros(8, source.layout.row_bytes)))
        raise RuntimeError('CUDA error: the first')
    folder(tmp_path, seed=2, rebuild=True).close()  # the lock is given back


def test_topk_logits_read_are_those_the_filling_run_learned_from(tmp_path, replayable, teacher):
    loader = replayable()
    filled, _ = epoch_logits(loader, cached(tmp_path, loader, teacher, dtype='float16', topk=3), 0)
    read, computed = epoch_logits(loader, cached(tmp_path, loader, dtype='float16', topk=3), 0)
    assert computed == 0 and torch.equal(read, filled)
    assert all(len(set(row.tolist())) <= 4 for row in read)
    assert math.isfinite(read.sum())


def test_a_run_ends_with_the_room_on_its_disk_and_what_it_stored_is_whole(tmp_path, replayable, teacher):
    loader = replayable()
    source = cached(tmp_path, loader, teacher, by='position')
    source.folder.open_epoch(0).close()
    with full_disk(8192 + 20 * 4 * NUM_CLASSES), pytest.raises(CommandError, match='the disk is full'):
        epoch_logits(loader, source, 0)
    file = source.folder.open_epoch(0)
    assert present(file, NUM_SAMPLES) == list(range(16))  # two of five batches
    assert len(file.drop_damaged()) == 0


@pytest.mark.parametrize('members', [
    'resnet34',
    ['resnet34'],
    [{'source': 'resnet34', 'model_name': 'resnet34'}],
], ids=['a name', 'names', 'a member without its size'])
def test_members_that_are_no_teachers_are_refused(tmp_path, members):
    (tmp_path / MEMBERS_FILE).write_text(json.dumps({'members': members}))
    with pytest.raises(UsageError, match='damaged'):
        read_members(tmp_path)


@pytest.mark.parametrize(('predictions', 'metrics', 'counts'), [
    ([1, 2, 3], [{'top1': 50.0, 'top5': 90.0}], True),
    ([[1, 2, 3]], [{'top1': 50.0, 'top5': 90.0}], False),
    ([1, 2, 3], [{'top1': 50.0}], False),
], ids=['whole', 'of another shape', 'without a metric'])
def test_stored_validation_counts_where_it_is_whole(tmp_path, predictions, metrics, counts):
    path = tmp_path / 'validation-0.npz'
    np.savez(path, key='crop', predictions=np.array(predictions), metrics=json.dumps(metrics))
    assert bool(read_validation(path)) is counts
