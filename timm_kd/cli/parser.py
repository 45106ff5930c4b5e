"""The parts of the command line that argparse leaves to its users: flags as data, one-line errors, ``key=value``."""
import argparse
import copy
from typing import Any, NamedTuple, NoReturn

import timm.utils

from ..errors import nearest


class Flag(NamedTuple):
    """One command line argument: its option strings and the keywords of argparse's ``add_argument``."""

    names: tuple[str, ...]
    options: dict[str, Any]


def flag(*names: str, help: str, **options: Any) -> Flag:
    """An argument that takes a value; numbers are shown as N (integer) and X in the usage."""
    if 'choices' not in options and options.get('type') in (int, float):
        options.setdefault('metavar', 'N' if options['type'] is int else 'X')
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
                raise argparse.ArgumentError(self, f'expected key=value, got {value!r}')
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
        super().__init__(formatter_class=HelpFormatter, **options)

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

    def error(self, message: str) -> NoReturn:
        """Write one line to stderr and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')
