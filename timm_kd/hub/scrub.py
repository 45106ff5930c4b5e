"""What must not be published, taken out of flags and commands: absolute paths and tokens."""
import os
import re
from typing import Any

# A value, or the value behind `--flag=`, `key=` or `local-dir:`, that is an absolute path; `https://...` is none.
_ABSOLUTE_PATH = re.compile(
    r'((?:-{0,2}[\w-]{2,}[=:])*)(?:file://)?(?:~[^/\\]*[/\\]|/(?!/)|[A-Za-z]:[\\/])(.*)',
    re.DOTALL,
)
_HUB_TOKEN = re.compile(r'\bhf_(?:(?:oauth|jwt)_[\w.-]+|[A-Za-z0-9]{8,})')


def scrub(value: Any) -> Any:
    """Replace every absolute path in a (nested) value by its last component, and every Hub token by stars.

    >>> scrub({'data_dir': '/data/imagenet', 'teacher': 'local-dir:/home/me/r34'})
    {'data_dir': 'imagenet', 'teacher': 'local-dir:r34'}
    """
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    match = _ABSOLUTE_PATH.fullmatch(value)
    if match:
        prefix, path = match.groups()
        value = prefix + re.split(r'[/\\]', path.rstrip('/\\'))[-1]
    return without_token(value)


def without_token(text: str) -> str:
    """Replace Hub tokens by stars: what looks like one, and the one in use whatever it looks like."""
    token = os.environ.get('HF_TOKEN') or os.environ.get('HUGGING_FACE_HUB_TOKEN')
    return _HUB_TOKEN.sub('***', text.replace(token, '***') if token else text)
