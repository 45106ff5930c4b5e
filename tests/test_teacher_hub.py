"""Teachers on a Hub on loopback, and in the client's cache; never a token in what is said of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import build
from hub_server import Hub
from huggingface_hub.errors import GatedRepoError, Response
from huggingface_hub.utils import get_session, hf_raise_for_status

from timm_kd.errors import explain

TOKEN = 'hf_thisIsTheReadersSecretToken'
CODE = '''
import logging, sys
logging.basicConfig(level=logging.DEBUG)
import torch
from timm_kd.errors import UsageError
from timm_kd.teacher import Teacher
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
for spec in sys.argv[1:]:
    try:
        print(*Teacher(spec, dtype='float32')(images)[0].tolist())
    except UsageError as error:
        print('refused', error)
'''


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    timm.models.save_for_hf(build(num_classes=5), folder, safe_serialization='both')
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with Hub({TOKEN: 'me'}) as hub:
        hub.create('org/public').commit('main', 'add model', files)
        hub.repos['org/public'].commit('v1', 'add model', files)
        hub.create('me/private', private=True).commit('main', 'add model', files)
        hub.create('org/pickled').commit('main', 'add', {k: v for k, v in files.items() if k != 'model.safetensors'})
        hub.create('org/empty')
        hub.create('org/forbidden')
        hub.fail('HEAD', '/org/forbidden/', 403)
        hub.create('org/transformers').commit('main', 'add', {'config.json': b'{"model_type": "vit"}'})
        yield hub


def ask(environment: dict[str, str], *specs: str) -> dict[str, str]:
    """What a process of its own gets from each spec; fails if it says the token anywhere."""
    result = subprocess.run(
        [sys.executable, '-c', CODE, *specs], env=environment, capture_output=True, text=True, timeout=120)
    assert TOKEN not in result.stdout + result.stderr
    return dict(zip(specs, result.stdout.splitlines(), strict=True))


PUBLIC = ['hf-hub:org/public', 'hf_hub:org/public', 'org/public', 'org/public@v1', 'org/pickled']
REFUSED = {
    'me/private': 'no me/private on the Hub, or it is private: run `hf auth login`',
    'org/absent': 'no org/absent on the Hub',
    'org/public@none': 'org/public@none has no such revision',
    'org/empty': 'org/empty is not a timm model',
    'org/transformers': 'org/transformers is not a timm model',
    'hf-hub:a/b/c': 'a/b/c is not a valid name',
    'org/forbidden': 'refused access to org/forbidden: run `hf auth login`',
}


@pytest.fixture(scope='module')
def answers(hub, tmp_path_factory) -> dict[str, str]:
    """What someone who is not logged in gets."""
    return ask(hub.environment(tmp_path_factory.mktemp('home')), *PUBLIC, *REFUSED)


def assert_loaded(answer: str, num_classes: int = 5, seed: int = 0) -> None:
    assert not answer.startswith('refused'), answer
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = build(num_classes=num_classes, seed=seed)(images)[0]
    torch.testing.assert_close(torch.tensor([float(w) for w in answer.split()]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('spec', PUBLIC)
def test_public_teacher_loads_under_every_spelling(answers, spec):
    assert_loaded(answers[spec])


def test_private_teacher_loads_with_the_clients_login(hub, tmp_path):
    (tmp_path / 'token').write_text(TOKEN)  # where `hf auth login` keeps it
    assert_loaded(ask(hub.environment(tmp_path), 'me/private')['me/private'])


@pytest.mark.parametrize('spec', REFUSED)
def test_what_cannot_be_had_is_explained(answers, spec):
    assert answers[spec].startswith(f"refused teacher '{spec}': ") and REFUSED[spec] in answers[spec]


def test_gated_repository_asks_for_its_terms_and_a_login():
    request = get_session().build_request('GET', 'https://huggingface.co/org/gated/resolve/main/config.json')
    with pytest.raises(GatedRepoError) as refused:
        hf_raise_for_status(Response(403, headers={'X-Error-Code': 'GatedRepo'}, request=request))
    said = explain(refused.value, 'org/gated')
    assert 'org/gated is gated' in said and '`hf auth login`' in said


def fill_cache(cache: Path, repo: str, model: torch.nn.Module) -> None:
    """Puts a model into a Hub cache, laid out as the Hub client does it."""
    entry = cache / f'models--{repo.replace("/", "--")}'
    (entry / 'refs').mkdir(parents=True)
    (entry / 'refs' / 'main').write_text('0' * 40)
    timm.models.save_for_hf(model, entry / 'snapshots' / ('0' * 40), safe_serialization=True)


def test_offline_the_cache_serves_timm_and_hub_names_and_what_is_not_there_is_said(tmp_path):
    fill_cache(tmp_path, 'timm/test_resnet.r160_in1k', build(num_classes=1000))
    fill_cache(tmp_path, 'org/private', build(num_classes=5, seed=1))
    environment = {**os.environ, 'HF_HUB_CACHE': str(tmp_path), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    answers = ask(environment, 'test_resnet', 'org/private', 'hf-hub:org/private', 'resnet34.tv_in1k', 'org/name')
    assert_loaded(answers['test_resnet'], num_classes=1000)
    assert_loaded(answers['org/private'], seed=1)
    assert_loaded(answers['hf-hub:org/private'], seed=1)
    assert 'timm/resnet34.tv_in1k is not in the local cache' in answers['resnet34.tv_in1k']
    assert 'org/name is not in the local cache' in answers['org/name']
