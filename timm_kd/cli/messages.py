"""How errors name flags; and errors of the library, which name its arguments, put into flags."""
import argparse
import re
from typing import Any


def flag_name(dest: str) -> str:
    """Return a flag as on the command line: `--mean`."""
    return '--local_rank' if dest == 'local_rank' else f'--{dest.replace("_", "-")}'


def as_given(dest: str, value: Any) -> str:
    """Return a flag and its value as on the command line: `--mean 0.5 0.5`."""
    if value is True:
        return flag_name(dest)
    if isinstance(value, dict):
        value = [f'{key}={item}' for key, item in value.items()]
    words = [str(item) or repr('') for item in (value if isinstance(value, list) else [value])]
    return ' '.join([flag_name(dest), *words])


def given(args: argparse.Namespace, *dests: str) -> str:
    """Return flags and their values as on the command line, without those that are not set."""
    values = {dest: getattr(args, dest) for dest in dests}
    unset = {dest for dest, value in values.items() if value is False or value in (None, {})}
    return ' '.join(as_given(dest, value) for dest, value in values.items() if dest not in unset)


# The arguments that errors of the library name in backticks, and the flags that set them.
_FLAGS = {
    **{name: flag_name(name) for name in (
        'mean', 'std', 'train_split', 'val_split', 'num_classes', 'target_key', 'target_format', 'batch_size', 'device',
        'device_modules', 'lr', 'clip_grad')},
    # of `Teacher`
    'model': '--teacher-model',
    'model_kwargs': '--teacher-kwargs',
    'use_ema': '--teacher-ema',
    'img_size': '--teacher-img-size',
    'dtype': '--teacher-dtype',
    'class_map': '--teacher-class-map',
    'class_map_missing': '--teacher-class-map-missing',
    # of stored logits
    'topk': '--teacher-cache-topk',
    'num_epochs': '--teacher-cache-epochs',
    'rebuild': '--teacher-cache-rebuild',
    # of `create_datasets` and `create_train_data`
    'name': '--dataset',
    'num_aug_repeats': '--aug-repeats',
    're_mode': '--remode',
    'replay_seed': '--replayable-data',
}
# What the library's errors name with its value in quotes, and the flags that take that value.
_QUOTED = {'teacher': '--teacher', 'teacher cache': '--teacher-cache', 'class map': '--class-map'}


def in_flags(message: str) -> str:
    """Return an error of the library with the script's flags in place of the arguments it names."""
    quoted = rf"\b({'|'.join(_QUOTED)}) '(.*?)'(?=[\s:,.]|$)"
    message = re.sub(quoted, lambda found: f'{_QUOTED[found[1]]} {found[2]}', message)
    return re.sub(r'`(\w+)`', lambda found: _FLAGS.get(found[1], found[0]), message)
