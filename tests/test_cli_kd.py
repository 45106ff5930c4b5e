"""The distillation flags: what they resolve to, and which of them do not go together."""
import pytest

from timm_kd.cli import parse_args, resolve_kd
from timm_kd.losses import KD_LOSSES, create_kd_loss


def parse(tmp_path, *argv):
    return parse_args([str(tmp_path), *argv])[0]


def test_nothing_named_is_plain_training(tmp_path):
    assert resolve_kd(parse(tmp_path)) is None


def test_teacher_alone_means_kd(tmp_path):
    settings = resolve_kd(parse(tmp_path, '--teacher', 'resnet34'))
    assert (settings.loss, settings.teacher, settings.teacher_dtype) == ('kd', 'resnet34', 'auto')


def test_several_teachers_are_a_list(tmp_path):
    args = parse(tmp_path, '--teacher', 'resnet34', '--teacher', 'resnet50')
    assert args.teacher == ['resnet34', 'resnet50']
    assert resolve_kd(args).teacher == ['resnet34', 'resnet50']


@pytest.mark.parametrize('loss, weights', [
    ('kd', (1.0, 1.0)), ('dkd', (1.0, 1.0)), ('nkd', (1.0, 1.0)), ('tfnkd', (1.0, 1.0)), ('tfkd', (0.9, 0.1)),
])
def test_weights_unset_are_those_of_the_loss(tmp_path, loss, weights):
    teacher = ['--teacher', 'resnet34'] if KD_LOSSES[loss].needs_teacher else []
    settings = resolve_kd(parse(tmp_path, '--kd-loss', loss, *teacher))
    assert (settings.task_loss_weight, settings.distill_loss_weight) == weights


@pytest.mark.parametrize('argv, weights', [
    (['--distill-loss-weight', '3'], (1.0, 3.0)),
    (['--task-loss-weight', '0.25'], (0.25, 0.75)),
    (['--task-loss-weight', '0.25', '--distill-loss-weight', '3'], (0.25, 3.0)),
])
def test_weights_follow_timm_rule(tmp_path, argv, weights):
    settings = resolve_kd(parse(tmp_path, '--kd-loss', 'tfkd', *argv))
    assert (settings.task_loss_weight, settings.distill_loss_weight) == weights


def test_only_given_parameters_are_handed_on(tmp_path):
    settings = resolve_kd(parse(
        tmp_path, '--kd-loss', 'dkd', '--teacher', 'resnet34', '--kd-beta', '2', '--kd-temperature', '1',
        '--kd-logit-std', '--kd-warmup-epochs', '5'))
    assert settings.loss_parameters == {'beta': 2.0, 'temperature': 1.0, 'logit_std': True}
    assert settings.warmup_epochs == 5
    loss = create_kd_loss(settings.loss, **settings.loss_parameters)
    assert (loss.alpha, loss.beta, loss.temperature) == (1.0, 2.0, 1.0)


@pytest.mark.parametrize('loss, epochs, warmup_epochs', [
    ('dkd', 240, 20), ('dkd', 100, 8), ('dkd', 15, 1), ('dkd', 1, 1), ('kd', 240, 0), ('nkd', 240, 0),
    ('tfnkd', 240, 0), ('tfkd', 240, 0),
])
def test_warmup_unset_is_that_of_the_loss(tmp_path, loss, epochs, warmup_epochs):
    teacher = ['--teacher', 'resnet34'] if KD_LOSSES[loss].needs_teacher else []
    args = parse(tmp_path, '--kd-loss', loss, '--epochs', str(epochs), *teacher)
    assert resolve_kd(args).warmup_epochs == warmup_epochs


@pytest.mark.parametrize('given', [0, 3])
def test_warmup_given_is_what_is_given_zero_too(tmp_path, given):
    argv = ['--kd-loss', 'dkd', '--teacher', 'resnet34', '--epochs', '240', '--kd-warmup-epochs', str(given)]
    assert resolve_kd(parse(tmp_path, *argv)).warmup_epochs == given


def test_args_of_a_plain_run_before_the_warmup_could_be_unset_are_read_again(tmp_path):
    (tmp_path / 'args.yaml').write_text('kd_warmup_epochs: 0\n')
    assert resolve_kd(parse(tmp_path, '-c', str(tmp_path / 'args.yaml'))) is None


@pytest.mark.parametrize('loss', [name for name, loss in KD_LOSSES.items() if 'temperature' in loss.hyper_parameters()])
def test_temperature_may_sharpen(tmp_path, loss):
    settings = resolve_kd(parse(tmp_path, '--kd-loss', loss, '--teacher', 'resnet34', '--kd-temperature', '0.25'))
    assert create_kd_loss(loss, **settings.loss_parameters).temperature == 0.25


def test_zero_is_a_value_of_a_parameter(tmp_path):
    settings = resolve_kd(parse(tmp_path, '--kd-loss', 'nkd', '--teacher', 'resnet34', '--kd-gamma', '0'))
    assert settings.loss_parameters == {'gamma': 0.0}


@pytest.mark.parametrize('argv, dtype', [
    ([], 'float32'), (['--amp'], 'amp'), (['--model-dtype', 'bfloat16'], 'bfloat16'),
    (['--amp', '--teacher-dtype', 'float16'], 'float16'), (['--amp', '--teacher', 'resnet34'], 'auto'),
])
def test_kd_model_name_keeps_the_precision_of_timm_script(tmp_path, argv, dtype):
    settings = resolve_kd(parse(tmp_path, '--kd-model-name', 'resnet34', *argv))
    assert (settings.loss, settings.teacher, settings.teacher_dtype) == ('kd', 'resnet34', dtype)


def test_kd_model_name_takes_another_loss(tmp_path):
    settings = resolve_kd(parse(tmp_path, '--kd-model-name', 'resnet34', '--kd-loss', 'nkd'))
    assert (settings.loss, settings.teacher) == ('nkd', 'resnet34')


def test_teacher_free_kd_takes_a_teacher_or_none(tmp_path):
    assert resolve_kd(parse(tmp_path, '--kd-loss', 'tfkd')).teacher is None
    assert resolve_kd(parse(tmp_path, '--kd-loss', 'tfkd', '--teacher', 'resnet18')).teacher == 'resnet18'


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

