"""Pushing to and pulling from a Hub on loopback, through the real clients in processes of their own."""

import ast
import contextlib
import csv
import html
import importlib
import io
import json
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import Hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_kd.errors import UsageError
from timm_kd.hub import check_access, push_run
from timm_kd.hub.scrub import scrub
from timm_kd.losses import KD_LOSSES
from timm_kd.teacher import create_teacher

TOKEN = 'hf_thisIsTheWritersSecretToken'
READ_TOKEN = 'hf_thisTokenMayOnlyRead'
CLASSES = ['cat', 'dog', 'newt']
FILES = {'model.safetensors', 'config.json', 'README.md', 'args.yaml', 'summary.csv', 'curves.png'}


def make_run(folder: Path, model: str = 'test_resnet', size: int = 32, ema: bool = True, seed: int = 0) -> Path:
    """Make a run of two epochs, the first of them the better, saved by timm's saver as the training script does."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    fixed = {'img_size': size} if 'vit' in model else {}
    student = timm.create_model(model, num_classes=len(CLASSES), **fixed)
    args = Namespace(
        model=model, data_dir='/home/jane/data/pets', num_classes=None, img_size=size, gp=None, model_kwargs={},
        dataset='', val_split='validation', teacher='local-dir:/home/jane/teachers/r34', experiment='a',
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    ema_model = ModelEmaV3(student, decay=0.5) if ema else None
    saver = CheckpointSaver(student, optimizer, args=args, model_ema=ema_model, checkpoint_dir=str(folder))
    rows = []
    for epoch, top1 in enumerate([71.25, 64.5]):
        with torch.no_grad():
            for tensor in student.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor) * 0.1)
        if ema_model:
            ema_model.update(student)
        saver.save_checkpoint(epoch, metric=top1)
        rows.append({
            'epoch': epoch, 'train_loss': 1.5 - epoch, 'eval_loss': 1.25, 'eval_top1': top1, 'eval_top5': 98.75,
            'lr': 0.1, 'eval_agreement': 83.5, 'train_task_loss': 1.0, 'train_kd_loss': 0.5,
        })
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    (folder / 'run.json').write_text(json.dumps({
        'timm_kd': '0.1', 'timm': timm.__version__, 'torch': torch.__version__,
        'command': f'train-kd /home/jane/data/pets --model {model} --teacher local-dir:/home/jane/teachers/r34',
        'student': {
            'model': model, 'parameters': sum(p.numel() for p in student.parameters()), 'num_classes': len(CLASSES),
            'data_config': {
                'input_size': [3, size, size], 'mean': [0.5, 0.4, 0.3], 'std': [0.2, 0.25, 0.3], 'crop_pct': 0.9,
                'crop_mode': 'border', 'interpolation': 'bilinear',
            },
            'class_names': CLASSES, 'pretrained_source': None,
        },
        'teacher': [{
            'source': 'local-dir:/home/jane/teachers/r34', 'model': 'resnet34', 'parameters': 21_286_211,
            'top1': 91.5, 'top5': 99.25,
        }],
        'loss': {
            'name': 'nkd', 'parameters': {'temperature': 1.0, 'gamma': 1.5}, 'task_loss_weight': 1.0,
            'distill_loss_weight': 0.75, 'warmup_epochs': 0,
        },
        'eval_metric': 'top1', 'best': {'epoch': 0, 'metric': 71.25},
    }))
    return folder


def expected_logits(run_dir: Path, images: np.ndarray, checkpoint: str = 'model_best.pth.tar') -> np.ndarray:
    """Return the student's logits by timm alone: its factory and its checkpoint loader."""
    record = json.loads((run_dir / 'run.json').read_text())['student']
    fixed = {'img_size': images.shape[-1]} if 'vit' in record['model'] else {}
    model = timm.create_model(record['model'], num_classes=record['num_classes'], **fixed).eval()
    load_checkpoint(model, str(run_dir / checkpoint), use_ema=True)
    return logits_of(model, images)


def logits_of(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


# What the client process is asked to do: it alone has HF_ENDPOINT, and it alone is given a token.


def log_in(token: str | None) -> None:
    os.environ.pop('HF_TOKEN', None)
    if token:
        os.environ['HF_TOKEN'] = token


def push(run_dir: Path, repo_id: str, token: str | None = TOKEN, **options: object) -> str:
    log_in(token)
    return push_run(run_dir, repo_id, **options)


def check(repo_id: str, token: str | None = TOKEN, **options: object) -> None:
    log_in(token)
    check_access(repo_id, **options)


def pull(name: str, cache: Path, images: np.ndarray, token: str | None = TOKEN) -> tuple[np.ndarray, dict]:
    log_in(token)
    model = timm.create_model(f'hf-hub:{name}', pretrained=True, cache_dir=str(cache)).eval()
    return logits_of(model, images), model.pretrained_cfg


def teach(spec: str, images: np.ndarray) -> np.ndarray:
    log_in(TOKEN)
    torch.set_num_threads(1)
    # The images come normalised for the teacher, so none of its numbers change on the way.
    return create_teacher(spec, num_classes=len(CLASSES), dtype='float32')(torch.from_numpy(images)).numpy()


def run(module: str, argv: list[str], token: str | None = TOKEN) -> tuple[int, str, str]:
    """Run a command line; return its exit code, standard output and standard error."""
    log_in(token)
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            importlib.import_module(module).main(argv)
        except SystemExit as stop:
            code = stop.code
    return code, output.getvalue(), errors.getvalue()


def execute(snippet: str, folder: Path) -> str:
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(snippet, {})
    return output.getvalue()


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('runs') / 'resnet')


@pytest.fixture(scope='module')
def hub():
    with Hub({TOKEN: 'me', READ_TOKEN: 'me'}, read_only=(READ_TOKEN,)) as hub:
        hub.create('me/public')
        hub.create('you/theirs')
        yield hub


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    """Call a function of this module in a process whose Hub client speaks to the loopback Hub."""
    environment, before = hub.environment(tmp_path_factory.mktemp('home')), dict(os.environ)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        try:
            os.environ.clear()
            os.environ.update(environment)
            pool.submit(log_in, None).result()
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope='module')
def pushed(client, run_dir):
    client(push, run_dir, 'me/student', license='apache-2.0', dataset='me/pets')
    return 'me/student'


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)


def error_of(call, *args, **kwargs) -> BaseException:
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    return caught.value


# Round trips


def test_timm_pulls_the_best_ema_weights_bit_for_bit_and_what_they_need(client, pushed, run_dir, images, tmp_path):
    logits, config = client(pull, pushed, tmp_path, images)
    np.testing.assert_array_equal(logits, expected_logits(run_dir, images))
    assert not np.array_equal(logits, expected_logits(run_dir, images, 'last.pth.tar'))
    expected = {
        'num_classes': 3, 'input_size': (3, 32, 32), 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.25, 0.3),
        'crop_pct': 0.9, 'crop_mode': 'border', 'interpolation': 'bilinear', 'label_names': tuple(CLASSES),
    }
    assert {key: tuple(config[key]) if isinstance(config[key], list) else config[key] for key in expected} == expected


def test_a_model_of_fixed_input_size_comes_back_at_the_size_it_was_trained_at(client, tmp_path, images):
    run_dir = make_run(tmp_path / 'run', model='test_vit', size=96, ema=False)
    images = np.random.default_rng(0).standard_normal((2, 3, 96, 96), dtype=np.float32)
    client(push, run_dir, 'me/vit')
    logits, config = client(pull, 'me/vit', tmp_path / 'cache', images)
    np.testing.assert_array_equal(logits, expected_logits(run_dir, images))
    assert tuple(config['input_size']) == (3, 96, 96)


def test_a_pushed_student_teaches_with_the_logits_it_was_saved_with(client, pushed, run_dir, images):
    logits = client(teach, f'hf-hub:{pushed}', images)
    # A teacher is prepared for its device (memory layout, precision), which may round anew.
    np.testing.assert_allclose(logits, expected_logits(run_dir, images), rtol=1e-5)


def test_a_push_is_one_commit_of_the_published_files_and_no_pickle(hub, pushed):
    assert len(hub.repos[pushed].branches['main']) == 2  # the Hub's own initial commit, and the push
    assert set(hub.files(pushed)) - {'.gitattributes'} == FILES


def test_a_second_push_adds_a_commit_of_what_changed(hub, client, run_dir, images, tmp_path):
    client(push, run_dir, 'me/twice')
    client(push, run_dir, 'me/twice', checkpoint='last.pth.tar')
    assert len(hub.repos['me/twice'].branches['main']) == 3
    logits, _ = client(pull, 'me/twice', tmp_path, images)
    np.testing.assert_array_equal(logits, expected_logits(run_dir, images, 'last.pth.tar'))


def test_a_revision_is_a_branch_of_its_own(hub, client, run_dir, images, tmp_path):
    client(push, run_dir, 'me/branches', revision='ablation')
    assert set(hub.files('me/branches')) == {'.gitattributes'}
    logits, _ = client(pull, 'me/branches@ablation', tmp_path, images)
    np.testing.assert_array_equal(logits, expected_logits(run_dir, images))


def test_a_private_repository_is_pulled_with_the_token_only(hub, client, run_dir, images, tmp_path):
    client(push, run_dir, 'me/private', private=True)
    assert hub.repos['me/private'].private
    logits, _ = client(pull, 'me/private', tmp_path / 'a', images)
    np.testing.assert_array_equal(logits, expected_logits(run_dir, images))
    assert '404' in str(error_of(client, pull, 'me/private', tmp_path / 'b', images, token=None))


def test_the_usage_snippet_of_the_card_runs(hub, client, pushed, tmp_path):
    Image.new('RGB', (48, 40), 'teal').save(tmp_path / 'image.jpg')
    card = ModelCard(hub.files(pushed)['README.md'].decode())
    snippet = card.text.split('```python\n')[1].split('```')[0]
    output = client(execute, snippet, tmp_path)
    assert sorted(line.split(' % ')[1] for line in output.splitlines()) == CLASSES


# Refusals and failures


def test_access_is_granted_and_the_repository_waits_empty(hub, client):
    client(check, 'me/early', private=True, revision='trial')
    repo = hub.repos['me/early']
    assert repo.private and set(repo.branches) == {'main', 'trial'}
    assert set(hub.files('me/early')) == {'.gitattributes'}


@pytest.mark.parametrize(('repo_id', 'options', 'message'), [
    ('me/none', {'token': None}, 'hf auth login'),
    ('me/wrong', {'token': 'hf_thisTokenIsUnknown'}, 'does not accept the token'),
    ('me/readonly', {'token': READ_TOKEN}, 'the token may not write there'),
    ('you/student', {}, 'the token may not write there'),
    ('you/theirs', {}, 'the token may not write there'),  # although it exists
    ('me/public', {'private': True}, 'me/public exists and is public'),
    ('student', {}, 'OWNER/student'),
    ('me/a/b', {}, "'me/a/b' is not a repository of the Hub"),
])
def test_a_push_that_will_be_refused_is_a_usage_error_before_training(client, repo_id, options, message):
    error = error_of(client, check, repo_id, **options)
    assert isinstance(error, UsageError)
    assert message in str(error) and repo_id in str(error) and '\n' not in str(error)
    assert (options.get('token', TOKEN) or TOKEN) not in str(error)


def test_a_hub_that_hangs_up_is_a_usage_error_before_training(hub, client):
    hub.fail('POST', '/api/repos/create', status=None, times=1)
    error = error_of(client, check, 'me/unreachable')
    assert isinstance(error, UsageError) and str(error).startswith('me/unreachable: ')


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, pushed):
    storage, api = (
        {with_token for _, path, _, with_token in hub.log if path.startswith(folder)}
        for folder in ('/lfs/upload', '/api/repos/create')
    )
    assert storage == {False} and True in api


@pytest.mark.parametrize(('status', 'method', 'path'), [
    (401, 'POST', '/api/models/me/fail401/preupload'),
    (403, 'POST', '/api/models/me/fail403/commit'),
    (404, 'POST', '/api/models/me/fail404/commit'),
    (500, 'POST', '/api/models/me/fail500/commit'),
    (429, 'POST', '/api/models/me/fail429/preupload'),
])
def test_a_failed_push_says_why_and_how_to_try_again_without_the_token(hub, client, run_dir, status, method, path):
    repo_id = f'me/fail{status}'
    # A careless server that echoes the request's headers must not bring the token into the message.
    hub.fail(method, path, status=status, body=f'no: Authorization: Bearer {TOKEN}')
    error = error_of(client, push, run_dir, repo_id, private=True, license='mit')
    assert type(error).__name__ == 'PushError'
    assert str(status) in str(error) and TOKEN not in repr(error) and '***' in str(error)
    retry = f'python -m timm_kd.hub push {run_dir} {repo_id} --private --license mit'
    assert str(error).endswith(retry)
    assert set(hub.files(repo_id)) == {'.gitattributes'}


@pytest.mark.soak  # of huggingface_hub: that it tries again, and how long it waits
def test_the_client_retries_an_upload_that_was_cut_and_one_the_storage_refused(hub, client, images, tmp_path):
    run_dir = make_run(tmp_path / 'run', seed=2)
    hub.fail('PUT', '/lfs/upload/me/flaky/', status=None, times=1)
    hub.fail('PUT', '/lfs/upload/me/flaky/', status=503, times=1)
    client(push, run_dir, 'me/flaky')
    assert {('PUT', None), ('PUT', 503)} <= {(method, status) for method, _, status, _ in hub.log}
    logits, _ = client(pull, 'me/flaky', tmp_path / 'cache', images)
    np.testing.assert_array_equal(logits, expected_logits(run_dir, images))


@pytest.mark.soak  # the client waits half a minute between its tries
def test_the_command_line_survives_a_hub_that_cuts_every_upload_and_its_advice_works(hub, client, tmp_path):
    run_dir = make_run(tmp_path / 'run', seed=1)
    hub.fail('PUT', '/lfs/upload/me/cut/', status=None)
    environment = hub.environment(tmp_path / 'home') | {'HF_TOKEN': TOKEN}
    command = [sys.executable, '-m', 'timm_kd.hub', 'push', str(run_dir), 'me/cut', '--license', 'mit']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4
    assert TOKEN not in done.stdout + done.stderr
    assert {path.name for path in (run_dir / 'hub').iterdir()} == FILES
    assert set(hub.files('me/cut')) == {'.gitattributes'}

    hub.faults.clear()
    _, _, command = done.stderr.strip().splitlines()[-1].partition('To try again: ')
    python, dash_m, module, *argv = shlex.split(command)
    assert (python, dash_m, module) == ('python', '-m', 'timm_kd.hub')
    code, output, _ = client(run, 'timm_kd.hub.__main__', argv)
    oid, _, files = hub.repos['me/cut'].branches['main'][-1]
    assert (code, output.strip()) == (0, f'{hub.url}/me/cut/commit/{oid}')
    assert set(files) - {'.gitattributes'} == FILES


# Through the training script


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """Return the flags of a short run on an image folder of three classes of coloured noise."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split in ('train', 'validation'):
        for channel, name in enumerate(CLASSES):
            (folder / 'pets' / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / 'pets' / split / name / f'{index}.png')
    return [
        str(folder / 'pets'), '--model', 'test_resnet', '--img-size', '32', '--num-classes', '3', '--epochs', '1',
        '-b', '6', '--workers', '0', '--device', 'cpu', '--kd-loss', 'dkd', '--output', str(folder),
    ]


def test_the_script_trains_with_a_teacher_of_the_hub_and_pushes_what_timm_pulls(
        hub, client, pushed, training, images, tmp_path,
):
    environment = hub.environment(tmp_path / 'home') | {'HF_TOKEN': TOKEN}
    script = Path(__file__).parent.parent / 'train_kd.py'
    flags = ['--teacher', f'hf-hub:{pushed}', '--push-to-hub', 'me/trained', '--hub-private', '--experiment', 'pushed']
    done = subprocess.run(
        [sys.executable, str(script), *training, *flags], env=environment, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    output = Path(training[-1], 'pushed')
    assert all(TOKEN.encode() not in path.read_bytes() for path in output.rglob('*') if path.is_file())

    logits, config = client(pull, 'me/trained', tmp_path / 'cache', images)
    np.testing.assert_array_equal(logits, expected_logits(output, images))
    assert tuple(config['label_names']) == tuple(CLASSES) and tuple(config['input_size']) == (3, 32, 32)

    card = ModelCard(hub.files('me/trained')['README.md'].decode())
    (row,) = csv.DictReader((output / 'summary.csv').read_text().splitlines())
    assert [metric['value'] for metric in card.data.to_dict()['model-index'][0]['results'][0]['metrics']] == \
        pytest.approx([float(row['eval_top1']) / 100, float(row['eval_top5']) / 100], abs=1e-6)
    assert f'https://huggingface.co/{pushed}' in card.text
    assert f'on {float(row["eval_agreement"]):.2f} % of the images' in card.text
    for name, content in hub.files('me/trained').items():
        if name.endswith(('.md', '.yaml', '.csv', '.json')):
            assert training[-1] not in content.decode(), name


def test_without_a_token_the_script_stops_before_training(client, training):
    flags = ['--teacher', 'local-dir:/nowhere', '--push-to-hub', 'me/never', '--experiment', 'no-token']
    code, _, errors = client(run, 'timm_kd.train', training + flags, token=None)
    assert code == 2 and '--push-to-hub me/never: no Hugging Face token: run `hf auth login`' in errors
    assert not Path(training[-1], 'no-token').exists()


def test_a_push_that_fails_at_the_end_keeps_the_trained_student_and_exits_with_4(hub, client, pushed, training):
    hub.fail('POST', '/api/models/me/lost/commit', status=500)
    flags = ['--teacher', f'hf-hub:{pushed}', '--push-to-hub', 'me/lost', '--experiment', 'not-pushed']
    code, _, errors = client(run, 'timm_kd.train', training + flags)
    output = Path(training[-1], 'not-pushed')
    assert code == 4 and f'python -m timm_kd.hub push {output} me/lost' in errors
    assert (output / 'model_best.pth.tar').exists()
    assert {path.name for path in (output / 'hub').iterdir()} == FILES


# The folder and the card, which need no Hub


@pytest.fixture(scope='module')
def folder(run_dir):
    return Path(push_run(run_dir, 'me/pets-student', license='apache-2.0', dry_run=True))


@pytest.fixture(scope='module')
def card(folder):
    return ModelCard.load(folder / 'README.md')


def test_a_dry_run_writes_and_lists_the_folder_and_needs_no_token(run_dir, caplog, monkeypatch):
    monkeypatch.delenv('HF_TOKEN', raising=False)
    caplog.set_level(logging.INFO, logger='timm_kd')
    folder = Path(push_run(run_dir, 'me/pets-student', dry_run=True))
    assert folder == run_dir / 'hub' and {path.name for path in folder.iterdir()} == FILES
    listed = [record.message for record in caplog.records if record.message.startswith('Would push')]
    assert len(listed) == len(FILES) and all('bytes' in line for line in listed)


def test_the_folder_loads_into_timm_from_disk(folder, run_dir, images):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    np.testing.assert_array_equal(logits_of(model, images), expected_logits(run_dir, images))


def test_the_weights_are_contiguous_tensors_of_the_student_only(folder):
    with safe_open(folder / 'model.safetensors', 'pt') as weights:
        assert set(weights.keys()) == set(timm.create_model('test_resnet', num_classes=3).state_dict())


def test_the_config_claims_no_licence_or_origin_of_the_weights_timm_publishes(folder):
    config = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    assert not {'license', 'tag', 'origin_url', 'hf_hub_id', 'url'} & config.keys()


def test_no_published_text_has_a_local_path(folder, run_dir):
    for name in FILES - {'model.safetensors', 'curves.png'}:
        text = (folder / name).read_text()
        assert '/home' not in text and 'jane' not in text and str(run_dir) not in text, name


def test_the_published_flags_are_those_of_the_run_with_paths_cut_to_their_names(folder):
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (args['data_dir'], args['teacher'], args['img_size']) == ('pets', 'local-dir:r34', 32)


@pytest.mark.parametrize(('value', 'scrubbed'), [
    ('/data/imagenet/', 'imagenet'),
    ('local-dir:/home/me/r 34', 'local-dir:r 34'),
    ('--data-dir=/mnt/x', '--data-dir=x'),
    ('~me/data/x', 'x'),
    ('file:///srv/t.pth', 't.pth'),
    (r'C:\Users\me\t.pth', 't.pth'),
    ({'file': ['/a/b', 'c']}, {'file': ['b', 'c']}),
    ('hf-hub:me/x', 'hf-hub:me/x'),
    ('https://host/a', 'https://host/a'),
    ('runs/a', 'runs/a'),
    ('rand-m9-mstd0.5', 'rand-m9-mstd0.5'),
    (f'token={TOKEN}', 'token=***'),
    (0.5, 0.5),
])
def test_scrubbing_takes_absolute_paths_and_tokens_and_nothing_else(value, scrubbed):
    assert scrub(value) == scrubbed


def test_the_metadata_is_what_the_hub_understands(card):
    data = card.data.to_dict()
    assert data['library_name'] == 'timm' and data['pipeline_tag'] == 'image-classification'
    assert data['license'] == 'apache-2.0'
    assert {'knowledge-distillation', 'nkd', 'teacher:r34'} <= set(data['tags'])
    assert 'base_model' not in data and 'datasets' not in data
    (result,) = data['model-index'][0]['results']
    assert result['dataset'] == {'name': 'pets', 'type': 'imagefolder', 'split': 'validation'}
    assert [metric['value'] for metric in result['metrics']] == [0.7125, 0.9875]


def test_the_card_states_the_figures_of_the_published_epoch(card, run_dir):
    parameters = json.loads((run_dir / 'run.json').read_text())['student']['parameters']
    assert f'| Student | `test_resnet` | {parameters:,} | 71.25 | 98.75 |' in card.text
    assert '| Teacher | `resnet34` (`r34`) | 21,286,211 | 91.50 | 99.25 |' in card.text
    assert 'on 83.50 % of the images' in card.text and 'after epoch 0' in card.text
    assert r'\gamma' in card.text and '| gamma, weight of the other classes | 1.5 |' in card.text
    assert '| weight of D | 0.75 |' in card.text
    assert 'train-kd pets --model test_resnet --teacher local-dir:r34' in card.text
    assert 'arXiv:2208.10139' in card.text and '![' in card.text


def test_another_checkpoint_brings_its_own_figures(tmp_path):
    run_dir = make_run(tmp_path / 'run', ema=False)
    folder = Path(push_run(run_dir, 'me/x', checkpoint='last.pth.tar', dry_run=True))
    card = ModelCard.load(folder / 'README.md')
    assert '| 64.50 |' in card.text and 'after epoch 1' in card.text


def edit_record(run_dir: Path, **changes: object) -> None:
    path = run_dir / 'run.json'
    record = json.loads(path.read_text())
    record['student'] |= changes.pop('student', {})
    path.write_text(json.dumps(record | changes))


@pytest.fixture
def copied_run(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / 'run', ignore=shutil.ignore_patterns('hub'))


@pytest.fixture
def card_of(copied_run):
    """Write the card of the run after changes in its run.json."""
    def write(revision: str | None = None, **changes: object) -> ModelCard:
        edit_record(copied_run, **changes)
        return ModelCard.load(Path(push_run(copied_run, 'me/x', revision=revision, dry_run=True)) / 'README.md')
    return write


def teacher_record(source: str) -> dict:
    """The entry of a teacher in run.json."""
    return {'source': source, 'model': 'resnet34', 'parameters': 1, 'top1': 90.0, 'top5': 99.0}


def loss_record(name: str, parameters: dict[str, float | bool], warmup_epochs: int = 0) -> dict:
    """The entry of a loss in run.json."""
    return {
        'name': name, 'parameters': parameters, 'task_loss_weight': 1.0, 'distill_loss_weight': 2.0,
        'warmup_epochs': warmup_epochs,
    }


def test_the_command_of_the_card_still_quotes_what_a_shell_needs_quoted(card_of):
    card = card_of(command="train-kd '/my data/pets' --teacher-kwargs 'depth=3 4' --output /tmp/o")
    assert "\ntrain-kd pets --teacher-kwargs 'depth=3 4' --output o\n" in card.text


def test_a_student_that_started_from_hub_weights_names_them_as_its_base(card_of):
    card = card_of(student={'pretrained_source': 'resnet18.tv_in1k'})
    assert card.data.base_model == 'timm/resnet18.tv_in1k'
    assert card.data.to_dict()['base_model_relation'] == 'finetune'


@pytest.mark.parametrize(('source', 'hub_id'), [
    ('resnet34.tv_in1k', 'timm/resnet34.tv_in1k'),
    ('hf-hub:you/r34@v2', 'you/r34'),
])
def test_a_teacher_of_the_hub_is_linked(card_of, source, hub_id):
    card = card_of(teacher=[teacher_record(source)])
    assert f'(https://huggingface.co/{hub_id})' in card.text
    assert f'teacher:{hub_id}' in card.data.tags


def test_a_plain_training_run_has_a_card_without_distillation(card_of):
    card = card_of(teacher=None, loss=None)
    assert 'distillation' not in str(card) and 'Teacher' not in card.text


@pytest.mark.parametrize(('name', 'teacher', 'title', 'citation'), [
    ('kd', True, 'Knowledge distillation (KD)', 'arXiv:1503.02531'),
    ('dkd', True, 'Decoupled knowledge distillation (DKD)', 'arXiv:2203.08679'),
    ('nkd', True, 'Normalized knowledge distillation (NKD)', 'arXiv:2303.13005'),
    ('tfnkd', False, 'Teacher-free NKD (tf-NKD)', 'arXiv:2208.10139'),
    ('tfkd', False, 'Teacher-free KD by regularization (Tf-KD reg)', 'arXiv:1909.11723'),
    ('tfkd', True, 'Teacher-free KD by self-training (Tf-KD self)', 'arXiv:1909.11723'),
])
def test_the_card_states_the_loss_as_its_class_does(card_of, name, teacher, title, citation):
    loss = loss_record(name, KD_LOSSES[name].hyper_parameters(), warmup_epochs=7)
    text = card_of(loss=loss, **({} if teacher else {'teacher': None})).text
    assert f'{title}: the training loss' in text and citation in text
    assert f'$${KD_LOSSES[name].stated(teacher).formula}$$' in text
    assert '| epochs over which the weight of D rises | 7 |' in text
    assert 'sun2024logit' not in text and 'leftarrow' not in text


def test_the_card_of_a_loss_that_is_not_registered_states_its_name_and_parameters(card_of):
    text = card_of(loss=loss_record('mine', {'margin': 0.5})).text
    assert 'the distillation loss `mine`.' in text and '$$' not in text
    assert '| margin | 0.5 |\n| weight of the task loss | 1.0 |\n| weight of D | 2.0 |' in text


@pytest.mark.parametrize('name', [
    'a|b', 'a`b', '<img src=x onerror=alert(1)>', '[x](javascript:0)', '{{ 7 * 7 }}', '{% for %}', 'a\n# b', '$$x$$',
    '*a*',
])
def test_what_a_user_names_stays_text_in_the_card(card_of, name):
    command = shlex.join(['train-kd', 'x', '--experiment', f'```{name}'])
    card = card_of("it's", teacher=[teacher_record(f'/home/jane/{name}')], command=command)
    assert f'teacher:{name}' in card.data.tags
    teacher_row, = (line for line in card.text.splitlines() if line.startswith('| Teacher'))
    assert teacher_row.count('|') == 6 and teacher_row.endswith('| 1 | 90.00 | 99.00 |')
    shown = re.search(r'\(<code>(.*)</code>\)', teacher_row)[1]
    assert html.unescape(shown) == name and not set(shown) & set('|`<>[]{}*$\n')
    # The command is a block that no line of its own ends.
    assert f'````sh\n{command}\n````\n' in card.text
    snippet = card.text.split('```python\n')[1].split('```')[0]
    assert ast.parse(snippet) and "hf-hub:me/x@it's" in snippet


def test_the_card_says_that_logits_were_standardized_and_cites_the_paper(card_of):
    text = card_of(loss=loss_record('kd', {'temperature': 2.0, 'logit_std': True})).text
    assert 'are standardized first' in text and r'z \leftarrow' in text and 'arXiv:2403.01427' in text
    assert 'logit_std' not in text and 'weight of D rises' not in text


def test_every_file_of_the_package_beside_its_code_is_declared_as_package_data():
    tomllib = pytest.importorskip('tomllib')
    root = Path(__file__).parents[1]
    declared = tomllib.loads((root / 'pyproject.toml').read_text())['tool']['setuptools']['package-data']
    shipped = {path for package, globs in declared.items() for glob in globs
               for path in (root / package.replace('.', '/')).glob(glob)}
    recipes = (root / 'timm_kd' / 'hparams').glob('*')  # behind a link, which rglob does not follow
    files = {*(root / 'timm_kd').rglob('*.*'), *recipes}
    assert shipped == {path for path in files if path.suffix not in ('.py', '.pyc')}


def test_without_matplotlib_the_card_has_no_picture_and_a_log_line_says_so(card_of, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert '![' not in card_of().text and not (tmp_path / 'run' / 'hub' / 'curves.png').exists()
    assert 'matplotlib is not installed' in caplog.text


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda run: (run / 'run.json').unlink(), 'is not the output folder of a run: it has no run.json'),
    (lambda run: (run / 'run.json').write_text('{'), 'run.json is damaged'),
    (lambda run: (run / 'run.json').write_text('{}'), 'its run.json names no student'),
    (lambda run: [path.unlink() for path in run.glob('*.tar')], 'has no checkpoint'),
    (lambda run: edit_record(run, student={'num_classes': 5}), 'does not hold the student'),
])
def test_a_folder_that_is_no_run_is_a_usage_error(copied_run, spoil, message):
    spoil(copied_run)
    with pytest.raises(UsageError, match=message):
        push_run(copied_run, 'me/x', dry_run=True)


@pytest.mark.soak
def test_all_of_this_holds_under_the_oldest_client(tmp_path):
    # timm names no oldest huggingface_hub; this is the first whose errors are where this project looks for them.
    oldest = 'huggingface_hub==0.25.0'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--target', str(tmp_path), oldest], check=True)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not soak', __file__],
        env=os.environ | {'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout
