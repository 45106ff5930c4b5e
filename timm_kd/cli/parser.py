"""argparse as this project uses it: flags as data, ranges and names at the flag, errors of one line."""
import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import timm.utils

from ..errors import nearest, out_of_range


class Flag(NamedTuple):
    """One command line argument: its option strings and the keywords of argparse's `add_argument`."""

    names: tuple[str, ...]
    options: dict[str, Any]


def flag(*names: str, help: str, known: Sequence[str] = (), **options: Any) -> Flag:
    """Return an argument that takes a value, shown in the usage as N (an integer), X (a number) or NAME.

    Args:
        *names: Its option strings.
        help: What it does; the known values are added.
        known: The values that it takes, where timm's flag has no `choices` and the user should hear of a wrong one.
        **options: Further keywords of argparse's `add_argument`.
    """
    if 'choices' in options:
        options['type'] = one_of(*options['choices'])
    elif known:
        options['type'] = one_of(*known)
        help = f'{help}: {", ".join(name for name in known if name)}'
    elif options.get('type') in (int, float):
        options['type'] = number(options['type'])
    if 'choices' not in options:
        kind = getattr(options.get('type'), '__name__', 'str')
        options.setdefault('metavar', {'int': 'N', 'float': 'X', 'str': 'NAME'}[kind])
    return Flag(names, dict(options, help=help))


def switch(*names: str, help: str) -> Flag:
    """Return an argument without a value, False unless given."""
    return Flag(names, dict(action='store_true', help=help))


def kwargs_flag(*names: str, help: str) -> Flag:
    """Return an argument that takes any number of `key=value` pairs, read as Python literals where they are such."""
    return Flag(names, dict(nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help=help))


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], int | float]:
    """Return an argparse `type` for finite numbers within the bounds of `out_of_range`; it bears the name of `kind`."""
    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            expected = 'an integer' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'{text or repr(text)}: expected {expected}') from None
        if kind is int and value.bit_length() > 63:
            raise argparse.ArgumentTypeError(f'{text}: expected an integer of at most 63 bits')
        expected = out_of_range(value, **bounds)
        if expected:
            raise argparse.ArgumentTypeError(f'{value}: expected {expected}')
        return value

    convert.__name__ = kind.__name__
    return convert


count, positive = number(int, above=0), number(float, above=0)
whole, not_negative = number(int, at_least=0), number(float, at_least=0)


def one_of(*names: str, reason: str | None = None) -> Callable[[str], str]:
    """Return an argparse `type` for a name out of several, which bears the name of `str`.

    The error of any other name lists them, or gives the reason.
    """
    def convert(text: str) -> str:
        if text not in names:
            expected = f'expected one of {", ".join(name or repr(name) for name in names)}'
            raise argparse.ArgumentTypeError(f'{text or repr(text)}: {reason or expected + nearest(text, names)}')
        return text

    convert.__name__ = 'str'
    return convert


class ParseKwargs(timm.utils.ParseKwargs):
    """timm's action, with an error that names the flag where timm's stumbles over a value without `=`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str], *_) -> None:
        """Set the dict; raises `argparse.ArgumentError` for a value that is no `key=value`."""
        for value in values:
            key, separator, _ = value.partition('=')
            if value and not (separator and key.isidentifier()):
                raise argparse.ArgumentError(self, f'{value}: expected key=value')
        super().__call__(parser, namespace, values)


class HelpFormatter(argparse.HelpFormatter):
    """Show the default of a flag where there is one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, '', [], {}, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f'{action.help} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: the usage of two hundred flags would bury them."""

    def __init__(self, everyday: Sequence[str], **options: Any):
        """Create a parser whose help shows the flags of the dests `everyday` first."""
        super().__init__(formatter_class=HelpFormatter, exit_on_error=False, **options)
        self.everyday = everyday

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The arguments that have a value in the namespace, by dest: all but `--help` and `--version`."""
        return {action.dest: action for action in self._actions if action.default is not argparse.SUPPRESS}

    def add_flag(self, flag: Flag, group: argparse._ArgumentGroup | None = None) -> argparse.Action:
        """Add a flag to a group of the parser, or to the parser itself."""
        return (group or self).add_argument(*flag.names, **copy.deepcopy(flag.options))

    def read(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the values that a command line gives, by dest; flags that it does not name are left out.

        Raises:
            argparse.ArgumentError: A flag is unknown (the error proposes the nearest one), or its value does not do.
        """
        # argparse puts no default where the namespace has a value already.
        blank = argparse.Namespace(**dict.fromkeys(self.flags))
        namespace, unknown = self.parse_known_args(words, blank)
        if unknown:
            hint = nearest(unknown[0].partition('=')[0], self._option_string_actions)
            raise argparse.ArgumentError(None, f'unrecognized arguments: {" ".join(unknown)}{hint}')
        return {dest: value for dest, value in vars(namespace).items() if value is not None}

    def format_help(self) -> str:
        """Return the help: the everyday flags first, then the groups without these."""
        everyday = [self.flags[dest] for dest in self.everyday]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        groups = {group.title: group._group_actions for group in self._action_groups}
        for title, flags in {'Everyday flags': everyday, **groups}.items():
            formatter.start_section(title)
            formatter.add_arguments([flag for flag in flags if flags is everyday or flag not in everyday])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Write one line, with one full stop, to stderr and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message.rstrip(".")}.\n')
