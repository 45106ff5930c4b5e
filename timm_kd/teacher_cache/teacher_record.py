"""What a cache knows of its teacher beside the logits: its members, and how it did in validation."""
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .key import read_key

_logger = logging.getLogger(__name__)

TEACHER_FILE, MEMBERS_FILE, VALIDATION_FILES = 'teacher.json', 'members.json', 'validation-*.npz'
_MEMBER = {'source', 'model_name', 'num_params'}


def read_members(folder: Path) -> list[dict[str, Any]] | None:
    """Return what a cache knows of its teacher's members; None where no teacher has been there yet.

    Raises:
        UsageError: The file is damaged.
    """
    path = folder / MEMBERS_FILE
    if not path.exists():
        return None
    members = read_key(path).get('members')
    if not isinstance(members, list) or not all(isinstance(m, dict) and _MEMBER <= m.keys() for m in members):
        raise UsageError(f'{path} is damaged: delete it, the next run with the teacher writes it again.')
    return members


def read_validation(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a validation file; an empty dict where it is absent or damaged."""
    try:
        with np.load(path) as stored:  # allow_pickle is off by default
            arrays = dict(stored)
            json.loads(str(arrays['metrics']))
            return arrays
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        _logger.warning(f'{path} is damaged and counts as absent.')
        return {}


def validation_path(folder: Path, key: str) -> Path:
    """Return the file of the validation under a key: students with another crop or filter have one of their own."""
    return folder / VALIDATION_FILES.replace('*', hashlib.sha256(key.encode()).hexdigest()[:12])
