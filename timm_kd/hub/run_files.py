"""What a training run left in its folder, read back and freed of what must not be published."""
import csv
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, shortened

# A value, or the value behind `--flag=`, `key=` or `local-dir:`, that is an absolute path; `https://...` is none.
_ABSOLUTE_PATH = re.compile(
    r'((?:-{0,2}[\w-]{2,}[=:])*)(?:file://)?(?:~[^/\\]*[/\\]|/(?!/)|[A-Za-z]:[\\/])(.*)',
    re.DOTALL,
)
_HUB_TOKEN = re.compile(r'\bhf_(?:(?:oauth|jwt)_[\w.-]+|[A-Za-z0-9]{8,})')


@dataclass(frozen=True)
class Run:
    """The files of one run.

    Attributes:
        folder: Where they lie.
        record: `run.json`: versions, command, student, teacher, loss, best epoch.
        args: `args.yaml`: every flag of the run by its dest name.
        summary: `summary.csv`: one dict per epoch, in its order, without the columns that are blank.
    """
    folder: Path
    record: dict[str, Any]
    args: dict[str, Any]
    summary: list[dict[str, float]]

    def epoch_metrics(self, epoch: int | None) -> dict[str, float]:
        """Return the row of `summary.csv` written after an epoch, empty where there is none."""
        return next((row for row in self.summary if row.get('epoch') == epoch), {})

    def checkpoint(self, name: str | None = None) -> Path:
        """Return the checkpoint to publish: `name` (a path, or a file of the run), else the best one, else the last.

        Raises:
            UsageError: The file does not exist.
        """
        names = [name] if name else ['model_best.pth.tar', 'last.pth.tar']
        candidates = [folder / file for file in names for folder in (self.folder, Path())]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UsageError(f'{self.folder} has no checkpoint {" or ".join(names)}: name another one.')
        return found


def read_run(folder: str | Path) -> Run:
    """Read the files that the training script leaves in its output folder.

    Raises:
        UsageError: A file is missing or is not what the script writes.
    """
    folder = Path(folder)
    texts = {}
    for name in ('run.json', 'args.yaml', 'summary.csv'):
        try:
            texts[name] = (folder / name).read_text(encoding='utf-8')
        except OSError as error:
            raise UsageError(f'{folder} is not the output folder of a run: {name}: {error.strerror}.') from None
    try:
        record = json.loads(texts['run.json'])
        args = yaml.safe_load(texts['args.yaml'])
        rows = csv.DictReader(texts['summary.csv'].splitlines())
        summary = [{column: float(value) for column, value in row.items() if value} for row in rows]
        if not (isinstance(args, dict) and record['student']['model']):
            raise ValueError('no student in it')
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f'{folder} is not the output folder of a run: {shortened(error)}.') from None
    return Run(folder, record, args, summary)


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


def scrub_command(command: str) -> str:
    """Apply `scrub` to each word of a shell command line."""
    return shlex.join(scrub(shlex.split(command)))
