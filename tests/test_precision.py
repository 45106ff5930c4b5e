"""Every loss under every precision and compiled (`make soak`)."""
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import BASE, STILL, Process, Run

from timm_kd import train
from timm_kd.losses import KD_LOSSES

pytestmark = pytest.mark.soak

PRECISIONS = {
    'float32': '',
    'amp-bfloat16': '--amp --amp-dtype bfloat16',
    'amp-float16': '--amp --amp-dtype float16',
    'model-bfloat16': '--model-dtype bfloat16',
    'channels-last': '--channels-last',
    'grad-checkpointing': '--grad-checkpointing',
    'amp-channels-last-checkpointing':
        '--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing --grad-accum-steps 2',
}


def train_logging_recompiles(argv: list[str]) -> None:
    torch._logging.set_logs(recompiles=True)
    train.main(argv)


def losses_of(digits: Path, teacher: Path, output: Path, loss: str, options: str = '') -> tuple[list[float], str]:
    """Train losses of a run of 3 epochs that learns nothing (rounding would lead it astray), and its stderr."""
    teaching = f'--teacher local-dir:{teacher}' if KD_LOSSES[loss].needs_teacher else ''
    argv = shlex.split(
        f'{digits} {BASE} {STILL} --epochs 3 --no-aug --kd-loss {loss} {teaching} {options} --output {output} '
        '--experiment run')
    run = Process(train_logging_recompiles, (argv,), output / 'printed')
    assert run.wait() == 0, run.stderr
    return [row['train_loss'] for row in Run(output / 'run').rows], run.stderr


@pytest.fixture(scope='module')
def plain(digits, digits_teacher, tmp_path_factory) -> dict[str, list[float]]:
    """Train losses of each loss in float32, uncompiled."""
    return {loss: losses_of(digits, digits_teacher, tmp_path_factory.mktemp('plain'), loss)[0] for loss in KD_LOSSES}


@pytest.mark.parametrize('loss', KD_LOSSES)
@pytest.mark.parametrize('precision', PRECISIONS)
def test_loss_is_right_under(precision, loss, plain, digits, digits_teacher, tmp_path):
    losses, _ = losses_of(digits, digits_teacher, tmp_path, loss, PRECISIONS[precision])
    assert losses == pytest.approx(plain[loss], rel=0.02)


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs g++ on the CPU')
@pytest.mark.parametrize('precision, loss', [*(('float32', loss) for loss in KD_LOSSES), ('amp-bfloat16', 'nkd')])
def test_compiled_loss_is_right_and_compiles_no_more_after_the_first_epoch(
        precision, loss, plain, digits, digits_teacher, tmp_path):
    losses, log = losses_of(digits, digits_teacher, tmp_path, loss, f'--torchcompile {PRECISIONS[precision]}')
    assert losses == pytest.approx(plain[loss], rel=0.02)
    assert 'Recompiling' not in log[log.index('Train: 1 '):]
