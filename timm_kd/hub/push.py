"""Bringing a run to the Hub: the check before the first epoch, and one atomic commit after the last.

The token is the Hub client's own (`HF_TOKEN`, or `hf auth login`): it is never a parameter here, and every message is
freed of it before it is raised or logged.
"""
import logging
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from ..errors import LOG_IN, CommandError, ExitCode, UsageError, shortened
from ..version import __version__
from .card import Publication
from .export import export_run, read_finished_run
from .scrub import without_token

_logger = logging.getLogger(__name__)

_ADVICE = {
    401: f'the Hub does not accept the token: {LOG_IN}; ',
    403: f'the token may not write there: take another owner, or a token with write access ({LOG_IN}); ',
}


class PushError(CommandError, RuntimeError):
    """A trained student that did not reach the Hub: its folder is ready, and the message says how to try again."""
    exit_code = ExitCode.NOT_PUSHED


def check_access(repo_id: str, private: bool = False, revision: str | None = None) -> None:
    """Find out, before anything is trained, whether a push to the repository will be allowed.

    The one sure test is to do it: the repository (and the branch) is created if it does not exist, and the Hub is asked
    whether a file may be committed to it. A run that fails later leaves an empty repository behind, which its next
    attempt uses.

    Args:
        repo_id: `owner/name`.
        private: Whether the repository must be private.
        revision: The branch to push to, `main` unless given.

    Raises:
        UsageError: No token, no permission, a public repository where a private one was asked for, an impossible name,
            or a Hub out of reach.
    """
    _validate(repo_id)
    try:
        _open_repo(_client(), repo_id, private, revision)
    # The client's errors have no common base: HTTP, network, its offline mode, a malformed answer.
    except Exception as error:
        raise UsageError(f'{repo_id}: {_explain(error)}.') from None


def push_run(
        run_dir: str | Path,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        checkpoint: str | None = None,
        license: str | None = None,
        dataset: str | None = None,
        dry_run: bool = False,
) -> str:
    """Write `RUN_DIR/hub/` and push it as one commit; an existing repository gets a new one.

    Args:
        run_dir: The output folder of a run.
        repo_id: `owner/name`.
        private: Whether the repository must be private.
        revision: The branch to push to, created if need be; `main` unless given.
        checkpoint: The checkpoint to publish, the best one by the run's metric unless given.
        license: A licence for the card's metadata, such as `apache-2.0`; none is claimed unless given.
        dataset: The training data's id on the Hub, for the card's metadata.
        dry_run: Whether to stop when the folder is written.

    Returns:
        The commit's URL, or the folder's path after a dry run.

    Raises:
        UsageError: The repository id, the run's folder or the checkpoint cannot be used.
        PushError: Anything else went wrong; the run is untouched.
    """
    _validate(repo_id)
    run = read_finished_run(run_dir)
    publication = Publication(repo_id, revision=revision, license=license, dataset=dataset)
    try:
        files = export_run(run, publication, checkpoint)
        for path in files:
            _logger.info(f'{"Would push" if dry_run else "Pushing"} {path} ({path.stat().st_size:,} bytes)')
        if dry_run:
            return str(run.folder / 'hub')
        api = _client()
        _open_repo(api, repo_id, private, revision)
        # Not upload_folder: over a slow line newer clients split it into several commits.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files],
            commit_message=f'Upload {run.record["student"]["model"]} trained by timm-kd {__version__}',
            revision=revision,
        )
    except UsageError:
        raise
    # Whatever else went wrong, the trained student is safe on disk, and the user must learn how to go on.
    except Exception as error:
        options = {'--revision': revision, '--checkpoint': checkpoint, '--license': license, '--dataset': dataset}
        words = ['python', '-m', 'timm_kd.hub', 'push', str(run_dir), repo_id, *(['--private'] if private else [])]
        words += [word for flag, value in options.items() if value for word in (flag, value)]
        again = shlex.join(words)
        raise PushError(f'{run_dir} was not pushed to {repo_id}: {_explain(error)}. To try again: {again}') from None
    _logger.info(f'Pushed {run_dir} to {commit.commit_url}')
    return commit.commit_url


def _validate(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f'{repo_id!r} is not a repository of the Hub: {error}') from None
    if '/' not in repo_id:
        raise UsageError(f'{repo_id} has no owner: write it as OWNER/{repo_id}.')


def _client() -> HfApi:
    token = get_token()
    if token is None:
        raise PermissionError(f'no Hugging Face token: {LOG_IN} to a token with write access')
    return HfApi(token=token, library_name='timm-kd', library_version=__version__)


def _open_repo(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Create what does not exist yet, and ask for the right to write; the client's errors pass through."""
    # Without `private`, the default of an organization decides.
    api.create_repo(repo_id, exist_ok=True, **({'private': True} if private else {}))
    if private and not api.model_info(repo_id).private:
        raise PermissionError(f'{repo_id} exists and is public: make it private in its settings, or name another')
    if revision not in (None, 'main'):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # create_repo is content with a repository that exists, whoever owns it. Announcing a file asks for the right to
    # write and leaves nothing behind; one this small is not uploaded before its commit.
    probe = CommitOperationAdd(path_in_repo='README.md', path_or_fileobj=b'timm-kd')
    api.preupload_lfs_files(repo_id, [probe], revision=revision)


def _explain(error: Exception) -> str:
    """Return what the client ran into, on one line and without the token."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # The client wraps what happened to an upload in an error that only names the file.
    relevant = causes[:1] if status else dict.fromkeys((causes[0], causes[-1]))
    reason = '; '.join(shortened(cause, most=10_000).rstrip('.') for cause in relevant)
    return _ADVICE.get(status, '') + without_token(reason)
