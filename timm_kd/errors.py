"""The error that a user can mend, and what makes its sentence: the nearest name, one line, why the Hub said no."""
import difflib
import math
import operator
import signal
from collections.abc import Iterable
from enum import IntEnum

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# torch and timm advise to switch `weights_only` off for such a file; the sentence here never does.
UNSAFE = (
    'the weights are no plain file of tensors, so loading them could run code, and it was refused. Save the '
    'state_dict() of the model alone, best as .safetensors'
)
LOG_IN = 'run `hf auth login`, or set HF_TOKEN'
_BOUNDS = {
    'above': ('above', operator.gt),
    'at_least': ('of at least', operator.ge),
    'below': ('below', operator.lt),
    'at_most': ('of at most', operator.le),
}


class ExitCode(IntEnum):
    """How the command lines of this project end."""
    DONE = 0
    FAILED = 1
    USAGE = 2
    NON_FINITE = 3
    NOT_PUSHED = 4
    INTERRUPTED = 128 + signal.SIGINT
    TERMINATED = 128 + signal.SIGTERM


class CommandError(Exception):
    """An error that ends a command with its message on one line, and with its exit code."""
    exit_code = ExitCode.FAILED


class UsageError(CommandError, ValueError):
    """A command line, file or data set that cannot work."""
    exit_code = ExitCode.USAGE


def shortened(error: Exception, most: int = 300) -> str:
    """Return the message of an error of timm or torch on one line; `UNSAFE` for a file that could run code."""
    if 'weights_only' in str(error):
        return UNSAFE
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f'{text[:most]}...'


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that proposes the known names nearest to a wrong one, or nothing."""
    near = difflib.get_close_matches(name, [candidate for candidate in known if candidate], n=3, cutoff=0.7)
    return f' (did you mean {" or ".join(near)}?)' if near else ''


def out_of_range(value: float, **bounds: float) -> str:
    """Return what a number should have been ("a value above 0") if it is not finite or outside of its range, or ''.

    The bounds of a range are `above`, `at_least`, `below` and `at_most`.
    """
    if not math.isfinite(value):
        return 'a finite number'
    if all(_BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
        return ''
    return 'a value ' + ' and '.join(f'{_BOUNDS[name][0]} {bound}' for name, bound in bounds.items())


def few(names: Iterable[object], most: int = 3) -> str:
    """Return the first of some names, for a message."""
    words = [str(name) or "''" for name in names]
    return ', '.join(words[:most]) + (', ...' if len(words) > most else '') or 'nothing'


def explain(error: Exception, repo: str) -> str:
    """Say in a sentence why a download from the Hub repository `repo` failed; never with a URL, a header or a token."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the Hub's answer, after which the client looked into its cache
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is one
        return f'{repo} is gated: accept its terms on the Hub, then {LOG_IN}'
    if isinstance(error, RepositoryNotFoundError):
        return f'there is no {repo} on the Hub, or it is private: {LOG_IN}'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo} has no such revision'
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):  # the first is an EntryNotFoundError
        return f'the Hub cannot be reached and {repo} is not in the local cache: download it once with a network'
    if isinstance(error, EntryNotFoundError):
        return f'{repo} is not a timm model: it lacks config.json or weights'
    if isinstance(error, HFValidationError):
        return f'{repo} is not a valid name of a Hub repository'
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return f'the Hub refused access to {repo}: {LOG_IN}'
    if status is not None:
        return f'the Hub answered {status} for {repo}: try again later'
    if isinstance(error, OSError) or type(error).__module__.startswith('httpx'):
        return f'{repo} could not be downloaded ({type(error).__name__}): check the network'
    if isinstance(error, KeyError):
        return f'{repo} is not a timm model: its config.json lacks {error}'
    return f'{repo} cannot be loaded ({shortened(error)})'
