"""A small Hugging Face Hub on loopback, for tests: what the real client needs to push, pull and be refused.

    with Hub(tokens={'hf_writer': 'me'}) as hub:
        ...                                  # a client process with the environment hub.environment(home)

The paths, headers and statuses are those that `huggingface_hub` sends and reads (its sources are the specification):
https://huggingface.co/docs/hub/api, and the Git LFS batch API. Content lives in memory.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A model repository: its branches are lists of commits, a commit is (oid, message, {path: content})."""

    private: bool
    branches: dict[str, list[tuple[str, str, dict[str, bytes]]]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, changes: dict[str, bytes]) -> str:
        commits = self.branches.setdefault(branch, [])
        files = {**(commits[-1][2] if commits else {}), **changes}
        oid = hashlib.sha1(repr((branch, len(commits), message, sorted(files))).encode()).hexdigest()
        commits.append((oid, message, files))
        return oid

    def find(self, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


@dataclass
class Fault:
    """What happens instead of an answer: a status, or (status None) the connection cut while the body arrives."""

    method: str
    path: re.Pattern[str]
    status: int | None
    times: float
    body: str


class Hub:
    """Serve a Hub: `repos` is its state, `log` has (method, path, status, whether with a token) of every request.

    Args:
        tokens: User name by token.
        read_only: The tokens that may only read.
    """

    def __init__(self, tokens: dict[str, str], read_only: tuple[str, ...] = ()) -> None:
        self.tokens, self.read_only = tokens, read_only
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int | None, bool]] = []
        self.lock = threading.Lock()
        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        # Large files live on another host, as the real Hub has it: the client must not send its token there.
        self.storage_url = f'http://localhost:{self._server.server_port}'

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process whose client speaks to this Hub; a token may lie in its home."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
        return kept | {
            'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1', 'NO_PROXY': '127.0.0.1,localhost',
        }

    def fail(self, method: str, path: str, status: int | None, times: float = float('inf'), body: str = '') -> None:
        """Answer the next `times` requests whose path matches with a status, or cut them (status None)."""
        self.faults.append(Fault(method, re.compile(path), status, times, body))

    def create(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit('main', 'initial commit', {'.gitattributes': b'*.safetensors filter=lfs\n'})
        return repo

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        return self.repos[repo_id].find(revision)[2]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None


class _Answer(Exception):
    """End a request with a status, a body and headers."""

    def __init__(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else b'' if body is None else json.dumps(body).encode()


def _missing(kind: str, what: str) -> _Answer:
    message = f'{kind} not found: {what}'
    return _Answer(404, {'error': message}, {'X-Error-Code': f'{kind}NotFound', 'X-Error-Message': message})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Keep the test output quiet."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.take_fault(self.command, path)
        if fault and fault.status is None:
            self.hub.log.append((self.command, path, None, bool(self._token)))
            self.rfile.read(min(1024, int(self.headers.get('Content-Length', 0)) // 2))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self._read_body()
        try:
            if fault:
                # Retry-After keeps the client's waits at a second each.
                raise _Answer(fault.status, {'error': fault.body}, {'Retry-After': '0', 'X-Error-Message': fault.body})
            self._route(path)
        except _Answer as answer:
            self.hub.log.append((self.command, path, answer.status, bool(self._token)))
            self.send_response(answer.status)
            headers = {'Content-Type': 'application/json', 'Content-Length': str(len(answer.body)), **answer.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(answer.body)

    def _read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str) -> None:
        name = r'(?P<repo_id>[^/]+/[^/]+)'
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ('POST', r'/api/repos/create', self._create_repo),
            ('POST', r'/api/validate-yaml', self._validate_yaml),
            ('GET', rf'/api/models/{name}(/revision/(?P<revision>.+))?', self._model_info),
            ('POST', rf'/api/models/{name}/branch/(?P<branch>.+)', self._create_branch),
            ('POST', rf'/api/models/{name}/preupload/(?P<revision>.+)', self._preupload),
            ('POST', rf'/api/models/{name}/commit/(?P<revision>.+)', self._commit),
            ('POST', rf'/{name}\.git/info/lfs/objects/batch', self._lfs_batch),
            ('PUT', rf'/lfs/upload/{name}/(?P<oid>\w+)', self._lfs_upload),
            ('GET', r'/lfs/download/(?P<oid>\w+)', self._lfs_download),
            ('GET', rf'/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)', self._resolve),
            ('HEAD', rf'/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)', self._resolve),
        ]
        for method, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                answer(**match.groupdict())
        raise _Answer(404, {'error': f'no such page: {path}'})

    # Who is asking, and what may they do

    @property
    def _token(self) -> str:
        return self.headers.get('Authorization', '').removeprefix('Bearer ')

    def _user(self) -> str:
        user = self.hub.tokens.get(self._token)
        if user is None:
            message = 'Invalid credentials in Authorization header'
            raise _Answer(401, {'error': message}, {'X-Error-Message': message})
        return user

    def _readable(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        is_owner = self.hub.tokens.get(self._token) == repo_id.split('/')[0]
        if repo is None or (repo.private and not is_owner):
            raise _missing('Repo', repo_id)
        return repo

    def _writable(self, repo_id: str) -> Repo:
        repo = self._readable(repo_id)
        if self._user() != repo_id.split('/')[0] or self._token in self.hub.read_only:
            self._forbid(f'You do not have write access to {repo_id}')
        return repo

    def _forbid(self, message: str) -> None:
        raise _Answer(403, {'error': message}, {'X-Error-Message': message})

    # The API

    def _create_repo(self) -> None:
        request, user = json.loads(self.body), self._user()
        owner = request.get('organization') or user
        repo_id = f'{owner}/{request["name"]}'
        url = {'url': f'{self.hub.url}/{repo_id}'}
        if owner != user or self._token in self.hub.read_only:
            self._forbid(f'You do not have the rights to create a model under the namespace "{owner}"')
        if repo_id in self.hub.repos:
            raise _Answer(409, {'error': 'You already created this model repo', **url})
        # `visibility` took the place of `private` in huggingface_hub 1.x.
        self.hub.create(repo_id, private=request.get('private') or request.get('visibility') == 'private')
        raise _Answer(200, url)

    def _validate_yaml(self) -> None:
        if not json.loads(self.body)['content'].startswith('---\n'):
            raise _Answer(400, {'errors': [{'message': 'no metadata'}], 'warnings': []})
        raise _Answer(200, {'errors': [], 'warnings': []})

    def _model_info(self, repo_id: str, revision: str | None) -> None:
        repo = self._readable(repo_id)
        oid, _, files = self._found(repo, revision or 'main')
        siblings = [{'rfilename': name} for name in files]
        raise _Answer(200, {
            'id': repo_id, 'modelId': repo_id, 'sha': oid, 'private': repo.private, 'siblings': siblings, 'tags': [],
        })

    def _create_branch(self, repo_id: str, branch: str) -> None:
        repo = self._writable(repo_id)
        if branch in repo.branches:
            raise _Answer(409, {'error': f'Reference already exists: {branch}'})
        repo.branches[branch] = list(repo.branches['main'])
        raise _Answer(200, {'ref': branch})

    def _preupload(self, repo_id: str, revision: str) -> None:
        _, _, present = self._found(self._writable(repo_id), revision)
        files = []
        for file in json.loads(self.body)['files']:
            is_lfs, content = file['path'].endswith(('.safetensors', '.png')), present.get(file['path'])
            oid = content and (hashlib.sha256(content).hexdigest() if is_lfs else _git_sha(content))
            mode = 'lfs' if is_lfs else 'regular'
            files.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        raise _Answer(200, {'files': files})

    def _lfs_batch(self, repo_id: str) -> None:
        self._writable(repo_id)
        objects = []
        for item in json.loads(self.body)['objects']:
            objects.append({**item, 'authenticated': True})
            if item['oid'] not in self.hub.blobs:
                upload = {'href': f'{self.hub.storage_url}/lfs/upload/{repo_id}/{item["oid"]}'}
                objects[-1]['actions'] = {'upload': upload}
        raise _Answer(200, {'transfer': 'basic', 'objects': objects})

    def _lfs_upload(self, repo_id: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, {'error': 'the content does not have this hash'})
        self.hub.blobs[oid] = self.body
        raise _Answer(200)

    def _lfs_download(self, oid: str) -> None:
        raise _Answer(200, self.hub.blobs[oid], {'Content-Type': 'application/octet-stream'})

    def _commit(self, repo_id: str, revision: str) -> None:
        repo = self._writable(repo_id)
        self._found(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes = {}
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                changes[value['path']] = base64.b64decode(value['content'])
            elif value['oid'] in self.hub.blobs:
                changes[value['path']] = self.hub.blobs[value['oid']]
            else:
                raise _Answer(400, {'error': f'{value["path"]} was not uploaded'})
        oid = repo.commit(revision, lines[0]['value']['summary'], changes)
        url = f'{self.hub.url}/{repo_id}/commit/{oid}'
        raise _Answer(200, {'commitUrl': url, 'commitOid': oid, 'success': True})

    def _resolve(self, repo_id: str, revision: str, file: str) -> None:
        oid, _, files = self._found(self._readable(repo_id), revision)
        content = files.get(file)
        if content is None:
            raise _missing('Entry', file)
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {'X-Repo-Commit': oid, 'ETag': f'"{_git_sha(content)}"', 'Accept-Ranges': 'bytes'}
        if sha256 in self.hub.blobs:
            linked = {'X-Linked-Etag': f'"{sha256}"', 'X-Linked-Size': str(len(content))}
            raise _Answer(302, None, {**headers, **linked, 'Location': f'{self.hub.storage_url}/lfs/download/{sha256}'})
        raise _Answer(200, content, {**headers, 'Content-Type': 'text/plain'})

    def _found(self, repo: Repo, revision: str) -> tuple[str, str, dict[str, bytes]]:
        found = repo.find(revision)
        if found is None:
            raise _missing('Revision', revision)
        return found


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
