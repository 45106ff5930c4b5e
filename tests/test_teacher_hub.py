"""Teachers on a Hub on loopback: public, private, gated, absent, and never a token in what is said of them."""

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
        print(*Teacher(spec, 5, dtype='float32')(images)[0].tolist())
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


def ask(hub: Hub, home: Path, *specs: str, token: str | None = None) -> dict[str, str]:
    """What a process of its own gets from each spec; fails if it says the token anywhere."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    env.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', OMP_NUM_THREADS='1')
    if token is not None:
        (home / 'token').write_text(token)  # where `hf auth login` keeps it
    result = subprocess.run([sys.executable, '-c', CODE, *specs], env=env, capture_output=True, text=True, timeout=120)
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
    return ask(hub, tmp_path_factory.mktemp('home'), *PUBLIC, *REFUSED)


def assert_loaded(answer: str) -> None:
    assert not answer.startswith('refused'), answer
    with torch.no_grad():
        expected = build(num_classes=5)(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))[0]
    torch.testing.assert_close(torch.tensor([float(w) for w in answer.split()]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('spec', PUBLIC)
def test_public_teacher_loads_under_every_spelling(answers, spec):
    assert_loaded(answers[spec])


def test_private_teacher_loads_with_the_clients_login(hub, tmp_path):
    assert_loaded(ask(hub, tmp_path, 'me/private', token=TOKEN)['me/private'])


@pytest.mark.parametrize('spec', REFUSED)
def test_what_cannot_be_had_is_explained(answers, spec):
    assert answers[spec].startswith(f"refused teacher '{spec}': ") and REFUSED[spec] in answers[spec]


def test_gated_repository_asks_for_its_terms_and_a_login():
    request = get_session().build_request('GET', 'https://huggingface.co/org/gated/resolve/main/config.json')
    with pytest.raises(GatedRepoError) as refused:
        hf_raise_for_status(Response(403, headers={'X-Error-Code': 'GatedRepo'}, request=request))
    said = explain(refused.value, 'org/gated')
    assert 'org/gated is gated' in said and '`hf auth login`' in said
