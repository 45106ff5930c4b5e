"""A run without distillation trains as timm's parts do in the plainest loop: every number agrees bit for bit.

The loop stands here, knows nothing of timm_kd, and trains in the same process: both sides meet the same processor,
torch and threads, whichever these are.
"""
import math
from collections import defaultdict
from itertools import islice

import pytest
import torch
from timm import create_model
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.layers import convert_splitbn_model
from timm.loss import (
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationEvaluator, ClassificationTask
from timm.utils import AverageMeter, dispatch_clip_grad, random_seed

CPU = torch.device('cpu')
MIXING = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7, label_smoothing=0.1, num_classes=10)
MIXING_FLAGS = '--mixup 0.8 --cutmix 1.0 --mixup-prob 0.7'


def train_reference(
        data, make_task=ClassificationTask, *, epochs=3, workers=0, splits=0, split_bn=False,
        mixing=None, mixup_off=None, prefetcher=True, model_args=(), criterion=None, ema=None, layer_decay=None,
        opt='adamw', lr=3e-3, accumulate=1, clip=None, bfloat16=False, scale_power=0, schedule=(), metric='top1',
        **loading,
):
    """Train a task of timm on the digits; return the rows of summary.csv, and the task."""
    random_seed(42, 0)
    model = create_model(**{'model_name': 'test_resnet', 'num_classes': 10, **dict(model_args)})
    config = resolve_data_config({'img_size': 32}, model=model)
    if split_bn:
        model = convert_splitbn_model(model, splits)
    common = dict(
        batch_size=32, input_size=config['input_size'], mean=config['mean'], std=config['std'], device=CPU,
        use_prefetcher=prefetcher, num_workers=workers)
    dataset = create_dataset('', data, 'train', is_training=True)
    loader = create_loader(
        AugMixDataset(dataset, num_splits=splits) if splits else dataset, is_training=True, interpolation='random',
        num_aug_splits=splits, collate_fn=FastCollateMixup(**mixing) if mixing and prefetcher else None,
        **common, **loading)
    mixer = Mixup(**mixing) if mixing and not prefetcher else None
    eval_loader = create_loader(
        create_dataset('', data, 'validation', is_training=False), interpolation=config['interpolation'],
        crop_pct=config['crop_pct'], **common)
    if lr is None:  # 0.1 for 256 images an update, in proportion to their number or, for AdamW, to its root
        lr = 0.1 * (loader.batch_sampler.average_batch_size * accumulate / 256) ** (0.5 if opt == 'adamw' else 1)
    task = make_task(model, criterion=criterion or LabelSmoothingCrossEntropy(0.1))
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt, lr=lr, weight_decay=2e-5, momentum=0.9, layer_decay=layer_decay)
    updates = math.ceil(len(loader) / accumulate)
    scheduler, _ = create_scheduler_v2(optimizer, **{'num_epochs': epochs, **dict(schedule)}, updates_per_epoch=updates)
    if ema:
        task.setup_ema(**ema)
    rows = []
    for epoch in range(epochs):
        if hasattr(loader.batch_sampler, 'set_epoch'):
            loader.batch_sampler.set_epoch(epoch)
        if epoch == mixup_off:
            (mixer or loader).mixup_enabled = False
        task.train()
        meters, batches, done = defaultdict(AverageMeter), iter(loader), epoch * updates
        for _ in range(updates):
            group = list(islice(batches, accumulate))
            for images, target in group:
                if mixer:
                    images, target = mixer(images, target)
                with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
                    result = task(images, target)
                    loss = result['loss'] / len(group)
                scale = (len(images) / loader.batch_sampler.average_batch_size) ** scale_power if scale_power else 1.0
                (loss * scale).backward(create_graph=opt == 'adahessian')
                scalars = {name: value.item() for name, value in result.items() if name != 'output'}
                for name, value in {**scalars, 'loss': loss.item() * len(group)}.items():
                    meters[f'train_{name}'].update(value, len(images))
            if clip:
                parameters = list(model.parameters())
                dispatch_clip_grad(parameters[:-2] if clip[1] == 'agc' else parameters, *clip)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            task.update_ema(step=done)
            scheduler.step_update(done)
        if hasattr(optimizer, 'sync_lookahead'):
            optimizer.sync_lookahead()
        evaluator = ClassificationEvaluator(CPU)
        for averaged in () if metric is None else (False, True) if ema else (False,):
            evaluated = task.get_eval_model(ema=averaged).eval()
            evaluator.reset()
            for images, target in eval_loader:
                with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
                    evaluator.update(evaluated(images), target)
        rates = [group['lr'] for group in optimizer.param_groups]
        metrics = {} if metric is None else evaluator.compute()
        averages = {name: meter.avg for name, meter in meters.items()}
        rows.append({'epoch': epoch, **averages, 'lr': sum(rates) / len(rates),
                     **{f'eval_{name}': value for name, value in metrics.items()}})
        scheduler.step(epoch + 1, metrics.get(metric, averages['train_loss']))
    return rows, task


def flatten(state):
    return {f'{part}.{name}': value for part, inner in state.items() for name, value in (
        inner.items() if isinstance(inner, dict) else [('', inner)])}


def assert_saved(checkpoint, task):
    """Fail unless a checkpoint has the weights of a task, their average and what else it trains, bit for bit."""
    expected = task.get_checkpoint_state() | task.get_checkpoint_state(ema=True)
    assert {part for part in checkpoint if part.startswith(('state_dict', 'task_state'))} == expected.keys()
    for part, state in expected.items():
        state, saved = flatten(state), flatten(checkpoint[part])
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], value) for name, value in state.items()), part


@pytest.mark.parametrize('flags, settings', [
    pytest.param('--grad-accum-steps 2 --clip-grad 0.5', dict(accumulate=2, clip=(0.5, 'norm')), id='accumulation'),
    pytest.param(
        f'{MIXING_FLAGS} --mixup-off-epoch 1',
        dict(mixing=MIXING, mixup_off=1, criterion=SoftTargetCrossEntropy()), id='mixup'),
    pytest.param(
        f'{MIXING_FLAGS} --mixup-mode elem --mixup-off-epoch 2 --no-prefetcher --bce-loss',
        dict(mixing={**MIXING, 'mode': 'elem'}, mixup_off=2, prefetcher=False, criterion=BinaryCrossEntropy()),
        id='mixup in the loop'),
    pytest.param(
        '--model-ema --model-ema-decay 0.98 --model-ema-warmup --drop-path 0.2',
        dict(ema=dict(decay=0.98, use_warmup=True), model_args=dict(drop_path_rate=0.2)), id='ema'),
    pytest.param(
        '--sched-on-updates --warmup-epochs 1 --warmup-lr 1e-5 --grad-accum-steps 2 --min-lr 1e-4',
        dict(accumulate=2, schedule=dict(step_on_epochs=False, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-4)),
        id='schedule on updates'),
    pytest.param(
        '--amp --amp-dtype bfloat16 --model-ema --model-ema-decay 0.9', dict(bfloat16=True, ema=dict(decay=0.9)),
        id='amp'),
    pytest.param(
        '--train-img-sizes 24 32 48 --train-batch-sizes 40 32 16 --variable-batch-loss-scale linear --opt sgd --lr 0',
        dict(
            input_size_choices=[24, 32, 48], batch_size_choices=[40, 32, 16], batch_choice_seed=42, scale_power=1,
            opt='sgd', lr=None), id='image sizes'),
    pytest.param(
        '--train-img-sizes 24 32 --train-batch-sizes 40 24 --train-size-schedule progressive '
        '--variable-batch-loss-scale sqrt --lr 0 --grad-accum-steps 2',
        dict(
            input_size_choices=[24, 32], batch_size_choices=[40, 24], batch_choice_seed=42,
            batch_choice_schedule='progressive', batch_schedule_epochs=3, scale_power=0.5, lr=None, accumulate=2),
        id='image sizes in turn'),
    pytest.param(
        '--aug-splits 3 --jsd-loss --split-bn --aa rand-m9-mstd0.5-inc1 --resplit --reprob 0.3',
        dict(
            splits=3, split_bn=True, criterion=JsdCrossEntropy(num_splits=3, smoothing=0.1), re_split=True,
            auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.3, re_mode='pixel'), id='augmentation splits'),
    pytest.param(
        '--sched plateau --patience-epochs 0 --decay-rate 0.5 --opt momentum --lr 0.4',
        dict(
            opt='momentum', lr=0.4,
            schedule=dict(sched='plateau', patience_epochs=0, decay_rate=0.5, plateau_mode='max')), id='plateau'),
    pytest.param(
        '--sched plateau --patience-epochs 0 --decay-rate 0.5 --eval-metric loss',
        dict(schedule=dict(sched='plateau', patience_epochs=0, decay_rate=0.5, plateau_mode='min'), metric='loss'),
        id='plateau of the validation loss'),
    pytest.param(
        "--sched plateau --patience-epochs 0 --decay-rate 0.5 --val-split ''",
        dict(schedule=dict(sched='plateau', patience_epochs=0, decay_rate=0.5, plateau_mode='min'), metric=None),
        id='plateau of the training loss'),
    pytest.param(
        '--epochs 6 --stop-epoch 3 --layer-decay 0.5 --bce-loss --bce-target-thresh 0.2 --bce-sum --bce-pos-weight 2',
        dict(
            schedule=dict(num_epochs=6), layer_decay=0.5,
            criterion=BinaryCrossEntropy(0.1, target_threshold=0.2, sum_classes=True, pos_weight=2.0)),
        id='layer decay'),
    pytest.param(
        f'{MIXING_FLAGS} --loss poly --poly-epsilon -1',
        dict(mixing=MIXING, criterion=PolyCrossEntropy(epsilon=-1.0)), id='poly'),
    pytest.param(
        '--loss asl --asl-gamma-pos 0.5 --asl-gamma-neg 2',
        dict(criterion=AsymmetricLossSingleLabel(gamma_pos=0.5, gamma_neg=2.0, eps=0.1)), id='asl'),
    pytest.param(
        '--loss bce --loss-class-weight 1,2,3,4,5,6,7,8,9,10 --loss-pos-weight 3 --smoothing 0',
        dict(criterion=BinaryCrossEntropy(
            0.0, weight=torch.arange(1.0, 11.0), pos_weight=torch.tensor(3.0))), id='weighted bce'),
    pytest.param(
        '--opt lookahead_adamw --clip-grad 0.02 --clip-mode agc', dict(opt='lookahead_adamw', clip=(0.02, 'agc')),
        id='lookahead'),
    pytest.param('--opt adahessian', dict(opt='adahessian'), id='second order'),
    pytest.param('--workers 2 --reprob 0.4', dict(workers=2, re_prob=0.4, re_mode='pixel'), id='workers'),
])
def test_run_agrees_with_a_plain_loop_of_timms_parts_bit_for_bit(flags, settings, train, digits):
    run = train(f'--epochs 3 {flags}')
    rows, task = train_reference(digits, **settings)
    assert run.rows == rows
    assert_saved(run.checkpoint(), task)
