"""The recipes: each loads, and gives the optimizer, schedule and loss that its paper states."""
import logging
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import yaml
from helpers import TIMM_FLAGS
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_kd.cli import parse_args, resolve_kd

ROOT = Path(__file__).parents[1]
KEYS = {'kd_loss', 'teacher', 'kd_alpha', 'kd_beta', 'kd_gamma', 'kd_correct_prob', 'kd_warmup_epochs'}


class Paper(NamedTuple):
    """What a paper or its official code states.

    Attributes:
        top1: Published top-1 on ImageNet-1k; None where there is none to be had.
        setting: Global batch, learning rate, epochs and drops; None for Swin, on its own schedule.
        loss: Loss, its parameters, teacher, weights of task and distillation loss, warm-up of the latter.
    """
    top1: str | None
    setting: tuple[int, float, int, tuple[int, ...]] | None
    loss: tuple | None


NKD = (256, 0.1, 100, (30, 60, 90))
MDISTILLER = (512, 0.2, 100, (30, 60, 90))
TFKD = (512, 0.2, 90, (30, 60, 80))
R34, R50 = 'resnet34.tv_in1k', 'resnet50.tv_in1k'
TFNKD_LOSS = ('tfnkd', {}, None, 1, 1, 0)
PAPERS = {
    'resnet18_baseline': Paper('69.90', NKD, None),
    'resnet18_r34_nkd': Paper('71.96', NKD, ('nkd', {'temperature': 1, 'gamma': 1.5}, R34, 1, 1, 0)),
    'resnet18_tfnkd': Paper('70.76', NKD, TFNKD_LOSS),
    'resnet18_r34_kd': Paper('71.03', MDISTILLER, ('kd', {'temperature': 1}, R34, 0.5, 0.5, 0)),
    'resnet18_r34_dkd': Paper(
        '71.70', MDISTILLER, ('dkd', {'temperature': 1, 'alpha': 1, 'beta': 0.5}, R34, 1, 1, 1)),
    'resnet18_tfkd': Paper(None, TFKD, ('tfkd', {'temperature': 20, 'correct_prob': 0.99}, None, 0.9, 0.1, 0)),
    'mobilenetv1_baseline': Paper('69.21', NKD, None),
    'mobilenetv1_r50_nkd': Paper('72.58', NKD, ('nkd', {'temperature': 1, 'gamma': 1.5}, R50, 1, 1, 0)),
    'mobilenetv1_tfnkd': Paper('70.04', NKD, TFNKD_LOSS),
    'mobilenetv1_r50_kd': Paper('70.50', MDISTILLER, ('kd', {'temperature': 1}, R50, 0.5, 0.5, 0)),
    'mobilenetv1_r50_dkd': Paper(
        '72.05', MDISTILLER, ('dkd', {'temperature': 1, 'alpha': 1, 'beta': 2}, R50, 1, 1, 1)),
    'swin_tiny_baseline': Paper('81.18', None, None),
    'swin_tiny_tfnkd': Paper('81.48', None, TFNKD_LOSS),
}
CNNS = [name for name, paper in PAPERS.items() if paper.setting is not None]
SWINS = [name for name, paper in PAPERS.items() if paper.setting is None]


def path_of(name):
    return ROOT / 'hparams' / f'{name}.yaml'


@pytest.fixture
def parse(tmp_path):
    return lambda name: parse_args([str(tmp_path), '--config', str(path_of(name))])[0]


def header_of(name) -> dict[str, str]:
    lines = re.match(r'(#.*\n)+', path_of(name).read_text()).group().replace('\n#  ', '')
    return dict(re.findall(r'^# ([A-Z][^:\n]*): (.*)$', lines, re.MULTILINE))


def create_meta_model(args):
    """Create the student without memory for its weights."""
    return timm.create_model(args.model, num_classes=args.num_classes, device='meta')


def create_optimizer(args, model):
    """Create the optimizer as timm's script does."""
    return create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)


def lr_of_epochs(args, updates_per_epoch=10):
    """Return the learning rate at the first update of each epoch, stepped as timm's script does."""
    parameter = torch.nn.Linear(2, 2)
    scheduler, num_epochs = create_scheduler_v2(
        create_optimizer(args, parameter), **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    rates = []
    for epoch in range(num_epochs):
        rates.append(scheduler.optimizer.param_groups[0]['lr'])
        for update in range(1, updates_per_epoch + 1):
            scheduler.step_update(epoch * updates_per_epoch + update)
        scheduler.step(epoch + 1)
    return rates


def test_there_is_one_recipe_for_each_published_result():
    names = {path.stem for path in (ROOT / 'hparams').glob('*.yaml')}
    assert names - {'digits_demo'} == PAPERS.keys()


@pytest.mark.parametrize('name', PAPERS)
def test_all_keys_are_flags_and_but_for_distillation_timms(parse, name, caplog):
    with caplog.at_level(logging.WARNING):
        parse(name)
    assert not caplog.records
    keys = set(yaml.safe_load(path_of(name).read_text()))
    assert keys - {flag['dest'] for flag in TIMM_FLAGS} <= KEYS and 'kd_model_name' not in keys
    assert ('kd_warmup_epochs' in keys) == ('kd_loss' in keys)  # the loss's own would do, but a reader wants to see it


@pytest.mark.parametrize('name', PAPERS)
def test_loss_is_that_of_the_paper(parse, name):
    settings = resolve_kd(parse(name))
    assert PAPERS[name].loss == (settings and (
        settings.loss, settings.loss_parameters, settings.teacher, settings.task_loss_weight,
        settings.distill_loss_weight, settings.warmup_epochs))


@pytest.mark.parametrize('name', PAPERS)
def test_teacher_is_named_with_the_tag_of_its_weights(parse, name):
    teacher = parse(name).teacher
    assert teacher is None or timm.get_pretrained_cfg(teacher).tag == 'tv_in1k'


@pytest.mark.parametrize('name', CNNS)
def test_learning_rate_drops_after_the_epochs_of_the_paper(parse, name):
    _, base, epochs, drops = PAPERS[name].setting
    expected = [base * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)]
    assert lr_of_epochs(parse(name)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('name', SWINS)
def test_learning_rate_warms_up_and_follows_the_cosine(parse, name):
    expected = [1e-6 + (1e-3 - 1e-6) * epoch / 20 for epoch in range(20)]
    expected += [1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * epoch / 300)) for epoch in range(20, 300)]
    assert lr_of_epochs(parse(name)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('name', CNNS)
def test_plain_sgd_decays_all_parameters(parse, name):
    args = parse(name)
    model = create_meta_model(args)
    optimizer = create_optimizer(args, model)
    assert isinstance(optimizer, torch.optim.SGD)
    group, = optimizer.param_groups
    assert len(group['params']) == len(list(model.parameters()))
    assert (group['weight_decay'], group['momentum'], group['nesterov']) == (1e-4, 0.9, False)
    assert args.batch_size == PAPERS[name].setting[0]


@pytest.mark.parametrize('name', SWINS)
def test_swin_decays_matrices_alone(parse, name):
    args = parse(name)
    model = create_meta_model(args)
    optimizer = create_optimizer(args, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and 'relative_position_bias_table' not in parameter_name
        assert decay[id(parameter)] == (0.05 if matrix else 0.0)
    assert args.batch_size == 1024


CROPS_AND_FLIPS = {
    'scale': [0.08, 1.0], 'ratio': [3 / 4, 4 / 3], 'hflip': 0.5, 'vflip': 0.0, 'aa': None, 'color_jitter': 0,
    'reprob': 0, 'mixup': 0, 'cutmix': 0, 'smoothing': 0, 'drop_path': None, 'drop': 0,
}
OF_SWIN = {
    'aa': 'rand-m9-mstd0.5-inc1', 'reprob': 0.25, 'remode': 'pixel', 'mixup': 0.8, 'cutmix': 1.0, 'mixup_prob': 1.0,
    'smoothing': 0.1, 'drop_path': 0.2,
}


@pytest.mark.parametrize('name', PAPERS)
def test_augmentation_and_clipping_are_those_of_the_paper(parse, name):
    clip_grad = 5.0 if name in (*SWINS, 'mobilenetv1_r50_nkd') else None
    stated = {**(OF_SWIN if name in SWINS else CROPS_AND_FLIPS), 'clip_grad': clip_grad}
    args = parse(name)
    assert {dest: getattr(args, dest) for dest in stated} == stated


@pytest.mark.parametrize('name', PAPERS)
def test_images_are_prepared_as_in_the_paper(parse, name):
    args = parse(name)
    config = resolve_data_config(vars(args), model=create_meta_model(args))
    filters = 'bicubic' if name in SWINS else 'bilinear'
    assert config['input_size'] == (3, 224, 224)
    assert config['mean'] == (0.485, 0.456, 0.406)
    assert config['std'] == (0.229, 0.224, 0.225)
    assert config['crop_pct'] == 0.875
    assert config['interpolation'] == args.train_interpolation == filters


@pytest.mark.parametrize('name', PAPERS)
def test_header_states_figure_paper_setting_batch_command_and_difference(parse, name):
    header = header_of(name)
    published, top1 = header['Published top-1 on ImageNet-1k'], PAPERS[name].top1
    assert published.startswith(top1 or 'none available')
    assert top1 is None or 'no run of this project' in published
    assert re.search(r'arXiv \d{4}\.\d{5}', header['Paper'])
    assert header['Setting'].startswith(f'{parse(name).batch_size} images a batch')
    assert header['Global batch size'].startswith(str(parse(name).batch_size))
    assert header['Command'] == f'python train_kd.py /data/imagenet -c hparams/{name}.yaml'
    assert header['Still differs']
