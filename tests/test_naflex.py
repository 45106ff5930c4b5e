"""NaFlex: batches of patches, in their own aspect ratio, of a length that is drawn for each."""
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import timm
import torch
from helpers import BASE, Run, run_on_ranks, run_script
from timm.data import create_dataset, create_naflex_loader
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, random_seed
from torch import nn

from timm_kd.data import create_naflex_train_data
from timm_kd.engine import StepSettings, train_one_epoch
from timm_kd.meters import StepTotals
from timm_kd.train import main

CPU = torch.device('cpu')
KWARGS = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8)
NAFLEX = (
    '--model naflexvit_base_patch16_gap --model-kwargs embed_dim=32 depth=2 num_heads=2 patch_size=8 --img-size 32 '
    '--naflex-loader --naflex-train-seq-lens 4 9 16 --naflex-max-seq-len 16'
)


def small_vit(**kwargs) -> nn.Module:
    return timm.create_model('naflexvit_base_patch16_gap', num_classes=10, img_size=32, **{**KWARGS, **kwargs})


def naflex_loader(digits: Path, split: str = 'train', **options) -> Iterable:
    """timm's loader of a split, as the flags of `NAFLEX` describe it."""
    is_training = split == 'train'
    own = dict(train_seq_lens=[4, 9, 16], is_training=True) if is_training else dict(max_seq_len=16)
    dataset = create_dataset('', root=str(digits), split=split, is_training=is_training)
    return create_naflex_loader(
        dataset, patch_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=0, device=CPU, pin_memory=False, **own,
        **options)


def train_as_timm(loaders: list[Iterable], weigh: Callable[[int], float]) -> float:
    """Train on a batch of every loader in each update, its loss weighed by its size; return the mean loss."""
    random_seed(42, 0)
    model = small_vit()
    optimizer = create_optimizer_v2(model, opt='momentum', lr=0.05, weight_decay=2e-5, momentum=0.9)
    meters = [AverageMeter() for _ in loaders]
    for batches in zip(*loaders, strict=True):
        optimizer.zero_grad()
        for (input, target), meter in zip(batches, meters, strict=True):
            loss = nn.functional.cross_entropy(model(input), target)
            (loss * weigh(len(target))).backward()
            meter.update(loss.item(), len(target))
        optimizer.step()
    return sum(meter.avg for meter in meters) / len(meters)


def test_run_is_timms_loader_model_and_loss_step_for_step(train, digits):
    run = train(f'{NAFLEX} --batch-size 16 --opt momentum --lr 0.05 --smoothing 0 --naflex-loss-scale sqrt')
    loader = naflex_loader(digits, batch_size=16, interpolation='random', scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    sizes = set()

    def weigh(size: int) -> float:
        sizes.add(size)
        return (size / 16) ** 0.5

    assert run.rows[0]['train_loss'] == pytest.approx(train_as_timm([loader], weigh), rel=1e-12)
    assert len(sizes) > 2  # or the scale of the loss was never another than 1
    assert list(run.rows[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    assert run.record['timing'][0]['images'] == 160


def test_validation_is_on_the_longest_validation_sequence(train, digits):
    run = train(f'{NAFLEX} --opt momentum --lr 1e-30')
    random_seed(42, 0)
    model = small_vit().eval()
    loader = naflex_loader(digits, 'validation', batch_size=32, interpolation='bicubic')
    with torch.no_grad():
        outputs = [(model(input), target) for input, target in loader]
    output, target = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    assert len(target) == 100
    assert run.rows[0]['eval_loss'] == pytest.approx(nn.functional.cross_entropy(output, target).item(), rel=1e-5)


def test_patch_sizes_are_drawn_from_the_flags(train):
    run = train(f'{NAFLEX} --model-kwargs embed_dim=32 depth=1 num_heads=2 enable_patch_interpolator=True '
                '--naflex-patch-sizes 8 16 --naflex-patch-size-probs 1 2 --mixup 0.2 --model-ema')
    assert run.rows[0]['train_loss'] < 3


def test_patches_with_channels_first_reach_the_model_as_other_numbers(train):
    losses = {train(f'{NAFLEX} {flag}', name=f'run{len(flag)}').rows[0]['train_loss']
              for flag in ('', '--naflex-patchify-channels-first')}
    assert len(losses) == 2


def test_mixup_ends_at_its_epoch(digits):
    data = create_naflex_train_data(
        create_dataset('', root=str(digits), split='train', is_training=True), patch_size=8, train_seq_lens=[4],
        batch_size=32, mixup=dict(mixup_alpha=1.0, cutmix_alpha=0.0, num_classes=10, mixup_off_epoch=1), num_workers=0,
        device=CPU, pin_memory=False,
    )
    mixed = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        mixed.append(any((target.max(dim=1).values < 1).any().item() for _, target in data.loader))
    assert mixed == [True, False]


def test_run_resumed_after_an_epoch_ends_as_if_it_had_not_stopped(digits, tmp_path):
    flags = f'{NAFLEX} --epochs 3 --mixup 0.4 --drop-path 0.1'
    whole = run_script(flags, digits, tmp_path, 'whole')
    run_script(f'{flags} --stop-epoch 1', digits, tmp_path, 'parts')
    parts = run_script(f'{flags} --resume auto', digits, tmp_path, 'parts')
    assert parts.rows == whole.rows


def test_student_that_cannot_take_patches_is_refused(digits, tmp_path):
    run = run_script('--naflex-loader', digits, tmp_path)
    assert run.exit_code == 2 and '--model test_resnet fails on NaFlex patches of 16x16' in run.error, run.error
    assert 'naflexvit' in run.error and not run.folder.exists()


@pytest.fixture
def naflex_teacher(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    folder = tmp_path / 'naflex-teacher'
    save_for_hf(small_vit(depth=3), folder, model_args={**KWARGS, 'depth': 3, 'img_size': 32}, safe_serialization=True)
    return folder


def test_naflex_teacher_gets_the_patches_of_the_student(train, naflex_teacher):
    run = train(f'{NAFLEX} --teacher local-dir:{naflex_teacher} --mixup 0.2 --naflex-max-seq-len 9')
    assert {'train_kd_loss', 'eval_agreement'} <= set(run.rows[0])
    assert run.record['teacher'][0]['top1'] is not None


@pytest.mark.parametrize('flags, sentence', [
    ('--teacher {plain}', 'does not take NaFlex patches of 8x8'),
    ('--teacher {own} --mean 0.4 --std 0.5', 'NaFlex patches cannot be adapted to a teacher'),
    ('--teacher {own} --model-kwargs embed_dim=32 depth=2 num_heads=2 patch_size=4',
     'does not take NaFlex patches of 4x4'),
])
def test_teacher_that_cannot_take_the_patches_is_refused(flags, sentence, digits, naflex_teacher, tmp_path):
    plain = timm.create_model('test_vit', num_classes=10, img_size=32)
    save_for_hf(plain, tmp_path / 'plain', model_args={'img_size': 32}, safe_serialization=True)
    flags = flags.format(plain=f'local-dir:{tmp_path / "plain"}', own=f'local-dir:{naflex_teacher}')
    run = run_script(f'{NAFLEX} {flags}', digits, tmp_path)
    assert run.exit_code == 2 and sentence in run.error and run.error.count('\n') == 1, run.error
    assert not run.folder.exists()


def uneven_step(path: Path) -> None:
    """Rank 0 takes five of eight rows, rank 1 three; rank 0 saves the weight after the step."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    input, target = rows()
    own = slice(0, 5) if rank == 0 else slice(5, 8)
    task = linear_task().prepare_distributed()
    steps = StepSettings(CPU, prefetched=False, uneven_ranks=2)
    weight = task.get_trainable_module().module.weight
    train_one_epoch(task, [(input[own], target[own])], torch.optim.SGD([weight], lr=1.0), 0, steps, StepTotals(CPU))
    if rank == 0:
        torch.save(weight.detach(), path)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, generator=generator), torch.randint(5, (8,), generator=generator)


def linear_task() -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(nn.Linear(3, 5, bias=False), nn.CrossEntropyLoss(), verbose=False)


def test_each_image_of_uneven_ranks_weighs_the_same(tmp_path):
    run_on_ranks(uneven_step, (tmp_path / 'weight',), tmp_path)
    task = linear_task()
    input, target = rows()
    task(input, target)['loss'].backward()
    expected = task.trainable_module.weight - task.trainable_module.weight.grad
    torch.testing.assert_close(torch.load(tmp_path / 'weight'), expected.detach())


def test_two_processes_train_as_one_that_takes_the_batches_of_both(digits, tmp_path):
    flags = f'{NAFLEX} --no-aug --batch-size 8 --opt momentum --lr 0.05 --smoothing 0'
    argv = [str(digits), *BASE.split(), *flags.split(), '--output', str(tmp_path), '--experiment', 'run']
    run_on_ranks(main, (argv,), tmp_path)
    run = Run(tmp_path / 'run')
    assert run.record['timing'][0]['images'] == 160
    loaders = [
        naflex_loader(
            digits, batch_size=8, no_aug=True, interpolation='bicubic', distributed=True, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert len(loaders[0]) > 3
    assert run.rows[0]['train_loss'] == pytest.approx(train_as_timm(loaders, lambda size: size / 8 / 2), rel=1e-5)
