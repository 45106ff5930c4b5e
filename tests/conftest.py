"""Real images and a teacher for the tests that run the script: scikit-learn's handwritten digits."""
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import NUM_CLASSES, PER_CLASS, Run, read_digits, replayable_loader, run_script, save_digit
from PIL import Image
from stopped import Runs
from timm.models import save_for_hf
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader

from timm_kd.cli import parse_args

TRAIN_IMAGES, VALIDATION_IMAGES = 16, 10  # of each class

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A suite in the background of a shell (`make test &`) ignores Ctrl-C, and so would the runs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of real digits, 32x32 PNGs: `train/<class>` with 16 images each, `validation/<class>` with 10."""
    root = tmp_path_factory.mktemp('data') / 'digits'
    images, classes = read_digits()
    for label in range(10):
        train, validation, _ = images[classes == label].tensor_split([TRAIN_IMAGES, TRAIN_IMAGES + VALIDATION_IMAGES])
        for split, own in {'train': train, 'validation': validation}.items():
            for index, image in enumerate(own):
                save_digit(image, root / split / str(label) / f'{index:03d}.png')
    return root


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of noise, `train/<class>` alone: a few images, larger than what is cropped of them."""
    root = tmp_path_factory.mktemp('images')
    pixels = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        folder = root / 'train' / str(label)
        folder.mkdir(parents=True)
        for number in range(PER_CLASS):
            Image.fromarray(pixels.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / f'{number}.png')
    return root


@pytest.fixture(scope='session')
def replayable(image_folder: Path) -> Callable[..., DataLoader]:
    """Makes replayable loaders of `image_folder`."""
    return partial(replayable_loader, image_folder)


@pytest.fixture(scope='session')
def digits_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `test_resnet` trained for seconds on the digits outside `validation`, saved as timm saves for the Hub.

    Its normalisation is not that of the students (timm's test models have mean and std 0.5).
    """
    mean, std = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
    images, target = read_digits()
    held_out = slice(TRAIN_IMAGES, TRAIN_IMAGES + VALIDATION_IMAGES)
    seen = torch.ones(len(target), dtype=torch.bool)
    for label in range(10):
        seen[target.eq(label).nonzero()[held_out, 0]] = False
    large = interpolate(images[seen], (32, 32), mode='bicubic').clamp(0, 1)
    inputs = (large.repeat(1, 3, 1, 1) - mean[0]) / std[0]
    target = target[seen]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=10).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in torch.randperm(len(target)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), target[batch]).backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp('teacher') / 'digits-teacher'
    data_config = {'input_size': (3, 32, 32), 'mean': mean, 'std': std}
    save_for_hf(model.eval(), folder, data_config=data_config, safe_serialization=True)
    return folder


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets torch say of this processor that it multiplies bfloat16 fast, or that it does not."""
    def pretend(fast_bfloat16: bool) -> None:
        for probe in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
            monkeypatch.setattr(torch.cpu, probe, lambda: fast_bfloat16)
    return pretend


@pytest.fixture(params=['float32', 'bfloat16'])
def auto_dtype(request: pytest.FixtureRequest, pretend: Callable[[bool], None]) -> torch.dtype:
    """What `--teacher-dtype auto` is on the CPU in this process: each in turn, whatever this processor is."""
    pretend(request.param == 'bfloat16')
    return getattr(torch, request.param)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The one line that a refused command line leaves on stderr."""
    def run(argv: list[str], command: Callable[[list[str]], object] = parse_args) -> str:
        with pytest.raises(SystemExit) as stop:
            command(argv)
        output, error = capsys.readouterr()
        assert stop.value.code == 2
        assert output == '' and error.startswith('train-kd: error: ') and error.count('\n') == 1
        return error
    return run


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> Callable[..., Run]:
    """Runs the script on the digits."""
    def run(flags: str, name: str = 'run') -> Run:
        finished = run_script(flags, digits, tmp_path, name)
        assert finished.exit_code == 0, finished.error
        return finished
    return run


@pytest.fixture(scope='module')
def runs_of(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    """Runs of the script with given flags, in one or several processes, of which `whole` is done without a stop."""
    @cache
    def get(flags: str, world_size: int = 1) -> Runs:
        runs = Runs(digits, tmp_path_factory.mktemp('runs'), flags, world_size)
        runs.finish('whole')
        return runs
    return get
