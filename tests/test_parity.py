"""Without a KD flag the run is timm's: the figures of timm's own script, bit for bit.

`tests/data/timm_parity.json` says how they were made. Bits hold for their processor and torch alone: elsewhere these
tests skip, with a warning, and `test_reference_loop.py` is what holds the script to timm's arithmetic.
"""
import json
import os
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Process, Run, read_digits, save_digit

from timm_kd import train
from timm_kd.cli.messages import as_given

PARITY = json.loads((Path(__file__).parent / 'data' / 'timm_parity.json').read_text())
TORCH = '2.15.0'


@pytest.fixture(scope='module')
def all_digits(tmp_path_factory) -> Path:
    """The 1,797 digits that the figures were made on."""
    root = tmp_path_factory.mktemp('parity') / 'digits'
    for index, (image, label) in enumerate(zip(*read_digits(), strict=True)):
        split = 'validation' if index in PARITY['validation_indices'] else 'train'
        save_digit(image, root / split / str(label.item()) / f'{index}.png')
    return root


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
    flags = ' '.join(as_given(dest, value) for dest, value in PARITY['cases'][case]['args'].items())
    args = shlex.split(
        f'{all_digits} --num-classes 10 --img-size 32 --device cpu --output {tmp_path} --experiment {case} {flags}')
    run = Process(train.main, (args,), tmp_path / 'printed', dict(OMP_NUM_THREADS='1'))
    assert run.wait() == 0, run.stderr
    for row, figures in zip(Run(tmp_path / case).rows, PARITY['cases'][case]['summary'], strict=True):
        assert list(row) == list(figures)
        for name, value in figures.items():
            assert row[name] == (pytest.approx(value, rel=1e-6) if name.startswith('eval_') else value), name
