"""Benchmarks in small, from first line to last: that for a GPU, which no machine of CI has, and the loader's."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

from timm_kd.losses import KD_LOSSES

ROOT = Path(__file__).parents[1]
WAYS = ('plain', 'timm', 'ours', 'unfolded', 'compiled', 'stored')


@pytest.fixture(scope='module')
def report() -> dict[str, str]:
    """What `benchmarks/gpu.py --tiny` prints, by section."""
    words = [sys.executable, str(ROOT / 'benchmarks/gpu.py'), '--tiny']
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.endswith('\nNo checks failed.\n')
    return {part.partition('\n')[0]: part for part in done.stdout.split('\n## ')[1:]}


def section(report: dict[str, str], beginning: str) -> str:
    (name,) = (name for name in report if name.startswith(beginning))
    return report[name]


def test_each_loss_is_timed_and_judged_in_each_dtype(report):
    text = section(report, 'The losses')
    for name in KD_LOSSES:
        assert re.search(rf'^\| {name} \| \[8, 50\] \|', text, re.M)
        for dtype in ('float32', 'float16', 'bfloat16'):
            assert re.search(rf'^- {name}, {dtype}, off the float64 formula .*: holds$', text, re.M)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_each_way_is_timed_and_judged_under_each_autocast(report, dtype):
    text = section(report, 'Steps: test_efficientnet from test_resnet')
    table = text.partition(f'| {dtype} autocast |')[2].partition('\n\n')[0]
    assert re.findall(r'^\| (\w+) \|', table, re.M) == list(WAYS)
    for way in WAYS:
        assert re.search(rf'^- {dtype}, {way}: the loss is finite: .*: holds$', text, re.M)
    waiting = re.findall(rf'^- {dtype}, (\w+): no step waits for the device: .*: not judged here$', text, re.M)
    assert waiting == [way for way in WAYS if way != 'timm']


def test_loader_is_set_beside_each_way(report):
    text = section(report, 'The loader beside the steps')
    assert re.findall(r'^\| test_efficientnet, (\w+) \| \d+ \| the \w+ \|$', text, re.M) == list(WAYS)


def test_digits_run_fills_resumes_and_reads(report):
    text = section(report, 'A run on the digits')
    assert re.findall(r'^\| (\w+) \| 2 \|', text, re.M) == ['teacher', 'filled', 'read']
    assert len(re.findall(r'^- .*: holds$', text, re.M)) == 3


@pytest.mark.skipif(sys.platform != 'linux', reason='the processor time of another process is read as Linux has it')
def test_loader_is_measured_beside_timms_for_each_recipe_and_number_of_crops():
    words = [sys.executable, str(ROOT / 'benchmarks/loader.py'), '--images', '8', '--batch-size', '8', '--rounds', '3']
    done = subprocess.run([*words, '--crops', '4'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kilobytes = int(re.search(r'^8 images of (\d+) kB', done.stdout)[1])
    assert 90 <= kilobytes <= 110
    number = r'\d+\.?\d*'
    for recipe in ('resnet18_baseline', 'swin_tiny_baseline'):
        assert re.search(rf'^\| {recipe} \|', done.stdout, re.M)
    for name in ('timm', '1 crop an image', '4 crops an image'):
        row = rf'^\| {name} \| {number} \| {number} \| {number} to {number} \| {number} \| {number} \|'
        assert len(re.findall(row, done.stdout, re.M)) == 2
