"""timm's own script beside this one: same flags, same seed, same machine, the same losses and rates (`make soak`).

Runs where the environment variable TIMM_TRAIN names timm's `train.py`, of a checkout that suits the installed timm:
`TIMM_TRAIN=pytorch-image-models/train.py python -m pytest -m soak tests/test_beside_timm.py`.
"""
import importlib.util
import os
import random
import shlex
import sys
from pathlib import Path

import pytest
from helpers import Process, Run, build
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from timm.task.distillation import DistillationTeacher

from timm_kd.process import preserved_random_state
from timm_kd.train import main

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif('TIMM_TRAIN' not in os.environ, reason="TIMM_TRAIN does not name timm's train.py"),
]

PLAIN, NAFLEX, DISTILLED = 24, 6, 12  # flag sets
DEIT = 'deit_tiny_distilled_patch16_224 --model-kwargs depth=2 embed_dim=32 num_heads=2 img_size=32'
NAFLEX_VIT = (
    'naflexvit_base_patch16_gap --model-kwargs embed_dim=32 depth=2 num_heads=2 patch_size=8 img_size=32 '
    '--naflex-loader --naflex-max-seq-len 16'
)


class Draw(random.Random):
    """Draws flags."""

    def maybe(self, share: float, *choices: str) -> str:
        return self.choice(choices) if self.random() < share else ''


def draw_flags(number: int, kind: str = 'plain') -> str:
    """Return flags of a run that timm's script can do, from all its rooms; `kind` may be one that distils."""
    draw = Draw(number)
    model = draw.choice(['test_resnet', 'test_vit', 'test_efficientnet', 'test_convnext', 'test_vit2', 'test_byobnet'])
    model = {'naflex': NAFLEX_VIT, 'token': DEIT}.get(kind, model)
    naflex, teacher = kind == 'naflex', kind not in ('plain', 'naflex')
    fixed_size, batch_norm = 'vit' in model or kind == 'token', model in ('test_resnet', 'test_efficientnet')
    splits = not naflex and draw.random() < (0.4 if teacher else 0.2)
    sizes = not (fixed_size or splits or teacher) and draw.random() < 0.2
    mixes = not splits and draw.random() < 0.5
    second_order = not teacher and draw.random() < 0.06
    workers = draw.choice([0, 0, 2])
    flags = [
        # The public script builds the model for its default size: where this is fixed, the model has to be told.
        f'--model {model} {"--model-kwargs img_size=32" if model in ("test_vit", "test_vit2") else ""}',
        draw.choice([
            '--naflex-train-seq-lens 4 9 16', '--naflex-train-seq-lens 9 25 --naflex-loss-scale sqrt',
            '--naflex-train-seq-lens 4 16 --naflex-loss-scale none --naflex-patchify-channels-first',
        ]) if naflex else '',
        f'--seed {draw.randrange(1000)} --workers {workers} --epochs {draw.choice([2, 3])}',
        draw.maybe(0.2, '--drop-path 0.2', '--drop-path 0.1') if model != 'test_byobnet' else '',
        draw.maybe(0.2, '--drop 0.1'),
        draw.maybe(0.15, '--grad-checkpointing') if not second_order else '',
        draw.maybe(0.15, '--head-init-scale 0.5', '--head-init-bias -2.3'),
        draw.maybe(0.3, '--bn-momentum 0.2', '--bn-eps 1e-4') if model == 'test_efficientnet' else '',
        draw.maybe(0.25, '--channels-last') if not (second_order or naflex) else '',
        draw.maybe(0.25, '--amp --amp-dtype bfloat16', '--model-dtype bfloat16') if not second_order else '',
        # images
        draw.maybe(0.15, '--no-aug') if not splits else '',
        draw.maybe(0.3, '--aa rand-m9-mstd0.5-inc1', '--aa original', '--aa augmix-m3-w2', '--aa v0r'),
        draw.maybe(0.3, '--reprob 0.4', '--reprob 0.3 --remode rand --recount 2', '--reprob 0.5 --remode const'),
        draw.maybe(0.2, '--color-jitter 0.2', '--color-jitter 0.3 --color-jitter-prob 0.5', '--grayscale-prob 0.3'),
        draw.maybe(0.1, '--gaussian-blur-prob 0.3'),
        draw.maybe(0.2, '--scale 0.5 1.0', '--ratio 0.8 1.25', '--train-crop-mode rkrc', '--train-crop-mode rkrr'),
        draw.maybe(0.2, '--hflip 0', '--vflip 0.3'),
        draw.maybe(0.2, '--train-interpolation bilinear', "--train-interpolation ''"),
        draw.maybe(0.2, '--crop-pct 0.8', '--interpolation bilinear'),
        draw.maybe(0.1, '--worker-seeding part'),
        draw.maybe(0.3, '--use-multi-epochs-loader') if workers and not (sizes or naflex) else '',
        # batches
        draw.choice(['--batch-size 32', '--batch-size 24', '-b 32 -vb 20']) if not sizes else '',
        draw.choice([
            '--train-img-sizes 24 32 40 --train-batch-sizes 40 32 16 --variable-batch-loss-scale linear',
            '--train-img-sizes 24 32 --train-size-schedule progressive -b 32',
            '--train-img-sizes 32 40 -b 24 --train-size-probs 0.3 0.7 --train-batches-per-epoch 5',
        ]) if sizes else '',
        draw.choice(['', '', '--img-size 24', '--img-size 40', '--input-size 3 32 48']) if not (
            sizes or fixed_size or teacher) else '',
        draw.maybe(0.3, '--grad-accum-steps 2', '--grad-accum-steps 3') if not second_order else '',
        draw.maybe(0.1, '--tta 2') if not sizes else '',
        draw.choice(['--aug-splits 2', '--aug-splits 3']) + draw.choice(['', ' --jsd-loss', ' --jsd-loss'])
        + draw.maybe(0.4, ' --resplit') + (draw.maybe(0.3, ' --split-bn') if batch_norm else '') if splits else '',
        # targets
        draw.choice(['--mixup 0.8', '--cutmix 1.0', '--mixup 0.4 --cutmix 1.0',
                     '--cutmix 0.5' if naflex else '--cutmix-minmax 0.2 0.8'])
        + draw.choice(['', ' --mixup-mode pair', ' --mixup-mode elem', ' --mixup-prob 0.6 --mixup-switch-prob 0.3'])
        # The script looks for the switch at a NaFlex loader, which has none.
        + (draw.maybe(0.3, ' --mixup-off-epoch 1') if not naflex else '') if mixes else '',
        draw.maybe(0.2, '--no-prefetcher') if not (splits or naflex) else '',
        draw.choice(['--bce-loss', '--bce-loss --bce-sum', '--bce-loss --bce-target-thresh 0.2',
                     '--bce-loss --bce-pos-weight 2']) if not splits and draw.random() < 0.3 else '',
        draw.maybe(0.3, '--smoothing 0', '--smoothing 0.2'),
        # updates
        '--opt adahessian --lr 0.01' if second_order else draw.choice([
            '--opt adamw --lr 1e-3', '--opt sgd --lr 0.02', '--opt momentum --lr 0.05 --momentum 0.8',
            '--opt lamb --lr 3e-3', '--opt lookahead_adamw --lr 1e-3', '--opt rmsproptf --lr 1e-3',
            '--opt lion --lr 1e-4', '--opt adamw', '--opt sgd --lr-base 0.05', '--opt nadamw --lr 1e-3 --opt-eps 1e-6',
            '--opt adamw --lr 1e-3 --opt-betas 0.8 0.95 --weight-decay 0.05', '--opt adan --lr 1e-3',
        ]),
        draw.maybe(0.3, '--clip-grad 0.5', '--clip-grad 0.05 --clip-mode value', '--clip-grad 0.02 --clip-mode agc'),
        draw.maybe(0.2, '--layer-decay 0.7'),
        draw.choice([
            '', '--sched cosine --min-lr 1e-5', '--sched step --decay-epochs 1', '--sched multistep '
            '--decay-milestones 1 2', '--sched poly', '--sched tanh', '--sched plateau --patience-epochs 0',
            '--sched cosine --lr-noise 0.3 0.9', '--sched cosine --lr-cycle-limit 2', '--cooldown-epochs 1',
        ]),
        draw.choice(['--warmup-epochs 0', '--warmup-epochs 1', '--warmup-epochs 1 --warmup-prefix --warmup-lr 1e-4']),
        draw.maybe(0.3, '--model-ema --model-ema-decay 0.9', '--model-ema --model-ema-decay 0.95 --model-ema-warmup',
                   '--model-ema --model-ema-force-cpu'),
        draw.maybe(0.2, '--val-interval 2'),
        draw.maybe(0.1, '--eval-metric loss'),
        draw.maybe(0.1, '--recovery-interval 2'),
    ]
    if 'plateau' not in ' '.join(flags):  # which timm does not step on updates
        flags.append(draw.maybe(0.3, '--sched-on-updates'))
    return ' '.join(flag for flag in flags if flag)


def draw_distillation(number: int) -> str:
    """Return flags of a run that learns from `{teacher}`, in turn by features, by a token and by logits."""
    kind, draw = ('feature', 'token', 'logit')[number % 3], Draw(number)
    weights = draw.maybe(
        0.4, '--task-loss-weight 0.4', '--distill-loss-weight 2', '--task-loss-weight 0.5 --distill-loss-weight 0.5')
    own = {
        'feature': '',
        'token': draw.maybe(0.6, '--kd-token-distill-type hard', '--kd-temperature 2'),
        'logit': draw.maybe(0.5, '--kd-temperature 2'),
    }[kind]
    return f'{draw_flags(number, kind)} --kd-model-name local-dir:{{teacher}} --kd-distill-type {kind} {own} {weights}'


def run_both(script: str, argv: list[str]) -> None:
    """Trains with timm's script, then with this one."""
    # The one difference on purpose: here the teacher's creation draws nothing from the streams of the training.
    create = DistillationTeacher.__init__

    def create_aside(*args, **kwargs):
        with preserved_random_state():
            create(*args, **kwargs)

    DistillationTeacher.__init__ = create_aside
    spec = importlib.util.spec_from_file_location('timm_train', script)
    timm_train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm_train)
    sys.argv = [script, *argv, '--experiment', 'timm']
    timm_train.main()
    DistillationTeacher.__init__ = create
    main([*argv, '--experiment', 'ours'])


@pytest.fixture(scope='module')
def teachers(tmp_path_factory) -> dict[str, Path]:
    """A transformer, in whose forward nothing is folded or laid out anew, normalised as one student and the other."""
    settings = dict(img_size=32, embed_dim=48, num_heads=3)
    folders = {}
    for name, mean, std in (
        ('test', (0.5,) * 3, (0.5,) * 3), ('deit', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ):
        folders[name] = tmp_path_factory.mktemp('teachers') / name
        save_for_hf(
            build('test_vit', seed=5, **settings), folders[name], safe_serialization=True,
            model_config={'model_args': settings}, data_config={'input_size': (3, 32, 32), 'mean': mean, 'std': std})
    return folders


@pytest.mark.parametrize('flags', [
    *(pytest.param(draw_flags(number), id=f'plain-{number}') for number in range(PLAIN)),
    *(pytest.param(draw_flags(number, 'naflex'), id=f'naflex-{number}') for number in range(NAFLEX)),
    *(pytest.param(draw_distillation(number), id=f'distilled-{number}') for number in range(DISTILLED)),
])
def test_losses_and_rates_are_those_of_timms_script(flags, digits, teachers, tmp_path):
    flags = flags.format(teacher=teachers['deit' if 'deit' in flags else 'test'])
    size = '' if '--input-size' in flags or '--img-size' in flags else '--img-size 32'
    argv = shlex.split(f'{digits} --num-classes 10 --device cpu --output {tmp_path} {size} {flags}')
    run = Process(run_both, (os.environ['TIMM_TRAIN'], argv), tmp_path / 'printed', dict(OMP_NUM_THREADS='1'))
    assert run.wait(300) == 0, f'{flags}\n{run.stderr[-3000:]}'
    theirs, ours = (Run(tmp_path / name).rows for name in ('timm', 'ours'))
    assert [row['epoch'] for row in ours] == [row['epoch'] for row in theirs]
    # By logits this project has a loss of its own, in float32 and with another rounding: training makes more of it.
    logits, bfloat16 = '--kd-distill-type logit' in flags, '--model-dtype bfloat16' in flags
    bound = 1e-12 if not logits else 1e-2 if bfloat16 else 1e-3
    for row, expected in zip(ours, theirs, strict=True):
        for name in ('train_loss', 'lr'):
            assert row[name] == pytest.approx(expected[name], rel=bound, abs=1e-12), f'{name}: {flags}'
        # timm's script computes the validation loss in the precision of the model.
        eval_bound = 1e-2 if bfloat16 else max(bound, 1e-5)
        assert row['eval_loss'] == pytest.approx(expected['eval_loss'], rel=eval_bound), flags
