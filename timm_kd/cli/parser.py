"""The parts of the command line that argparse leaves to its users: flags as data, one-line errors, ``key=value``."""
import argparse
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import timm.utils

from ..errors import nearest


class Flag(NamedTuple):
    """One command line argument: its option strings and the keywords of argparse's ``add_argument``."""

    names: tuple[str, ...]
    options: dict[str, Any]


def number(
        kind: type[int] | type[float],
        *,
        above: float | None = None,
        at_least: float | None = None,
        below: float | None = None,
        at_most: float | None = None,
) -> Callable[[str], int | float]:
    """Return an argparse `type` for finite numbers of a range.

    Args:
        kind: int or float, whose name the type bears.
        above: The value must be greater than this.
        at_least: The value must not be less than this.
        below: The value must be less than this.
        at_most: The value must not be greater than this.
    """
    bounds = {
        'above {}': above, 'of {} or more': at_least, 'below {}': below, 'of {} or less': at_most,
    }
    expected = ' and '.join(text.format(bound) for text, bound in bounds.items() if bound is not None)

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f'{text}: expected {"an integer" if kind is int else "a number"}') from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{value}: expected a finite number')
        if (
                (above is not None and value <= above)
                or (at_least is not None and value < at_least)
                or (below is not None and value >= below)
                or (at_most is not None and value > at_most)
        ):
            raise argparse.ArgumentTypeError(f'{value}: expected a value {expected}')
        return value

    convert.__name__ = kind.__name__
    return convert


def flag(*names: str, help: str, **options: Any) -> Flag:
    """Return an argument that takes a value; numbers are shown as N (integer) and X in the usage."""
    if options.get('type') in (int, float):
        options['type'] = number(options['type'])
    metavar = {'int': 'N', 'float': 'X'}.get(getattr(options.get('type'), '__name__', None))
    if metavar:
        options.setdefault('metavar', metavar)
    return Flag(names, dict(options, help=help))


def switch(*names: str, help: str) -> Flag:
    """An argument without a value, False unless given."""
    return Flag(names, dict(action='store_true', help=help))


def kwargs_flag(*names: str, help: str) -> Flag:
    """An argument that takes any number of ``key=value`` pairs, read as Python literals where they are literals."""
    return Flag(names, dict(nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help=help))


class ParseKwargs(timm.utils.ParseKwargs):
    """timm's action, with an error that names the flag where timm's stumbles over a value without ``=``."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: list[str],
            option_string: str | None = None,
    ) -> None:
        """Set the dict; raises `argparse.ArgumentError` for a value that is no ``key=value``."""
        for value in values:
            key, separator, _ = value.partition('=')
            if value and not (separator and key.isidentifier()):
                raise argparse.ArgumentError(self, f'{value}: expected key=value')
        super().__call__(parser, namespace, values, option_string)


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default where there is one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, '', [], {}, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f'{action.help} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: the usage of two hundred flags would bury them."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, exit_on_error=False, **options)

    def add_flag(self, flag: Flag, group: argparse._ArgumentGroup | None = None) -> argparse.Action:
        """Add a flag to a group of the parser, or to the parser itself."""
        return (group or self).add_argument(*flag.names, **copy.deepcopy(flag.options))

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse, but an unknown flag is answered with the nearest known one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = nearest(unknown[0].partition('=')[0], self._option_string_actions)
            self.error(f'unrecognized arguments: {" ".join(unknown)}{hint}')
        return namespace

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> tuple[argparse.Namespace, list]:
        """As argparse, but an error begins with the flag as the user knows it."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            names = (error.argument_name or '').split('/')
            name = next((name for name in names if name.startswith('--')), names[0])
            self.error(f'{name} {error.message}'.strip())

    def error(self, message: str) -> NoReturn:
        """Write one line to stderr and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')
