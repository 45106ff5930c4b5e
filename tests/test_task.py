"""KDTask among timm's own tools: its tasks, checkpoints, EMA, compile, DDP and training loop."""
import copy
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import build, digits_batch, free_port
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad, random_seed, unwrap_model
from torch import nn

from timm_kd import KDTask, Teacher, create_kd_loss
from timm_kd.losses import KD_LOSSES
from timm_kd.teacher.adapt import InputAdapter

CLASSES = 10
STUDENT_NORM = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
TEACHER_NORM = {'mean': (0.2, 0.4, 0.6), 'std': (0.3, 0.2, 0.1)}


def make_teacher(seed: int = 1) -> Teacher:
    """A teacher with a normalisation of its own."""
    model = build(seed=seed)
    model.pretrained_cfg.update(TEACHER_NORM)
    return Teacher(model, CLASSES, **STUDENT_NORM, dtype='float32')


def make_task(name: str = 'nkd', student: nn.Module | None = None, **kwargs) -> KDTask:
    teacher = make_teacher() if KD_LOSSES[name].needs_teacher else None
    return KDTask(student or build(), create_kd_loss(name), teacher=teacher, verbose=False, **kwargs).train()


def train(
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int = 3,
        dense: bool = False,
        dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """The loop that timm's documentation gives for any task."""
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    random_seed(5)  # Mixup draws from NumPy
    results = []
    for step in range(steps):
        input, target = digits_batch(first=8 * step)
        if dense:
            input, target = mixup(input, target)
        input = input.to(dtype)
        optimizer.zero_grad()
        result = task(input, target)
        result['loss'].backward()
        dispatch_clip_grad(task.get_clip_parameters(), value=1.0, mode='norm')
        optimizer.step()
        task.update_ema(step=step)
        results.append(result)
    return results


def save(task: nn.Module, folder: Path, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Writes epoch 4 with timm's saver and returns the path of `last`."""
    model = unwrap_model(task.get_trainable_module())
    saver = CheckpointSaver(
        model,
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        task=task,
    )
    saver.save_checkpoint(4, metric=50.0)
    return str(folder / 'last.pth.tar')


def assert_same_weights(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_kd_trains_step_for_step_like_timms_logit_distillation_on_mixed_batches():
    # In float64: a few steps of training make more of float32's rounding, and how much differs between processors.
    student, model = build().double(), build(seed=1).double()
    student.pretrained_cfg.update(STUDENT_NORM)
    model.pretrained_cfg.update(TEACHER_NORM)
    students = [student, copy.deepcopy(student)]
    criterion = SoftTargetCrossEntropy()
    theirs = LogitDistillationTask(
        students[0], copy.deepcopy(model), criterion, task_loss_weight=0.3, distill_loss_weight=0.6,
        temperature=2.0, verbose=False,
    ).train()
    adapter = InputAdapter(3, *STUDENT_NORM.values(), 3, *TEACHER_NORM.values(), dtype=torch.float64)
    teacher = nn.Sequential(adapter, model)
    ours = KDTask(
        students[1], create_kd_loss('kd', temperature=2.0), teacher, criterion, smoothing=0.1, task_loss_weight=0.3,
        distill_loss_weight=0.6, verbose=False,
    ).train()
    results = [
        train(task, torch.optim.SGD(task.get_clip_parameters(), lr=0.01), dense=True, dtype=torch.float64)
        for task in (theirs, ours)
    ]
    for expected, result in zip(*results, strict=True):
        for part in ('loss', 'task_loss', 'kd_loss', 'output'):
            torch.testing.assert_close(result[part], expected[part], rtol=1e-6, atol=1e-7)
    grads = [torch.cat([p.grad.flatten() for p in s.parameters()]) for s in students]
    assert (grads[1] - grads[0]).norm() < 1e-6 * grads[0].norm()


@pytest.mark.parametrize('name', KD_LOSSES)
def test_result_holds_what_timms_loop_reads_and_every_part_of_the_loss(name):
    task = make_task(name, task_loss_weight=0.7, distill_loss_weight=0.4)
    result = task(*digits_batch())
    assert list(result) == ['loss', 'output', 'task_loss', 'kd_loss', *KD_LOSSES[name].component_names]
    assert result['output'].shape == (8, CLASSES) and result['loss'].requires_grad
    expected_task_loss = nn.functional.cross_entropy(result['output'], digits_batch()[1])
    torch.testing.assert_close(result['task_loss'], expected_task_loss)
    torch.testing.assert_close(result['loss'], 0.7 * result['task_loss'] + 0.4 * result['kd_loss'])


def test_distillation_term_is_ramped_over_epochs_counted_from_1():
    task, batch = make_task(warmup_epochs=4, distill_loss_weight=2.0).eval(), digits_batch()
    shares = []
    for epoch in (1, 2, 4, 9):
        task.set_epoch(epoch)
        result = task(*batch)
        shares.append(((result['loss'] - result['task_loss']) / (2 * result['kd_loss'])).item())
    assert shares == pytest.approx([0.25, 0.5, 1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize('warmup_epochs', [0, 5])
def test_distillation_term_is_whole_where_no_epoch_was_ever_set(warmup_epochs):
    result = make_task(warmup_epochs=warmup_epochs)(*digits_batch())
    torch.testing.assert_close(result['loss'], result['task_loss'] + result['kd_loss'])


@pytest.mark.parametrize('name', ['dkd', 'nkd', 'tfnkd', 'tfkd'])
def test_smoothing_that_mixup_folds_into_unmixed_targets_is_undone(name):
    input, target = digits_batch()
    mixup = Mixup(mixup_alpha=0.8, prob=0.0, label_smoothing=0.2, num_classes=CLASSES)
    _, dense = mixup(input.clone(), target)
    hard = make_task(name).eval()(input, target)['kd_loss']
    criterion = SoftTargetCrossEntropy()
    undone = make_task(name, smoothing=0.2, criterion=criterion).eval()(input, dense)['kd_loss']
    torch.testing.assert_close(undone, hard, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match='smoothing 0.0'):
        make_task(name, smoothing=0.0, criterion=criterion).eval()(input, dense)


def test_teacher_that_is_missing_or_of_no_use_is_refused():
    with pytest.raises(ValueError, match='NKDLoss needs a teacher'):
        KDTask(build(), create_kd_loss('nkd'))
    with pytest.raises(ValueError, match='TFNKDLoss is teacher-free'):
        KDTask(build(), create_kd_loss('tfnkd'), teacher=make_teacher())


def test_state_parameters_ema_and_checkpoint_hold_the_student_alone():
    task = make_task()
    task.setup_ema()
    student = task.get_trainable_module().state_dict()
    state = task.get_checkpoint_state() | task.get_checkpoint_state(ema=True)
    assert state.keys() == {'state_dict', 'state_dict_ema'}
    assert state['state_dict'].keys() == state['state_dict_ema'].keys() == student.keys()
    assert len(task.state_dict()) == 2 * len(student)  # student and EMA
    theirs = {id(p) for p in task.teacher.parameters()}
    assert not theirs & {id(p) for p in task.parameters()}


def test_training_leaves_the_teacher_frozen_and_in_eval_mode():
    task = make_task().train()
    before = copy.deepcopy(task.teacher.model.state_dict())
    train(task, torch.optim.SGD(task.parameters(), lr=0.1))
    assert_same_weights(task.teacher.model.state_dict(), before)
    assert not any(module.training for module in task.teacher.model.modules())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_teacher_follows_the_task_to_a_device_but_keeps_its_precision():
    task = make_task().to(torch.bfloat16)
    assert {p.dtype for p in task.teacher.parameters()} == {torch.float32}
    task.to('meta')
    assert {p.device.type for p in task.teacher.parameters()} == {'meta'}


def test_clip_parameters_are_the_students_head_last():
    task = make_task()
    parameters = list(task.get_trainable_module().parameters())
    assert [id(p) for p in task.get_clip_parameters()] == [id(p) for p in parameters]
    body = [id(p) for p in task.get_clip_parameters(exclude_head=True)]
    head = [id(p) for p in task.get_trainable_module().fc.parameters()]
    assert [id(p) for p in parameters] == body + head


def test_ema_is_the_average_that_its_decay_says():
    task = make_task()
    task.setup_ema(decay=0.75)
    weight = task.get_trainable_module().fc.weight.data
    before = weight.clone()
    weight += 1.0
    task.update_ema()
    torch.testing.assert_close(unwrap_model(task.get_trainable_module(ema=True)).fc.weight.data, before + 0.25)


def test_checkpoint_of_timms_saver_resumes_student_ema_and_optimizer(tmp_path):
    task = make_task().train()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=1e-3)
    train(task, optimizer)
    path = save(task, tmp_path, optimizer)

    resumed = make_task(student=build(seed=3)).train()
    resumed.setup_ema(decay=0.5)
    its_optimizer = create_optimizer_v2(resumed.get_trainable_module(), 'adamw', lr=1e-3)
    assert resume_task_checkpoint(resumed, path, its_optimizer, log_info=False) == 5
    load_task_ema_checkpoint(resumed, path)
    for ema in (False, True):
        expected = unwrap_model(task.get_trainable_module(ema=ema)).state_dict()
        assert_same_weights(unwrap_model(resumed.get_trainable_module(ema=ema)).state_dict(), expected)
    losses = [train(t, o)[-1]['loss'] for t, o in ((task, optimizer), (resumed, its_optimizer))]
    assert torch.equal(*losses)


def test_checkpoint_loads_into_a_plain_timm_model(tmp_path):
    task = make_task()
    model = timm.create_model('test_resnet', num_classes=CLASSES, checkpoint_path=save(task, tmp_path))
    assert_same_weights(model.state_dict(), task.get_trainable_module().state_dict())


def test_checkpoint_of_timms_classification_task_resumes_here(tmp_path):
    plain = ClassificationTask(build(seed=7), verbose=False).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    train(plain, optimizer)
    path = save(plain, tmp_path, optimizer)

    task = make_task()
    its_optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    assert resume_task_checkpoint(task, path, its_optimizer, log_info=False) == 5
    assert_same_weights(task.get_trainable_module().state_dict(), plain.get_trainable_module().state_dict())
    for theirs, ours in zip(plain.parameters(), task.parameters(), strict=True):
        momenta = optimizer.state[theirs]['momentum_buffer'], its_optimizer.state[ours]['momentum_buffer']
        assert torch.equal(*momenta)


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler for the CPU')
def test_compiled_task_has_the_same_loss_and_gradient():
    torch.manual_seed(0)
    student, teacher = (  # small: tracing a model of timm takes longer than all the rest of this file
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, CLASSES))
        for _ in range(2)
    )
    teacher, batch = Teacher(teacher, CLASSES, dtype='float32'), digits_batch()
    plain, compiled = (
        KDTask(copy.deepcopy(student), create_kd_loss('nkd'), copy.deepcopy(teacher), verbose=False) for _ in range(2)
    )
    eval_model = compiled.compile(backend='inductor')
    assert eval_model is compiled.get_eval_model()
    results = [task.train()(*batch) for task in (plain, compiled)]
    for result in results:
        result['loss'].backward()
    for part in ('loss', 'kd_loss', 'soft', 'distributed'):
        torch.testing.assert_close(results[1][part], results[0][part], rtol=1e-5, atol=1e-6)
    grads = [torch.cat([p.grad.flatten() for p in task.parameters()]) for task in (plain, compiled)]
    assert (grads[1] - grads[0]).norm() < 1e-4 * grads[0].norm()


def test_compiled_task_writes_keys_without_a_wrappers_prefix():
    task = make_task()
    task.setup_ema()
    task.compile(backend='eager')
    task.compile_ema(backend='eager')
    state = task.get_checkpoint_state() | task.get_checkpoint_state(ema=True)
    assert state['state_dict'].keys() == state['state_dict_ema'].keys() == build().state_dict().keys()


@pytest.fixture
def gloo():
    """A process group of this process alone."""
    init_method = f'tcp://127.0.0.1:{free_port()}'
    torch.distributed.init_process_group('gloo', init_method=init_method, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_task_wraps_the_student_alone_and_keeps_its_loss(gloo):
    student, batch = build(), digits_batch()
    plain, task = make_task(student=student), make_task(student=copy.deepcopy(student))
    assert task.prepare_distributed() is task
    assert isinstance(task.trainable_module, nn.parallel.DistributedDataParallel)
    assert not isinstance(task.teacher.model, nn.parallel.DistributedDataParallel)
    torch.testing.assert_close(task(*batch)['loss'], plain(*batch)['loss'])
    assert task.get_checkpoint_state()['state_dict'].keys() == student.state_dict().keys()


def test_no_sync_holds_back_the_gradient_exchange_of_accumulation(gloo):
    task = make_task()
    task.prepare_distributed()
    with task.no_sync():
        assert not task.trainable_module.require_backward_grad_sync
    assert task.trainable_module.require_backward_grad_sync


def test_no_sync_does_nothing_in_one_process():
    task, batch = make_task(), digits_batch()
    with task.no_sync():
        task(*batch)['loss'].backward()
    assert all(p.grad is not None for p in task.parameters())
