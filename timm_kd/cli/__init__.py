"""The command line: timm's flags and the KD group, from arguments and YAML to one checked namespace."""
import argparse
import logging
from typing import Any

import timm
import torch
import yaml

from ..errors import UsageError
from ..losses import KD_LOSSES
from ..version import __version__
from .checks import check_args
from .config import load_config
from .kd_flags import KDSettings, kd_flags, knob_dests, named_teacher, resolve_kd
from .parser import Parser
from .timm_flags import DATA, TIMM_FLAGS

_logger = logging.getLogger(__name__)

__all__ = ['KDSettings', 'build_parser', 'parse_args', 'resolve_kd']


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, str]:
    """Read the command line, and the YAML file that it names.

    Args:
        argv: The arguments, ``sys.argv[1:]`` when None. They override the values of ``--config``.

    Returns:
        The namespace (``teacher`` is None, a str, or a list of several), and its YAML dump, which is itself a config
        file for the same run.

    Raises:
        SystemExit: With code 2, after one line on stderr, where the flags or the file make no sensible run.
    """
    parser = build_parser()
    defaults = {action.dest: action.default for action in parser._actions}
    try:
        # The values of the file become defaults, so that a second pass lets the command line override them.
        config_path = parser.parse_known_args(argv)[0].config
        config = load_config(config_path, parser) if config_path else {}
        parser.set_defaults(**{dest: value for dest, value in config.items() if dest not in _SETTLED_AFTERWARDS})
        args = parser.parse_args(argv)
        del args.config
        _settle_teacher(args, config)
        _settle_temperature(args, config)
        _settle_loss_parameters(args, config)
        _settle_data(args, config)
        args.replayable_data |= args.teacher_cache is not None
        check_args(args, defaults)
    except UsageError as error:
        parser.error(str(error))
    return args, yaml.safe_dump(vars(args), default_flow_style=False)


def build_parser() -> Parser:
    """The parser: timm's flags in timm's groups, then the groups of this project."""
    parser = Parser(
        prog='train-kd',
        description='timm\'s training script with a teacher in it.',
    )
    parser.add_flag(DATA)
    parser.add_argument(
        '-c', '--config', type=str, metavar='FILE', default='',
        help='YAML file with values of flags by their dest (batch_size: 64); the command line overrides them',
    )
    version = f'timm-kd {__version__} (timm {timm.__version__}, torch {torch.__version__})'
    parser.add_argument('--version', action='version', version=version)
    for title, flags in {**TIMM_FLAGS, **kd_flags()}.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            parser.add_flag(flag, group)
    return parser


# What a file says of these cannot simply be the default of the flag.
_SETTLED_AFTERWARDS = ('teacher', 'kd_temperature', 'data', 'data_dir')


def _settle_teacher(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """An appending flag would add to a default: the command line replaces the teachers of the file, ``''`` by none."""
    teachers = args.teacher if args.teacher is not None else config.get('teacher') or []
    teachers = [teacher for teacher in teachers if teacher]
    args.teacher = teachers if len(teachers) > 1 else teachers[0] if teachers else None


def _settle_temperature(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """timm's script writes its default of 4.0 into every args.yaml, of plain training too: no choice of the user.

    Such a file has no key ``kd_loss``; in one of ours, or a recipe, the same value was meant.
    """
    by_default = 'kd_loss' not in config and config.get('kd_temperature') == 4.0 and named_teacher(args) is None
    if args.kd_temperature is None and not by_default:
        args.kd_temperature = config.get('kd_temperature')


def _settle_loss_parameters(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Where the command line replaces the loss of the file, a parameter that only the old loss has goes with it."""
    if args.kd_loss is None or config.get('kd_loss') in (None, args.kd_loss):
        return
    for dest, parameter in knob_dests().items():
        of_the_file = config.get(dest) and config[dest] == getattr(args, dest)
        if of_the_file and parameter not in KD_LOSSES[args.kd_loss].hyper_parameters():
            _logger.warning(f'--kd-loss {args.kd_loss} has no {parameter}: the {dest} of the config file is left out')
            setattr(args, dest, False if config[dest] is True else None)


def _settle_data(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """The positional and --data-dir say one thing: either, on the command line, replaces both of the file."""
    if args.data is None and args.data_dir is None:
        args.data, args.data_dir = config.get('data'), config.get('data_dir')
