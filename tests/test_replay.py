"""The batches of a replayable loader: the same whenever, wherever and by whomever they are made."""
import random

import numpy as np
import pytest
import torch
from helpers import NUM_CLASSES, NUM_SAMPLES, PER_CLASS
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import MultiEpochsDataLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from timm_kd.cli.messages import in_flags
from timm_kd.data import create_train_data
from timm_kd.errors import UsageError
from timm_kd.replay import BatchKey, ReplayMixup, make_replayable
from timm_kd.replay.batches import ShuffledSampler
from timm_kd.replay.draws import derive_seed, seed_generators, seeds_under
from timm_kd.replay.transforms import ReplayCollateMixup, ReplayDataset, ReplayErasing, Samples


def read(loader, epoch=0, start_batch=0):
    loader.batch_sampler.set_epoch(epoch, start_batch)
    return [(x.clone(), y.clone()) for x, y in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def mixup_of(mode, cls=FastCollateMixup):
    return cls(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.8, mode=mode, num_classes=NUM_CLASSES)


PIPELINES = {
    'jitter, erasing on the device': dict(re_prob=0.6, re_mode='pixel', vflip=0.3, color_jitter=0.4),
    'jitter, erasing on the host': dict(re_prob=0.6, re_mode='rand', use_prefetcher=False),
    'RandAugment, split erasing': dict(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.6, re_mode='rand', re_split=True),
    'AutoAugment, blur, grayscale': dict(auto_augment='original-mstd0.5', gaussian_blur_prob=0.5, grayscale_prob=0.5),
    'AugMix splits': dict(auto_augment='augmix-m5-w4-d2', aug_splits=3, re_prob=0.6, re_mode='pixel', re_split=True),
    'Mixup batch': dict(mixup='batch', re_prob=0.6, re_mode='pixel'),
    'Mixup elem': dict(mixup='elem'),
    'Mixup pair': dict(mixup='pair'),
    'Mixup half': dict(mixup='half', re_prob=0.6, re_mode='pixel'),
    'one set of workers for all epochs': dict(use_multi_epochs_loader=True),
    'resolution schedule': dict(input_size_choices=[16, 24], batch_size_choices=[8, 4]),
    'random crop or pad': dict(train_crop_mode='rkrr'),
    'two crops, Mixup, erasing': dict(num_crops=2, mixup='batch', re_prob=0.6, re_mode='pixel'),
    'four crops, RandAugment': dict(num_crops=4, auto_augment='rand-m9-mstd0.5-inc1', use_prefetcher=False, re_prob=.6),
    'two crops, one set of workers': dict(num_crops=2, use_multi_epochs_loader=True, mixup='elem'),
}


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_batches_do_not_depend_on_workers_their_age_or_the_process_wide_streams(replayable, pipeline):
    settings = dict(PIPELINES[pipeline])
    if 'mixup' in settings:
        settings['mixup'] = mixup_of(settings['mixup'])
    torch.manual_seed(3)
    in_process = replayable(**settings)
    expected = [read(in_process, epoch) for epoch in range(3)]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    with_workers = replayable(workers=2, **settings)

    assert same(read(with_workers, 2), expected[2])  # fresh workers
    assert same(read(with_workers, 1), expected[1])  # the same workers, older
    assert not same(expected[0], expected[1])


@pytest.mark.parametrize('num_crops', [1, 4])
@pytest.mark.parametrize('workers', [0, 2])
def test_resuming_inside_an_epoch_continues_with_the_batches_left(replayable, workers, num_crops):
    settings = dict(mixup=mixup_of('pair'), re_prob=0.6, re_mode='pixel', num_crops=num_crops)
    whole = read(replayable(**settings), epoch=3)
    resumed = replayable(workers=workers, **settings)

    assert same(read(resumed, epoch=3, start_batch=2), whole[2:])
    assert len(resumed) == len(whole) == NUM_SAMPLES // 8
    assert same(read(resumed, epoch=3), whole)


@pytest.mark.parametrize('world_size, batch_size, num_crops', [
    (2, 8, 1), (4, 8, 1), (5, 10, 1), (5, 20, 1), (2, 8, 2), (2, 8, 4), (3, 12, 2),
])
def test_a_global_batch_holds_the_same_samples_and_pixels_for_any_world_size(
        replayable, world_size, batch_size, num_crops,
):
    settings = dict(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.6, re_mode='pixel', num_crops=num_crops)
    whole = read(replayable(batch_size=batch_size, **settings), epoch=1)
    ranks = [
        read(replayable(world_size=world_size, rank=rank, batch_size=batch_size // world_size, **settings), epoch=1)
        for rank in range(world_size)
    ]
    dealt = [
        tuple(
            torch.stack([part.unflatten(0, (-1, num_crops)) for part in parts], dim=1).flatten(0, 2)
            for parts in zip(*batches, strict=True)
        )
        for batches in zip(*ranks, strict=True)
    ]
    assert same(dealt, whole)


def test_ranks_mix_under_different_draws(replayable):
    lam = [
        read(replayable(world_size=2, rank=rank, mixup=mixup_of('elem')), epoch=1)[0][1].amax(1)
        for rank in range(2)
    ]
    assert not torch.equal(*lam)


def test_without_mixup_a_sample_has_the_same_pixels_in_any_batch_size(replayable):
    settings = dict(re_prob=0.6, re_mode='pixel')
    by_four = read(replayable(batch_size=4, **settings))
    by_twenty = read(replayable(batch_size=20, **settings))
    assert torch.equal(torch.cat([x for x, _ in by_four]), torch.cat([x for x, _ in by_twenty]))


def test_copies_of_a_repeated_sample_are_augmented_apart(replayable):
    loaders = [replayable(aug_repeats=3, world_size=3, rank=rank, batch_size=4) for rank in range(3)]
    batches = [read(loader)[0] for loader in loaders]
    indices = [loader.batch_sampler.rows(0)[0] for loader in loaders]
    assert indices[0].tolist() == indices[1].tolist() == indices[2].tolist()
    assert all(
        not torch.equal(batches[a][0][row], batches[b][0][row]) for a, b in [(0, 1), (0, 2), (1, 2)] for row in range(4)
    )


@pytest.mark.parametrize('workers', [0, 2])
def test_loading_draws_nothing_from_the_process_wide_streams(replayable, workers):
    loader = replayable(workers, mixup=mixup_of('batch'), re_prob=0.9, re_mode='pixel', auto_augment='augmix')
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    read(loader)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize('workers', [0, 2])
def test_mixup_turned_off_between_epochs_stops_in_living_workers(replayable, workers):
    loader = replayable(workers, mixup=FastCollateMixup(label_smoothing=0.0, num_classes=NUM_CLASSES))
    mixed = read(loader, epoch=0)
    loader.mixup_enabled = False
    plain = read(loader, epoch=1)
    assert any((y.amax(1) < 1).any() for _, y in mixed)
    assert all((y.amax(1) == 1).all() for _, y in plain)


def test_a_resolution_schedule_goes_through_the_sizes_that_timm_plans(image_folder, replayable):
    settings = dict(input_size_choices=[16, 24], batch_size_choices=[8, 4])
    timms = create_loader(
        create_dataset('', root=str(image_folder), split='train'), (3, 32, 32), 8, is_training=True, num_workers=0,
        device=torch.device('cpu'), **settings,
    )
    replayed = replayable(**settings)
    planned = []
    for epoch in range(3):
        timms.batch_sampler.set_epoch(epoch)
        planned.append([images.shape for images, _ in timms])
        assert [images.shape for images, _ in read(replayed, epoch)] == planned[-1]
    assert planned[0] != planned[1] or planned[1] != planned[2]


def test_rows_name_the_samples_of_a_batch_before_it_is_loaded(replayable):
    loader = replayable(world_size=2, rank=1, batch_size=4)
    loader.batch_sampler.rows(0)  # of another epoch
    loader.batch_sampler.set_epoch(2)
    rows = [loader.batch_sampler.rows(batch) for batch in range(len(loader))]
    for (_, target), (indices, _) in zip(loader, rows, strict=True):
        assert target.tolist() == (indices // PER_CLASS).tolist()
    assert np.concatenate([positions for _, positions in rows]).tolist() == list(range(1, 2 * 4 * len(loader), 2))


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
@pytest.mark.parametrize('splits', [0, 2])
def test_erasing_draws_what_timms_does_under_the_seed_of_each_row(replayable, mode, splits):
    sampler = replayable(world_size=2, rank=1, batch_size=8).batch_sampler
    sampler.set_epoch(3, start_batch=1)
    next(iter(sampler))
    sampler.deliver()
    erasing = RandomErasing(0.6, mode=mode, max_count=3, num_splits=splits, device='cpu')
    images = torch.randn(8 * max(splits, 1), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    erased, expected = ReplayErasing(erasing, sampler)(images.clone()), images.clone()
    for row in range(8 if splits else 0, len(images)):
        seed_generators(derive_seed(1, 3, 3, (8 + row % 8) * 2 + 1, row // 8))
        erasing(expected[row])
    assert torch.equal(erased, expected) and not torch.equal(erased, images)


class Drawing:
    """A data set whose images are their indices, and whose transform draws from the three streams."""

    def __init__(self, length=100):
        self.length = length
        self.decoded = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        index = index[0] if isinstance(index, tuple) else index  # of timm's (index, choice)
        self.decoded.append(index)
        return self.transform(index) if self.transform else index, index % NUM_CLASSES

    @staticmethod
    def transform(image):
        return image, random.random(), np.random.random(), torch.rand(()).item()


@pytest.mark.parametrize('repeats', [1, 3])
def test_a_sample_is_drawn_under_the_seed_of_its_epoch_index_and_repeat(repeats):
    key = BatchKey(epoch=4, first=6, stride=2, samples=[7, (9, 1), 7], mixup_enabled=False)
    drawn = ReplayDataset(Drawing(), seed=42, num_repeats=repeats).__getitems__(key)
    for row, (index, sample) in enumerate(zip([7, 9, 7], drawn, strict=True)):
        seed_generators(derive_seed(42, 1, 4, index, (6 + 2 * row) % repeats))
        assert sample == Drawing()[index]


@pytest.mark.parametrize('num_repeats, copies', [(None, 1), (3, 3), (2.5, 3)])
def test_order_and_repeats_of_a_loader_are_those_that_stored_epochs_were_made_under(num_repeats, copies):
    data, order = Drawing(), torch.Generator()
    sampler = num_repeats and RepeatAugSampler(data, 1, 0, num_repeats=num_repeats, selected_round=0)
    loader = DataLoader(data, 8, sampler=sampler, shuffle=not sampler, collate_fn=list, drop_last=True)
    loader = make_replayable(loader, seed=42)
    for epoch in (0, 3):
        if epoch:  # the first is that of a new loader
            loader.batch_sampler.set_epoch(epoch)
        shuffled = torch.randperm(100, generator=order.manual_seed(derive_seed(42, 0, epoch) >> 1))
        for number, drawn in enumerate(loader):
            indices = loader.batch_sampler.rows(number)[0].tolist()
            for row, (index, sample) in enumerate(zip(indices, drawn, strict=True), start=8 * number):
                assert sampler or index == shuffled[row]
                seed_generators(derive_seed(42, 1, epoch, index, row % copies))
                assert sample == data[index]


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('world_size', [1, 2])
def test_what_the_last_batch_lacks_is_dropped_where_the_loader_drops_it(drop_last, world_size):
    data = range(11)
    sampler = DistributedSampler(data, world_size, 0, drop_last=drop_last) if world_size > 1 else None
    loader = make_replayable(DataLoader(data, 3, sampler=sampler, shuffle=not sampler, drop_last=drop_last), seed=1)
    # 11 samples for one rank; of two, each has 5, or 6 with one sample that comes twice.
    sizes = {(1, False): [3, 3, 3, 2], (1, True): [3, 3, 3], (2, False): [3, 3], (2, True): [3]}[world_size, drop_last]
    assert [len(batch) for batch in loader] == sizes and len(loader) == len(sizes)


@pytest.mark.parametrize('kind, persistent', [
    (DataLoader, False), (DataLoader, True), (MultiEpochsDataLoader, False),
])
def test_workers_are_those_that_the_loader_asked_for(kind, persistent):
    asked = dict(num_workers=1, pin_memory=True, timeout=7.0, worker_init_fn=seed_generators, prefetch_factor=3)
    loader = kind(range(8), 2, shuffle=True, multiprocessing_context='spawn', persistent_workers=persistent, **asked)
    replayed = make_replayable(loader, seed=1)
    assert {name: getattr(replayed, name) for name in asked} == asked
    assert replayed.multiprocessing_context.get_start_method() == 'spawn'
    assert replayed.persistent_workers == (persistent or kind is MultiEpochsDataLoader)


@pytest.mark.parametrize('workers', [0, 2])
def test_mixup_draws_what_timms_does_under_the_seed_of_the_batch(replayable, workers):
    loader = replayable(workers, use_prefetcher=False)
    loader.batch_sampler.set_epoch(3)
    mixup = mixup_of('elem', Mixup)
    for number, (images, target) in enumerate(loader):
        mixed = ReplayMixup(mixup, loader.batch_sampler)(images.clone(), target)
        seed_generators(derive_seed(1, 2, 3, 8 * number))
        assert same([mixed], [mixup(images, target)])


@pytest.mark.parametrize('epoch, first', [(3, 0), (3, 16), (4, 16)])
def test_mixing_in_the_collation_draws_what_timms_does_under_the_seed_of_the_batch(epoch, first):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    batch = Samples(BatchKey(epoch, first, stride=1, samples=list(range(8)), mixup_enabled=True))
    batch.extend(zip(pixels, [0, 1, 2, 3] * 2, strict=True))
    mixed = ReplayCollateMixup(mixup_of('elem'), seed=1)(batch)
    seed_generators(derive_seed(1, 2, epoch, first))
    assert same([mixed], [mixup_of('elem')(list(batch))])


def test_seeds_are_the_same_on_every_machine_and_in_every_version():
    assert derive_seed(42, 1, 2, 3, 4) == seeds_under(42, 1, 2)(3, 4) == 7672673772148980576
    assert derive_seed(2 ** 62, -1) == 14473065819198696368


def test_an_iterable_data_set_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(UsageError) as refused:
        create_train_data(
            Stream(), replay_seed=0, batch_size=2, input_size=(3, 8, 8), use_prefetcher=False, num_workers=0)
    assert in_flags(str(refused.value)).startswith(
        '--replayable-data: replayable data needs samples with an index; Stream is iterable')


@pytest.mark.parametrize('length, world_size', [(10, 1), (10, 3), (2, 5)])
@pytest.mark.parametrize('drop_last', [False, True])
def test_the_order_is_that_of_torchs_distributed_sampler(length, world_size, drop_last):
    for rank in range(world_size):
        ours, theirs = (
            sampler(range(length), world_size, rank, drop_last=drop_last)
            for sampler in (ShuffledSampler, DistributedSampler)
        )
        ours.set_epoch(7)
        theirs.set_epoch(7)
        assert list(ours) == list(theirs) == ours.order().tolist()


def test_streams_start_where_those_of_stored_epochs_and_checkpoints_did():
    seed, expected = 0xfedc_ba98_7654_3210, torch.Generator().manual_seed(0x7f6e_5d4c_3b2a_1908)
    generator = torch.Generator()
    seed_generators(seed, generator)
    assert random.random() == random.Random(seed).random()
    assert np.random.rand() == np.random.RandomState(0x7654_3210).rand()
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=expected))


# several crops of an image


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('num_crops', [2, 4])
@pytest.mark.parametrize('settings', [
    dict(),
    dict(auto_augment='rand-m9-mstd0.5-inc1', vflip=0.3),
    dict(auto_augment='augmix-m5-w4-d2', grayscale_prob=0.5),
    dict(auto_augment='original-mstd0.5', gaussian_blur_prob=0.5),
    dict(train_crop_mode='rkrc', scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0, color_jitter=None),
    dict(train_crop_mode='rkrr', use_prefetcher=False, re_prob=0.6, re_mode='pixel', color_jitter=0.4),
], ids=str)
def test_crops_are_to_the_bit_those_of_decoding_the_image_for_each(replayable, settings, num_crops, workers):
    loader = replayable(workers, num_crops=num_crops, **settings)
    plain = replayable(**settings)
    dataset = getattr(plain, 'loader', plain).dataset.dataset
    for epoch in (0, 3):
        loader.batch_sampler.set_epoch(epoch)
        for number, (images, target) in enumerate(getattr(loader, 'loader', loader)):
            indices = loader.batch_sampler.rows(number)[0].tolist()
            for row, index in enumerate(indices):
                seed_generators(derive_seed(1, 1, epoch, index, row % num_crops))
                pixels, label = dataset[index]
                assert torch.equal(images[row], torch.as_tensor(pixels)) and target[row] == label


@pytest.mark.parametrize('num_crops, batch_size, world_size', [(2, 8, 1), (4, 8, 1), (3, 6, 1), (2, 4, 3), (8, 8, 1)])
def test_in_as_many_epochs_each_image_is_seen_in_one_with_all_its_crops_side_by_side(
        num_crops, batch_size, world_size,
):
    once, samplers = 101 // (batch_size * world_size), []
    for rank in range(world_size):
        sampler = DistributedSampler(Drawing(101), world_size, rank)
        loader = DataLoader(Drawing(101), batch_size, sampler=sampler, drop_last=True)
        samplers.append(make_replayable(loader, seed=1, num_crops=num_crops).batch_sampler)
    orders = []
    for first in (0, num_crops):
        seen = []
        for epoch in range(first, first + num_crops):
            for sampler in samplers:
                sampler.set_epoch(epoch)
                batches = [key.samples for key in sampler]
                assert len(batches) == len(sampler) == once and {len(batch) for batch in batches} == {batch_size}
                for batch in batches:
                    groups = [batch[row:row + num_crops] for row in range(0, batch_size, num_crops)]
                    assert all(group == group[:1] * num_crops for group in groups)
                    seen += [group[0] for group in groups]
        # What does not fill the last global batch of an epoch is dropped, as without crops: 101 - once * B of 101.
        assert len(seen) == len(set(seen)) == once * batch_size * world_size
        orders.append(seen)
    assert orders[0] != orders[1] and set(orders[0]) != set(orders[1])


def test_an_image_is_decoded_once_for_crops_drawn_under_seed_epoch_index_and_number():
    data = Drawing(50)
    key = BatchKey(epoch=4, first=6, stride=2, samples=[7] * 3 + [9] * 3, mixup_enabled=False, num_crops=3)
    drawn = ReplayDataset(data, seed=42, num_crops=3).__getitems__(key)
    assert data.decoded == [7, 9]
    for row, sample in enumerate(drawn):
        index = key.samples[row]
        seed_generators(derive_seed(42, 1, 4, index, row % 3))
        assert sample == (Drawing.transform(index), index % NUM_CLASSES)


def test_what_a_loader_keeps_is_filled_up_to_equal_epochs_with_the_first_images_again():
    sampler = make_replayable(DataLoader(Drawing(11), 6, shuffle=True), seed=1, num_crops=3).batch_sampler
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = [key.samples for key in sampler]
        assert [len(batch) for batch in batches] == [6, 6]  # of 11 images without crops: 6 and 5
        seen += [index for batch in batches for index in batch[::3]]
    assert set(seen) == set(range(11)) and seen[11:] == seen[:1]


@pytest.mark.parametrize('mode', ['batch', 'elem', 'pair'])
@pytest.mark.parametrize('batch_size, num_crops', [(8, 4), (8, 2), (12, 3), (4, 4)])
def test_mixup_mixes_the_batch_as_timm_does_and_no_siblings_but_where_there_is_one_image(mode, batch_size, num_crops):
    class OwnClasses(Drawing):
        """A class for each image, so that a mixed target shows of which images it is."""
        transform = staticmethod(lambda index: torch.zeros(3, 2, 2))

        def __getitem__(self, index):
            return super().__getitem__(index)[0], index

    mixup = FastCollateMixup(mixup_alpha=1.0, prob=1.0, mode=mode, label_smoothing=0.0, num_classes=48)
    loader = DataLoader(OwnClasses(48), batch_size, shuffle=True, collate_fn=mixup, drop_last=True)
    loader = make_replayable(loader, seed=1, num_crops=num_crops)
    for number, (_, target) in enumerate(loader):
        images = loader.batch_sampler.rows(number)[0].tolist()
        for row, (own, other) in enumerate(zip(images, reversed(images), strict=True)):
            assert set(target[row].nonzero().flatten().tolist()) == {own, other}
            assert (own != other) == (batch_size > num_crops)


@pytest.mark.parametrize('settings, reason', [
    (dict(batch_size=6), 'batch size, 6'),
    (dict(aug_repeats=3, world_size=3), 'RepeatAugSampler'),
    (dict(aug_splits=2, auto_augment='augmix-m5'), 'AugMixDataset'),
    (dict(input_size_choices=[16, 24], batch_size_choices=[8, 4]), 'ScheduledBatchSampler'),
])
def test_crops_are_refused_where_a_batch_would_not_hold_whole_images(replayable, settings, reason):
    with pytest.raises(ValueError, match=f'num_crops 4.*{reason}'):
        replayable(num_crops=4, **settings)


@pytest.mark.parametrize('world_size', [1, 2])
def test_positions_number_the_crops_of_an_epoch_over_all_ranks(replayable, world_size):
    found = []
    for rank in range(world_size):
        sampler = replayable(world_size=world_size, rank=rank, batch_size=4, num_crops=2).batch_sampler
        sampler.set_epoch(3)
        positions = [key.position(row) for key in sampler for row in range(4)]
        assert sampler.rows(0, len(sampler))[1].tolist() == positions
        found += zip(positions, sampler.rows(0, len(sampler))[0].tolist(), strict=True)
    assert sorted(position for position, _ in found) == list(range(len(found)))
    # Whatever the world size and batch size, a position is the same crop of the same image.
    expected = replayable(num_crops=2).batch_sampler
    expected.set_epoch(3)
    assert [index for _, index in sorted(found)] == expected.rows(0, len(expected))[0].tolist()[:len(found)]
