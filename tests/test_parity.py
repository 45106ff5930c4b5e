"""Without a KD flag the run is timm's: the figures of timm's own script, bit for bit.

`tests/data/timm_parity.json` says how they were made. Bits hold for their processor and torch alone: elsewhere these
tests skip, with a warning, and `test_reference_loop.py` is what holds the script to timm's arithmetic.
"""
import csv
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Process
from PIL import Image
from sklearn.datasets import load_digits

from timm_kd import train

PARITY = json.loads((Path(__file__).parent / 'data' / 'timm_parity.json').read_text())
TORCH = '2.15.0'


@pytest.fixture(scope='module')
def all_digits(tmp_path_factory) -> Path:
    """The 1,797 digits that the figures were made on."""
    root = tmp_path_factory.mktemp('parity') / 'digits'
    images, classes = load_digits(return_X_y=True)
    validation = set(PARITY['validation_indices'])
    for index, (image, label) in enumerate(zip(images, classes, strict=True)):
        folder = root / ('validation' if index in validation else 'train') / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image.reshape(8, 8) / 16 * 255).astype('uint8')
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert('RGB').save(folder / f'{index}.png')
    return root


def command_line(args: dict) -> list[str]:
    flags = {f'--{name.replace("_", "-")}': value for name, value in args.items()}
    return [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]


@pytest.fixture
def machine_of_the_figures() -> None:
    """Skips, and says so among the warnings of the test run, on any machine but one like that of the figures."""
    cpu = Path('/proc/cpuinfo')
    differences = {
        f'torch is {torch.__version__}, not {TORCH}': torch.__version__.split('+')[0] != TORCH,
        'the processor is no Xeon with AMX': not cpu.exists() or 'amx_tile' not in cpu.read_text(),
        'ONEDNN_MAX_CPU_ISA is set': 'ONEDNN_MAX_CPU_ISA' in os.environ,
    }
    found = ', '.join(difference for difference, is_there in differences.items() if is_there)
    if found:
        warnings.warn(f"The figures of timm's own script were not compared: {found}.", stacklevel=1)
        pytest.skip(found)


@pytest.mark.usefixtures('machine_of_the_figures')
@pytest.mark.parametrize('case', PARITY['cases'])
def test_run_without_teacher_gives_the_figures_of_timms_script(case, all_digits, tmp_path):
    args = [
        str(all_digits), '--num-classes', '10', '--img-size', '32', '--device', 'cpu', '--output', str(tmp_path),
        '--experiment', case, *command_line(PARITY['cases'][case]['args']),
    ]
    run = Process(train.main, (args,), tmp_path / 'printed', dict(OMP_NUM_THREADS='1'))
    assert run.wait() == 0, run.stderr
    with open(tmp_path / case / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PARITY['cases'][case]['summary'])
    for row, figures in zip(rows, PARITY['cases'][case]['summary'], strict=True):
        assert list(row) == list(figures)
        for name, value in figures.items():
            if name.startswith('eval_'):
                assert float(row[name]) == pytest.approx(value, rel=1e-6)
            else:
                assert float(row[name]) == value, name
