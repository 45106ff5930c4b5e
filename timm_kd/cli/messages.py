"""How errors speak of flags."""
import re
from typing import Any


def as_given(dest: str, value: Any) -> str:
    """Return a flag and its value as on the command line: `--mean 0.5 0.5`."""
    name = '--local_rank' if dest == 'local_rank' else f'--{dest.replace("_", "-")}'
    if value is True:
        return name
    if isinstance(value, dict):
        value = [f'{key}={item}' for key, item in value.items()]
    return f'{name} {" ".join(str(item) or repr("") for item in (value if isinstance(value, list) else [value]))}'


# The arguments of `Teacher` that its errors name in backticks, and the flags that set them.
_TEACHER_FLAGS = {
    'mean': '--mean',
    'std': '--std',
    'model': '--teacher-model',
    'model_kwargs': '--teacher-kwargs',
    'use_ema': '--teacher-ema',
    'img_size': '--teacher-img-size',
    'dtype': '--teacher-dtype',
    'class_map': '--teacher-class-map',
    'class_map_missing': '--teacher-class-map-missing',
}


def in_flags(message: str) -> str:
    """Return an error of the library with the script's flags in place of the arguments it names."""
    message = re.sub(r"\bteacher '(.*?)'(?=[\s:,.]|$)", r'--teacher \1', message)
    return re.sub(r'`(\w+)`', lambda found: _TEACHER_FLAGS.get(found[1], found[0]), message)
