"""The distillation flags: what they resolve to, and what they imply."""
import shlex

import pytest

from timm_kd.cli import parse_args, resolve_kd
from timm_kd.losses import KD_LOSSES, create_kd_loss


def parse(tmp_path, *argv):
    return parse_args([str(tmp_path), *argv])[0]


def weights(task, distill):
    return {'task_loss_weight': task, 'distill_loss_weight': distill}


def test_nothing_named_is_plain_training(tmp_path):
    assert resolve_kd(parse(tmp_path)) is None


@pytest.mark.parametrize('flags, settings', [
    # the loss and the teacher
    ('--teacher resnet34', {'loss': 'kd', 'teacher': 'resnet34', 'teacher_dtype': 'auto'}),
    ('--teacher resnet34 --teacher resnet50', {'teacher': ['resnet34', 'resnet50']}),
    ('--kd-loss tfkd', {'loss': 'tfkd', 'teacher': None}),
    ('--kd-loss tfkd --teacher resnet18', {'loss': 'tfkd', 'teacher': 'resnet18'}),
    ('--kd-model-name resnet34 --kd-loss nkd', {'loss': 'nkd', 'teacher': 'resnet34'}),
    # the precision of timm's script, for its own flag
    ('--kd-model-name resnet34', {'loss': 'kd', 'teacher': 'resnet34', 'teacher_dtype': 'float32'}),
    ('--kd-model-name resnet34 --amp', {'teacher_dtype': 'amp'}),
    ('--kd-model-name resnet34 --model-dtype bfloat16', {'teacher_dtype': 'bfloat16'}),
    ('--kd-model-name resnet34 --amp --teacher-dtype float16', {'teacher_dtype': 'float16'}),
    ('--kd-model-name resnet34 --teacher resnet34 --amp', {'teacher_dtype': 'auto'}),
    # weights: unset, those of the loss; else by timm's rule
    ('--kd-loss kd --teacher resnet34', weights(1.0, 1.0)),
    ('--kd-loss dkd --teacher resnet34', weights(1.0, 1.0)),
    ('--kd-loss nkd --teacher resnet34', weights(1.0, 1.0)),
    ('--kd-loss tfnkd', weights(1.0, 1.0)),
    ('--kd-loss tfkd', weights(0.9, 0.1)),
    ('--kd-loss tfkd --distill-loss-weight 3', weights(1.0, 3.0)),
    ('--kd-loss tfkd --task-loss-weight 0.25', weights(0.25, 0.75)),
    ('--kd-loss tfkd --task-loss-weight 0.25 --distill-loss-weight 3', weights(0.25, 3.0)),
    # warm-up: unset, that of the loss; else what is given, 0 too
    ('--kd-loss dkd --teacher resnet34 --epochs 240', {'warmup_epochs': 20}),
    ('--kd-loss dkd --teacher resnet34 --epochs 100', {'warmup_epochs': 8}),
    ('--kd-loss dkd --teacher resnet34 --epochs 15', {'warmup_epochs': 1}),
    ('--kd-loss dkd --teacher resnet34 --epochs 1', {'warmup_epochs': 1}),
    ('--kd-loss kd --teacher resnet34 --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss nkd --teacher resnet34 --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss tfnkd --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss tfkd --epochs 240', {'warmup_epochs': 0}),
    ('--kd-loss dkd --teacher resnet34 --epochs 240 --kd-warmup-epochs 0', {'warmup_epochs': 0}),
    ('--kd-loss dkd --teacher resnet34 --epochs 240 --kd-warmup-epochs 3', {'warmup_epochs': 3}),
    # parameters: those given alone, 0 too
    ('--kd-loss dkd --teacher resnet34 --kd-beta 2 --kd-temperature 1 --kd-logit-std',
     {'loss_parameters': {'beta': 2.0, 'temperature': 1.0, 'logit_std': True}}),
    ('--kd-loss nkd --teacher resnet34 --kd-gamma 0', {'loss_parameters': {'gamma': 0.0}}),
])
def test_flags_resolve_to_a_distillation(tmp_path, flags, settings):
    resolved = resolve_kd(parse(tmp_path, *shlex.split(flags)))
    assert {name: getattr(resolved, name) for name in settings} == settings


def test_args_of_a_plain_run_before_the_warmup_could_be_unset_are_read_again(tmp_path):
    (tmp_path / 'args.yaml').write_text('kd_warmup_epochs: 0\n')
    assert resolve_kd(parse(tmp_path, '-c', str(tmp_path / 'args.yaml'))) is None


@pytest.mark.parametrize('loss', [name for name, loss in KD_LOSSES.items() if 'temperature' in loss.hyper_parameters()])
def test_temperature_may_sharpen(tmp_path, loss):
    settings = resolve_kd(parse(tmp_path, '--kd-loss', loss, '--teacher', 'resnet34', '--kd-temperature', '0.25'))
    assert create_kd_loss(loss, **settings.loss_parameters).temperature == 0.25


def test_teacher_cache_implies_replayable_data(tmp_path):
    args = parse(tmp_path, '--teacher', 'resnet34', '--teacher-cache', str(tmp_path / 'logits'))
    assert args.replayable_data


def test_several_crops_of_an_image_imply_replayable_data(tmp_path):
    assert not parse(tmp_path, '--crops-per-image', '1').replayable_data
    # An image alone in its batch is mixed with itself; an even number of images never is.
    for flags in ('--crops-per-image 4', '--crops-per-image 8 -b 8 --mixup 1', '--crops-per-image 4 -b 24 --cutmix 1'):
        assert parse(tmp_path, *flags.split()).replayable_data


def test_teacher_model_goes_with_a_file(tmp_path):
    weights = tmp_path / 'teacher.pth'
    weights.touch()
    assert parse(tmp_path, '--teacher', str(weights), '--teacher-model', 'resnet34', '--teacher-ema').teacher_ema
