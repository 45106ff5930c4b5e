"""YAML config files: the values of flags by dest name, checked against the flags as the command line is."""
import argparse
import logging
import re
from typing import Any

import yaml

from ..errors import UsageError, nearest
from .parser import ParseKwargs, Parser

_logger = logging.getLogger(__name__)

# YAML 1.1 reads a float only where there is a dot and a signed exponent: 3e-4 and 1.0e5 arrive as strings.
_YAML_MISSED_FLOAT = re.compile(r'[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+')

# Where timm gives None a meaning of its own although the flag has a default.
_NONE_IS_A_VALUE = ('color_jitter', 'scale', 'ratio', 'layer_decay_min_scale')


def load_config(path: str, parser: Parser) -> dict[str, Any]:
    """Read a YAML file of flag values.

    Args:
        path: File with a mapping of dest names (``batch_size``) to values.
        parser: The parser whose flags the values are checked against.

    Returns:
        The values by dest, converted to the types of their flags. Unknown keys are left out, with a warning.

    Raises:
        UsageError: The file cannot be read, or a value does not suit its flag.
    """
    try:
        with open(path, encoding='utf-8') as file:
            config = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'--config {path}: {getattr(error, "strerror", None) or error}') from error
    except yaml.YAMLError as error:
        raise UsageError(f'--config {path}: not valid YAML: {" ".join(str(error).split())}') from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError(f'--config {path}: expected lines of "key: value", got a {type(config).__name__}')

    actions = {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}
    del actions['config']
    values = {}
    for key, value in config.items():
        if key in actions:
            try:
                values[key] = _convert(actions[key], value)
            except (ValueError, TypeError) as error:
                raise UsageError(f'--config {path}: {key}: {error}') from error
        else:
            _warn_unknown(path, key, actions)
    return values


def _warn_unknown(path: str, key: Any, known: dict[str, argparse.Action]) -> None:
    if key == 'config':
        _logger.warning(f'--config {path}: config: ignored, a config file does not include another')
        return
    hint = nearest(str(key).replace('-', '_'), known)
    _logger.warning(f'--config {path}: {key}: ignored, there is no such flag{hint}')


def _convert(action: argparse.Action, value: Any) -> Any:
    """The value as the flag would have it; raises ValueError or TypeError with what was expected."""
    if value is None:
        return _convert_none(action)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f'expected true or false, got {value!r}')
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f'expected a mapping of keyword arguments, got {value!r}')
        return _convert_nested(value)
    if action.nargs == '?' and action.const is not None and isinstance(value, bool):
        return action.const if value else action.default  # torchcompile: true
    if isinstance(action, argparse._AppendAction) or action.nargs not in (None, '?'):
        return _convert_list(action, value)
    return _convert_scalar(action, value)


def _convert_none(action: argparse.Action) -> Any:
    if action.default is None or action.dest in _NONE_IS_A_VALUE:
        return None
    if action.default in ('', [], {}):
        return action.default
    raise ValueError(f'has no value (leave the line out for the default, {action.default})')


def _convert_list(action: argparse.Action, value: Any) -> list:
    values = value if isinstance(value, list) else [value]
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise ValueError(f'expected {action.nargs} values, got {value!r}')
    if not values and action.default != []:
        raise ValueError('expected at least one value, got an empty list')
    return [_convert_scalar(action, item) for item in values]


def _convert_scalar(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, (list, dict)) or value is None:
        raise ValueError(f'expected one value, got {value!r}')
    if getattr(action.type, '__name__', None) in ('int', 'float'):
        converted = _convert_number(action, value)
    elif isinstance(value, bool):
        raise ValueError(f'expected text, got {value!r} (in YAML, quote a word such as yes, no, on or off)')
    else:
        converted = str(value)
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f'{value!r} is none of {", ".join(action.choices)}')
    return converted


def _convert_number(action: argparse.Action, value: Any) -> int | float:
    is_int = action.type.__name__ == 'int'
    expected = 'an integer' if is_int else 'a number'
    fractional = is_int and isinstance(value, float) and not value.is_integer()
    if isinstance(value, bool) or fractional or not isinstance(value, (int, float, str)):
        raise ValueError(f'expected {expected}, got {value!r}')
    try:
        number = action.type(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error) if 'expected a ' in str(error) else f'expected {expected}, got {value!r}') from None
    except (ValueError, OverflowError):
        raise ValueError(f'expected {expected}, got {value!r}') from None
    return action.default if number == action.default else number  # timm has integer defaults of float flags


def _convert_nested(value: Any) -> Any:
    """Keyword arguments have no declared type: only the floats that YAML 1.1 misses are converted."""
    if isinstance(value, dict):
        return {key: _convert_nested(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_convert_nested(item) for item in value]
    if isinstance(value, str) and _YAML_MISSED_FLOAT.fullmatch(value):
        return float(value)
    return value
