"""Every loss under every precision and compiled (`make soak`)."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Process

from timm_kd import train
from timm_kd.losses import KD_LOSSES

pytestmark = pytest.mark.soak

PRECISIONS = {
    'float32': [],
    'amp-bfloat16': ['--amp', '--amp-dtype', 'bfloat16'],
    'amp-float16': ['--amp', '--amp-dtype', 'float16'],
    'model-bfloat16': ['--model-dtype', 'bfloat16'],
    'channels-last': ['--channels-last'],
    'grad-checkpointing': ['--grad-checkpointing'],
    'amp-channels-last-checkpointing': [
        '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--grad-checkpointing', '--grad-accum-steps', '2'],
}


def train_logging_recompiles(argv: list[str]) -> None:
    torch._logging.set_logs(recompiles=True)
    train.main(argv)


def losses_of(digits: Path, teacher: Path, output: Path, loss: str, options: list[str]) -> tuple[list[float], str]:
    """Train losses of a run of 3 epochs that learns nothing (rounding would lead it astray), and its stderr."""
    teaching = ['--teacher', f'local-dir:{teacher}'] if KD_LOSSES[loss].needs_teacher else []
    args = [
        str(digits), '--model', 'test_resnet', '--num-classes', '10', '--img-size', '32', '--device', 'cpu', '--epochs',
        '3', '--batch-size', '32', '--lr', '1e-12', '--warmup-epochs', '0', '--workers', '0', '--no-aug', '--kd-loss',
        loss, *teaching, *options, '--output', str(output), '--experiment', 'run',
    ]
    run = Process(train_logging_recompiles, (args,), output / 'printed')
    assert run.wait() == 0, run.stderr
    results = json.loads(run.stdout.split('--result\n')[1])
    return [epoch['train']['loss'] for epoch in results['all']], run.stderr


@pytest.fixture(scope='module')
def plain(digits, digits_teacher, tmp_path_factory) -> dict[str, list[float]]:
    """Train losses of each loss in float32, uncompiled."""
    return {
        loss: losses_of(digits, digits_teacher, tmp_path_factory.mktemp('plain'), loss, [])[0] for loss in KD_LOSSES
    }


@pytest.mark.parametrize('loss', KD_LOSSES)
@pytest.mark.parametrize('precision', PRECISIONS)
def test_loss_is_right_under(precision, loss, plain, digits, digits_teacher, tmp_path):
    losses, _ = losses_of(digits, digits_teacher, tmp_path, loss, PRECISIONS[precision])
    assert losses == pytest.approx(plain[loss], rel=0.02)


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs g++ on the CPU')
@pytest.mark.parametrize('precision, loss', [*(('float32', loss) for loss in KD_LOSSES), ('amp-bfloat16', 'nkd')])
def test_compiled_loss_is_right_and_compiles_no_more_after_the_first_epoch(
        precision, loss, plain, digits, digits_teacher, tmp_path):
    options = ['--torchcompile', *PRECISIONS[precision]]
    losses, log = losses_of(digits, digits_teacher, tmp_path, loss, options)
    assert losses == pytest.approx(plain[loss], rel=0.02)
    assert 'Recompiling' not in log[log.index('Train: 1 '):]
