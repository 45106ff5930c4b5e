"""timm's own feature and token distillation, driven by the script with teachers of this project."""
import copy
from functools import partial

import pytest
import timm
import torch
import yaml
from helpers import STILL, Run, build, digits_batch, run_on_ranks, run_script
from test_reference_loop import assert_saved, flatten, train_reference
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import JsdCrossEntropy
from timm.models import save_for_hf
from timm.task import FeatureDistillationTask, TokenDistillationTask
from torch import nn

from timm_kd import Teacher
from timm_kd.cli import parse_args, resolve_kd
from timm_kd.hub import push_run
from timm_kd.task import TaskTeacher
from timm_kd.train import main

DEIT = dict(model_name='deit_tiny_distilled_patch16_224', depth=2, embed_dim=32, num_heads=2, img_size=32)
DEIT_FLAGS = '--model deit_tiny_distilled_patch16_224 --model-kwargs depth=2 embed_dim=32 num_heads=2'
FEATURE, TOKEN = '--kd-distill-type feature', f'--kd-distill-type token {DEIT_FLAGS}'


def save_vit(folder, mean, std):
    """Saves a transformer, in whose forward nothing is folded or laid out anew."""
    settings = dict(img_size=32, embed_dim=48, num_heads=3)
    save_for_hf(
        build('test_vit', seed=5, **settings), folder, safe_serialization=True, model_config={'model_args': settings},
        data_config={'input_size': (3, 32, 32), 'mean': mean, 'std': std})
    return folder


@pytest.fixture(scope='module')
def vit_teacher(tmp_path_factory):
    """A teacher that is normalised as timm's test models are."""
    return save_vit(tmp_path_factory.mktemp('teacher') / 'vit', (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope='module')
def deit_like_teacher(tmp_path_factory):
    """A teacher that is normalised as DeiT is."""
    return save_vit(tmp_path_factory.mktemp('teacher') / 'vit', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize('flags, task, settings, student, splits', [
    (FEATURE, FeatureDistillationTask, {}, None, 0),
    (f'{FEATURE} --jsd-loss --aug-splits 2', FeatureDistillationTask, {}, None, 2),
    (f'{FEATURE} --task-loss-weight 0.3', FeatureDistillationTask, dict(task_loss_weight=0.3), None, 0),
    (TOKEN, TokenDistillationTask, dict(temperature=4.0), DEIT, 0),
    (f'{TOKEN} --kd-temperature 2 --distill-loss-weight 0.7 --loss jsd --aug-splits 2', TokenDistillationTask,
     dict(temperature=2.0, distill_loss_weight=0.7), DEIT, 2),
    (f'{TOKEN} --kd-token-distill-type hard', TokenDistillationTask, dict(distill_type='hard'), DEIT, 0),
], ids=['feature', 'feature-jsd', 'feature-weights', 'token', 'token-jsd', 'token-hard'])
def test_run_is_that_of_timms_task_bit_for_bit(
        flags, task, settings, student, splits, train, digits, vit_teacher, deit_like_teacher):
    source = f'local-dir:{deit_like_teacher if student else vit_teacher}'
    run = train(f'--kd-model-name {source} {flags} --epochs 2 --model-ema --model-ema-decay 0.9')
    rows, reference = train_reference(
        digits, partial(task, teacher_model=timm.create_model(source, pretrained=True), verbose=False, **settings),
        epochs=2, model_args=student or {}, splits=splits, criterion=JsdCrossEntropy(splits) if splits else None,
        ema=dict(decay=0.9))
    assert [{name: row[name] for name in rows[0]} for row in run.rows] == rows
    saved = run.checkpoint()
    assert_saved(saved, reference)
    assert ('task_state_ema' in saved) == (task is FeatureDistillationTask)  # the projection, 96 to 48
    assert not any('teacher' in name for part in ('state_dict', 'task_state') for name in flatten(saved.get(part, {})))


def test_teacher_with_another_normalisation_and_size_is_adapted(digits_teacher):
    images, _ = digits_batch()
    model = timm.create_model(f'local-dir:{digits_teacher}', pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    resized = nn.functional.interpolate(images, (24, 24), mode='bilinear', antialias=True)
    with torch.no_grad():
        adapted = (resized * 0.5 + 0.5 - mean) / std
        expected = model.forward_head(model.forward_features(adapted), pre_logits=True)
    teacher = TaskTeacher(Teacher(
        f'local-dir:{digits_teacher}', None, (0.5,) * 3, (0.5,) * 3, img_size=24, dtype='float32'))
    task = FeatureDistillationTask(build(), teacher, nn.CrossEntropyLoss(), verbose=False).eval()
    assert task.trainable_module.projection is None
    result = task(images, digits_batch()[1])
    torch.testing.assert_close(
        result['kd_loss'], nn.functional.mse_loss(task.trainable_module(images)[1], expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(teacher(images), model(adapted), rtol=1e-4, atol=1e-4)


def test_precision_of_the_teacher_is_its_own(train, vit_teacher):
    exact, again, *narrow = (
        train(f'--teacher {vit_teacher} --teacher-dtype {dtype} {FEATURE} {STILL}', name).rows[0]['train_kd_loss']
        for name, dtype in (('exact', 'float32'), ('again', 'float32'), ('narrow', 'bfloat16'), ('auto', 'auto')))
    assert again == exact
    assert narrow == pytest.approx([exact] * 2, rel=0.02)


@pytest.mark.parametrize('flags', [FEATURE, TOKEN])
def test_students_of_low_precision_learn_in_it(flags, train, vit_teacher):
    run = train(f'--kd-model-name local-dir:{vit_teacher} {flags} --model-dtype bfloat16')
    saved = run.checkpoint()
    for part in ('state_dict', 'task_state'):
        if part in saved:
            assert {value.dtype for value in flatten(saved[part]).values() if value.is_floating_point()} == {
                torch.bfloat16}


@pytest.mark.parametrize('flags', [FEATURE, TOKEN])
def test_under_autocast_the_teacher_of_timms_flag_is_in_it(flags, train, vit_teacher):
    amp = '--amp --amp-dtype bfloat16'
    theirs, ours = (train(f'{teacher} {flags} {amp} {STILL}', name) for name, teacher in (
        ('theirs', f'--kd-model-name local-dir:{vit_teacher}'),
        ('ours', f'--teacher {vit_teacher} --teacher-dtype float32'),
    ))
    name = 'train_kd_loss' if flags == FEATURE else 'train_distill_loss'
    assert theirs.rows[0][name] != ours.rows[0][name]
    assert theirs.rows[0][name] == pytest.approx(ours.rows[0][name], rel=0.02)


def test_features_of_a_teacher_with_other_classes_or_none_are_learned(train, tmp_path):
    for classes in (7, 0):
        folder = tmp_path / f'of-{classes}'
        save_for_hf(build(num_classes=classes, seed=3), folder, safe_serialization=True)
        run = train(f'--teacher {folder} {FEATURE}', str(classes))
        assert 'eval_agreement' not in run.rows[0] and run.rows[0]['train_kd_loss'] > 0
        assert run.record['teacher'][0]['top1'] is None


def test_several_teachers_teach_a_token_by_their_mean(train, vit_teacher, digits_teacher):
    alone = train(f'--teacher {vit_teacher} {TOKEN} {STILL}', 'alone')
    twice = train(f'--teacher {vit_teacher} --teacher {vit_teacher} {TOKEN} {STILL}', 'twice')
    both = train(f'--teacher {vit_teacher} --teacher {digits_teacher} {TOKEN} {STILL}', 'both')
    losses = [run.rows[0]['train_distill_loss'] for run in (alone, twice, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and abs(losses[2] - losses[0]) > 0.1


@pytest.mark.parametrize('flags, words', [
    (f'{FEATURE} --kd-student-feature-dim 64', ['--kd-student-feature-dim 64', '96']),
    (f'{FEATURE} --kd-teacher-feature-dim 64', ['--kd-teacher-feature-dim 64', '[48]', '[64]']),
    ('--kd-distill-type token', ['--kd-distill-type token', '--model test_resnet', 'deit_tiny_distilled']),
    (DEIT_FLAGS, ['--model deit_tiny_distilled_patch16_224', '--kd-distill-type token']),
])
def test_student_and_widths_that_do_not_fit_are_refused(flags, words, digits, vit_teacher, tmp_path):
    run = run_script(f'--teacher {vit_teacher} {flags}', digits, tmp_path)
    assert run.exit_code == 2 and run.error.count('\n') == 1
    assert [word for word in words if word not in run.error] == []
    assert not run.folder.exists()


@pytest.mark.parametrize('flags', [FEATURE, TOKEN])
def test_run_stopped_inside_an_epoch_ends_as_the_whole_one(flags, train, vit_teacher):
    common = (f'--teacher {vit_teacher} {flags} --epochs 2 --replayable-data --recovery-interval 2 --model-ema '
              '--model-ema-decay 0.9 --drop-path 0.1')
    whole = train(common, 'whole')
    resumed = train(f'{common} --resume {whole.folder / "recovery-1-3.pth.tar"}', 'resumed')
    assert resumed.rows[-1] == whole.rows[-1]
    states = [run.checkpoint() for run in (whole, resumed)]
    for part in ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema'):
        one, two = (flatten(state.get(part, {})) for state in states)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), part


@pytest.mark.parametrize('flags, says', [
    (FEATURE, ['W f_s', 'pooled features']),
    (TOKEN, ['T^2', 'distillation head', 'touvron2021', '| temperature | 4.0 |']),
    (f'{TOKEN} --kd-token-distill-type hard', ['arg', 'touvron2021']),
])
def test_card_says_what_was_distilled(flags, says, train, vit_teacher):
    run = train(f'--teacher {vit_teacher} {flags} --model-ema')
    push_run(run.folder, 'me/student', dry_run=True)
    card = (run.folder / 'hub' / 'README.md').read_text()
    assert [words for words in (*says, 'knowledge distillation from', 'weight of D') if words not in card] == []
    assert 'None' not in card.partition('## Loss')[2].partition('## Use')[0]
    published = timm.create_model(f'local-dir:{run.folder / "hub"}', pretrained=True)
    weights = run.checkpoint('model_best.pth.tar')['state_dict_ema']
    assert all(torch.equal(value, weights[name]) for name, value in published.state_dict().items())


@pytest.mark.parametrize('distillation', [
    {'kd_distill_type': 'feature'}, {'kd_distill_type': 'token', 'kd_token_distill_type': 'hard'},
])
def test_args_yaml_of_timms_script_is_taken_with_its_unused_temperature(distillation, tmp_path):
    path = tmp_path / 'args.yaml'
    path.write_text(yaml.safe_dump({'kd_model_name': 'resnet34', 'kd_temperature': 4.0, **distillation}))
    args, _ = parse_args([str(tmp_path), '-c', str(path)])
    assert args.kd_temperature is None and args.kd_distill_type == distillation['kd_distill_type']


def test_compiled_task_computes_what_it_does_uncompiled(vit_teacher):
    images, target = digits_batch()
    for make, student in (
        (FeatureDistillationTask, build()),
        (TokenDistillationTask, timm.create_model(**DEIT, num_classes=10)),
    ):
        teacher = Teacher(f'local-dir:{vit_teacher}', None, (0.5,) * 3, (0.5,) * 3, dtype='float32')
        task = make(student, TaskTeacher(teacher), nn.CrossEntropyLoss(), verbose=False).train()
        expected = copy.deepcopy(task)(images, target)
        task.compile(backend='eager')
        result = task(images, target)
        for name in expected:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-5, atol=1e-5)


def test_token_has_the_defaults_of_timms_script():
    kd = resolve_kd(parse_args(['/', '--kd-model-name', 'x', '--kd-distill-type', 'token'])[0])
    assert kd.loss_parameters == {'distill_type': 'soft', 'temperature': 4.0}
    assert (kd.task_loss_weight, kd.distill_loss_weight, kd.warmup_epochs) == (1.0, 1.0, 0)


def test_two_processes_train_the_projection_as_one_does(digits, vit_teacher, tmp_path):
    def argv(name: str, batch_size: int) -> list[str]:
        flags = (f'{FEATURE} --model test_vit --img-size 32 --num-classes 10 --device cpu --workers 0 --epochs 2 '
                 '--opt sgd --lr 0.05 --warmup-epochs 0 --replayable-data --model-ema --model-ema-decay 0.9')
        return [str(digits), *flags.split(), '--teacher', str(vit_teacher), '--teacher-dtype', 'float32', '--output',
                str(tmp_path), '--experiment', name, '--batch-size', str(batch_size)]

    run_on_ranks(main, (argv('two', 16),), tmp_path / 'ranks')
    run_on_ranks(main, (argv('one', 32),), tmp_path / 'alone', world_size=1)
    two, one = (Run(tmp_path / name) for name in ('two', 'one'))
    for name in ('train_loss', 'train_kd_loss', 'eval_loss'):
        assert two.rows[-1][name] == pytest.approx(one.rows[-1][name], rel=1e-4), name
    for part in ('task_state', 'task_state_ema'):
        projections = [flatten(run.checkpoint()[part])['projection.weight'] for run in (two, one)]
        torch.testing.assert_close(*projections, rtol=1e-3, atol=1e-5)
