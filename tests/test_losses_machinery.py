"""The losses as citizens of torch: memory, passes over memory, torch.compile, torch.func."""
import pytest
import torch
from common import peak_bytes
from losses_cases import make_batch
from timm.data.mixup import mixup_target
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_kd.losses import KD_LOSSES, create_kd_loss

DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


def make_loss(name, teacher, **params):
    """Return a function of student logits and target."""
    kd_loss = create_kd_loss(name, **params)
    teacher = teacher if kd_loss.needs_teacher else None
    return lambda student, target, smoothing=0.0: kd_loss(student, teacher, target, smoothing)['kd_loss']


def make_case(name, batch_size=4, num_classes=5, dtype=torch.float64, device='cpu', **params):
    """Return student logits, hard targets, and the loss as a function of both."""
    student, teacher, target = make_batch(batch_size, num_classes, dtype=dtype, device=device)
    return student, target, make_loss(name, teacher, **params)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('name', 'params', 'tensors'), [
    ('kd', {}, 3), ('dkd', {}, 3), ('nkd', {}, 3), ('nkd', {'temperature': 3.0}, 3), ('tfnkd', {}, 2), ('tfkd', {}, 2),
])
def test_forward_and_backward_hold_few_logit_sized_tensors(name, params, tensors, device):
    student, target, loss = make_case(name, 64, 5000, torch.float32, device, **params)
    student.requires_grad_()

    def step():
        loss(student, target).backward()
        student.grad = None

    peak = peak_bytes(step, device)
    # Row quantities come on top: at 5000 classes they are a few thousandths of the logits.
    assert peak <= (tensors + 0.05) * student.nbytes
    assert peak >= student.nbytes


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', KD_LOSSES)
def test_graph_keeps_one_logit_sized_tensor(name, device):
    student, target, loss = make_case(name, 64, 5000, torch.float32, device)
    saved = loss(student.requires_grad_(), target).grad_fn.saved_tensors
    assert sum(tensor.numel() >= student.numel() for tensor in saved) == 1


class Dispatches(TorchDispatchMode):
    """Count the kernels that read or write a tensor of the given size."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.passes = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        indexing = func.overloadpacket.__name__ in ('gather', 'scatter_', 'scatter_add_')
        if not func.is_view and not indexing and any(tensor.numel() == self.numel for tensor in tensors):
            self.passes += 1
        return result


@pytest.mark.parametrize(('name', 'passes'), [('kd', 14), ('dkd', 15), ('nkd', 14), ('tfnkd', 4), ('tfkd', 5)])
def test_forward_and_backward_pass_over_the_logits_few_times(name, passes):
    student, target, loss = make_case(name, 16, 40)
    student.requires_grad_()
    with Dispatches(student.numel()) as counter:
        loss(student, target).backward()
    assert counter.passes <= passes


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', KD_LOSSES)
def test_no_host_sync_on_a_gpu(name):
    student, target, loss = make_case(name, dtype=torch.float32, device='cuda')
    loss(student.requires_grad_(), target).backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for either in (target, torch.nn.functional.one_hot(target, 5).float()):
            loss(student, either).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', KD_LOSSES)
def test_compiles_without_graph_breaks(name):
    student, target, loss = make_case(name, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    for either, smoothing in ((target, 0.0), (mixup_target(target, 5, 0.7, 0.1), 0.1)):
        ours, theirs = (student.clone().requires_grad_() for _ in range(2))
        loss(ours, either, smoothing).backward()
        compiled(theirs, either, smoothing).backward()
        torch.testing.assert_close(theirs.grad, ours.grad)


@pytest.mark.parametrize('name', KD_LOSSES)
def test_func_grad_of_a_functional_call_is_autograds(name):
    _, target, loss = make_case(name)
    torch.manual_seed(0)
    model, images = torch.nn.Linear(3, 5).double(), torch.randn(4, 3, dtype=torch.float64)
    loss(model(images), target).backward()
    gradients = grad(lambda params: loss(functional_call(model, params, (images,)), target))(
        {key: value.detach() for key, value in model.named_parameters()})
    for key, value in model.named_parameters():
        torch.testing.assert_close(gradients[key], value.grad)


@pytest.mark.parametrize('name', ['kd', 'dkd', 'nkd', 'tfkd'])
def test_func_vmap_gives_the_gradient_of_each_sample(name):
    student, teacher, target = make_batch(4, 5)
    loss = make_loss(name, teacher)
    whole = grad(loss)(student, target)

    def of_one(row, teacher_row, label):
        return make_loss(name, teacher_row[None])(row[None], label[None])

    torch.testing.assert_close(vmap(grad(of_one))(student, teacher, target) / 4, whole)


@pytest.mark.parametrize('name', KD_LOSSES)
def test_func_forward_mode_and_hessian_work(name):
    student, target, loss = make_case(name)
    direction = torch.ones_like(student).cumsum(1)
    gradient = grad(loss)(student, target)
    _, along = jvp(lambda logits: loss(logits, target), (student,), (direction,))
    torch.testing.assert_close(along, (gradient * direction).sum())
    curvature = hessian(loss)(student, target).reshape(20, 20)
    step = 1e-5 * direction
    change = (grad(loss)(student + step, target) - grad(loss)(student - step, target)) / 2e-5
    if name != 'tfnkd':  # its weights are detached: the Hessian is that at fixed weights
        torch.testing.assert_close(curvature @ direction.flatten(), change.flatten(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', KD_LOSSES)
def test_without_gradient_nothing_is_computed_for_it(name):
    student, target, loss = make_case(name)
    with torch.no_grad():
        value = loss(student.requires_grad_(), target)
    assert value.grad_fn is None
    torch.testing.assert_close(value, loss(student, target).detach())
