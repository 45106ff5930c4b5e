"""YAML config files: a mapping of dests to values, read by the parser of the command line, which overrides them."""
import argparse
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, nearest, shortened
from ..losses import KD_LOSSES
from .kd_flags import knob_dests
from .parser import ParseKwargs, Parser
from .task_loss import LOSS_PARAMETERS

_logger = logging.getLogger(__name__)

# YAML 1.1 reads a float only where there is a dot and a signed exponent: 3e-4 and 1.0e5 arrive as strings.
_YAML_MISSED_FLOAT = re.compile(r'[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+')

# Flags that have a default and that timm also takes without a value: `color_jitter: null` switches it off.
_NONE_IS_A_VALUE = ('color_jitter', 'scale', 'ratio', 'layer_decay_min_scale')

# Flags that say the same thing: one of them on the command line replaces the others of the file. A dot separates a
# flag of keyword arguments from one of its keys.
_SAME_THING = (
    ('data', 'data_dir'),
    ('teacher', 'kd_model_name'),
    ('img_size', 'input_size', 'model_kwargs.img_size'),
    ('in_chans', 'input_size', 'model_kwargs.in_chans'),
    ('initial_checkpoint', 'pretrained'),
    ('initial_checkpoint', 'pretrained_path'),
    ('drop_path', 'drop_connect'),
    ('loss', 'bce_loss', 'jsd_loss'),
    ('loss_pos_weight', 'bce_pos_weight'),
    ('cutmix', 'cutmix_minmax'),
    ('lr', 'lr_base'),
    ('opt_eps', 'opt_kwargs.eps'),
    ('opt_betas', 'opt_kwargs.betas'),
    ('amp', 'model_dtype'),
    ('torchscript', 'torchcompile'),
    ('torchscript', 'torchcompile_mode'),
)

# The recipes that ship with the package, by name.
RECIPES = {path.stem: path for path in Path(__file__).parents[1].joinpath('hparams').glob('*.yaml')}


def load_config(path: str, parser: Parser) -> dict[str, Any]:
    """Read a YAML file, or the recipe of this name: a mapping of dests (`batch_size`) to the values of their flags.

    Unknown keys are left out, with a warning.

    Raises:
        UsageError: The file cannot be read, or a value does not suit its flag.
    """
    if not os.path.exists(path) and os.path.basename(path) == path:
        name = path.removesuffix('.yaml')
        if name not in RECIPES:
            raise UsageError(f'--config {path}: no such file, and no recipe of this name{nearest(name, RECIPES)}.')
        path = str(RECIPES[name])
    try:
        with open(path, encoding='utf-8') as file:
            config = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'--config {path}: {getattr(error, "strerror", None) or error}.') from error
    except yaml.YAMLError as error:
        raise UsageError(f'--config {path}: not valid YAML: {shortened(error)}.') from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError(f'--config {path}: expected lines of "key: value", got a {type(config).__name__}.')

    flags = parser.flags
    del flags['config']
    values = {}
    for key, value in config.items():
        if key in flags:
            try:
                values[key] = _read(parser, flags[key], value)
            except argparse.ArgumentError as error:
                raise UsageError(f'--config {path}: {key}: {error.message}.') from error
        elif key == 'config':
            _logger.warning(f'--config {path}: config: ignored, a config file does not include another.')
        else:
            hint = nearest(str(key).replace('-', '_'), flags)
            _logger.warning(f'--config {path}: {key}: ignored, there is no such flag{hint}.')
    return values


def _read(parser: Parser, flag: argparse.Action, value: Any) -> Any:
    """Return what the parser makes of a value; raises `argparse.ArgumentError` as the parser does."""
    refuse = partial(argparse.ArgumentError, flag)
    if value is None:
        if flag.dest in _NONE_IS_A_VALUE:
            return None
        if flag.default in (None, '', [], {}):
            return flag.default
        raise refuse(f'has no value (leave the line out for the default, {flag.default})')
    if isinstance(flag, ParseKwargs):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise refuse(f'expected a mapping of keyword arguments, got {value!r}')
        return _with_floats(value)
    name = flag.option_strings[-1] if flag.option_strings else '--'
    if flag.nargs == 0 or (flag.const is not None and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise refuse(f'expected true or false, got {value!r}')
        return parser.read([name])[flag.dest] if value else flag.default
    appends = isinstance(flag, argparse._AppendAction)
    takes_list = appends or flag.nargs not in (None, '?')
    if value == [] and (appends or flag.default == []):
        return []
    words = []
    for item in value if takes_list and isinstance(value, list) else [value]:
        if isinstance(item, (list, dict)) or item is None:
            raise refuse(f'expected one value, got {item!r}')
        if isinstance(item, bool) and getattr(flag.type, '__name__', 'str') == 'str':
            raise refuse(f'expected text, got {item!r} (in YAML, quote a word such as yes, no, on or off)')
        words.append(str(int(item)) if isinstance(item, float) and item.is_integer() else str(item))
        if takes_list and not appends and isinstance(item, str) and item.startswith('-'):
            raise refuse(f'expected a value, got {item!r}')
    one_by_one = flag.option_strings and (appends or not takes_list)
    return parser.read([f'{name}={word}' for word in words] if one_by_one else [name, *words])[flag.dest]


def _with_floats(value: Any) -> Any:
    """Return keyword arguments, which have no declared types, with the floats that YAML 1.1 takes for text."""
    if isinstance(value, dict):
        return {key: _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return float(value) if isinstance(value, str) and _YAML_MISSED_FLOAT.fullmatch(value) else value


def override(config: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config file and of the command line in one mapping.

    The command line replaces not only the same flag of the file, but also those that say the same thing (see
    `_SAME_THING`) and, with a warning, those that only describe the loss, the schedule or the teacher that it
    replaces.
    """
    config, given = dict(config), dict(given)
    if config.get('input_size') and 'input_size' not in given:  # both the channels and the size
        channels, *size = config['input_size']
        if 'img_size' in given:
            config['in_chans'] = channels
        elif 'in_chans' in given:
            given['input_size'] = [given['in_chans'], *size]
    said = {dest for dest, value in given.items() if value != ''}  # an empty text takes back that flag alone
    for names in _SAME_THING:
        if said & set(names):
            for name in set(names) - given.keys():
                dest, _, key = name.partition('.')
                if key:
                    config[dest] = {k: item for k, item in (config.get(dest) or {}).items() if k != key}
                else:
                    config.pop(dest, None)
    merged = {**config, **given}
    for dest, reason in _left_over(config, merged, given):
        if dest not in given and merged.get(dest, defaults[dest]) != defaults[dest]:
            _logger.warning(f'{reason}: the {dest} of the config file is left out.')
            del merged[dest]
    # Nobody writes `local_rank` into a recipe: a file with it is an args.yaml, which holds every flag. There `device:
    # cuda` is the default written out, a GPU where there is one; in any other file it is a choice.
    if 'local_rank' in config and config.get('device') == 'cuda' and 'device' not in given:
        merged.pop('device')
    # An args.yaml of timm's script, which has no key `kd_loss`, holds timm's default of 4.0 even where nothing has a
    # temperature: no choice of the user. In an args.yaml of this script, or in a recipe, the same value was chosen.
    if 'kd_loss' not in config and config.get('kd_temperature') == 4.0 and 'kd_temperature' not in given:
        plain = not any(merged.get('teacher') or ()) and not merged.get('kd_model_name')
        if plain or merged.get('kd_distill_type') == 'feature' or merged.get('kd_token_distill_type') == 'hard':
            merged.pop('kd_temperature', None)
    return merged


def _left_over(
        config: Mapping[str, Any],
        merged: Mapping[str, Any],
        given: Mapping[str, Any],
) -> Iterator[tuple[str, str]]:
    """Yield the flags that only describe what the command line replaced, each with the reason."""
    if 'kd_loss' in given and config.get('kd_loss') not in (None, given['kd_loss']):
        knobs = KD_LOSSES[given['kd_loss']].hyper_parameters()
        for dest, knob in knob_dests().items():
            if knob not in knobs:
                yield dest, f'--kd-loss {given["kd_loss"]} has no {knob}'
    if given.get('loss') or given.get('bce_loss') or given.get('jsd_loss'):
        loss = given.get('loss') or ('bce' if given.get('bce_loss') else 'jsd')
        for dest, owners in LOSS_PARAMETERS.items():
            if loss not in sum(owners, ()):
                yield dest, f'{loss} has none'
    if given.get('sched', 'wsd') not in ('wsd', 'rsqrt'):
        yield from ((dest, f'--sched {given["sched"]} has none') for dest in ('lr_decay_fn', 'lr_stable_timescale'))
    if given.keys() & {'teacher', 'kd_model_name'}:
        specs = [spec for spec in (*(merged.get('teacher') or ()), merged.get('kd_model_name')) if spec]
        if not specs:
            of_distillation = () if merged.get('kd_loss') else ('kd_', 'task_loss_weight', 'distill_loss_weight')
            left = ('teacher_', 'no_teacher_eval', *of_distillation)
            yield from ((dest, 'there is no teacher') for dest in list(merged) if dest.startswith(left))
        elif not any(os.path.isfile(os.path.expanduser(spec)) for spec in specs):
            yield from ((dest, f'--teacher {specs[0]} is no file') for dest in ('teacher_model', 'teacher_ema'))
