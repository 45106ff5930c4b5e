"""How errors speak of flags: those of the library, which speaks of its arguments, in the script's words."""
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


# The arguments that errors of the library name in backticks, and the flags that set them.
_FLAGS = {
    # of `Teacher`
    'mean': '--mean',
    'std': '--std',
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
    'train_split': '--train-split',
    'val_split': '--val-split',
    'num_classes': '--num-classes',
    'target_key': '--target-key',
    'target_format': '--target-format',
    'batch_size': '--batch-size',
    'num_aug_repeats': '--aug-repeats',
    're_mode': '--remode',
    'replay_seed': '--replayable-data',
    # of `setup_process` and of training
    'device': '--device',
    'device_modules': '--device-modules',
    'lr': '--lr',
    'clip_grad': '--clip-grad',
}
# What the library's errors name with its value in quotes, and the flags that take that value.
_QUOTED = {'teacher': '--teacher', 'teacher cache': '--teacher-cache', 'class map': '--class-map'}


def in_flags(message: str) -> str:
    """Return an error of the library with the script's flags in place of the arguments it names."""
    quoted = rf"\b({'|'.join(_QUOTED)}) '(.*?)'(?=[\s:,.]|$)"
    message = re.sub(quoted, lambda found: f'{_QUOTED[found[1]]} {found[2]}', message)
    return re.sub(r'`(\w+)`', lambda found: _FLAGS.get(found[1], found[0]), message)
