"""The command line: timm's flags and those of distillation, from arguments and YAML to one checked namespace."""
import argparse
import sys

import timm
import torch
import yaml

from ..errors import UsageError
from ..version import __version__
from .checks import check_args, check_device
from .config import RECIPES, load_config, override
from .kd_flags import KDSettings, kd_flags, resolve_kd
from .parser import Parser
from .task_loss import MULTI_LABEL_DEFAULTS, task_loss_flags
from .timm_flags import DATA, TIMM_FLAGS

EVERYDAY = (
    'data', 'config', 'model', 'pretrained', 'num_classes', 'img_size', 'batch_size', 'epochs', 'opt', 'lr',
    'weight_decay', 'sched', 'warmup_epochs', 'mixup', 'cutmix', 'smoothing', 'model_ema', 'amp', 'device', 'workers',
    'output', 'experiment', 'resume',
)

__all__ = ['KDSettings', 'build_parser', 'parse_args', 'resolve_kd']


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, str]:
    """Read the command line, and the YAML file that it names.

    Args:
        argv: The arguments, `sys.argv[1:]` when None. They override the values of `--config`.

    Returns:
        The namespace (`teacher` is None, a str, or a list of several), and its YAML dump, which is itself a config
        file for the same run.

    Raises:
        SystemExit: With code 2, after one line on stderr, where the flags or the file make no sensible run.
    """
    parser = build_parser()
    try:
        given = parser.read(sys.argv[1:] if argv is None else argv)
        path = given.pop('config', '')
        config = load_config(path, parser) if path else {}
        defaults = {dest: flag.default for dest, flag in parser.flags.items() if dest != 'config'}
        values = override(config, given, defaults)
        if values.get('task') == 'multilabel':
            defaults.update(MULTI_LABEL_DEFAULTS)
        # A value that equals the default is replaced by it: some of timm's flags take floats and default to integers.
        args = argparse.Namespace(**{
            dest: default if (value := values.get(dest, default)) == default else value
            for dest, default in defaults.items()
        })
        teachers = [teacher for teacher in args.teacher or [] if teacher]
        args.teacher = teachers if len(teachers) > 1 else teachers[0] if teachers else None
        args.replayable_data |= args.teacher_cache is not None or args.crops_per_image > 1
        check_args(args, defaults)
        if 'device' in values:
            check_device(args.device)
        # As in timm's script, what the older flags say of the loss stands in --loss and --loss-pos-weight from here on.
        args.loss = next(iter(task_loss_flags(args).values()), args.loss)
        if args.loss == 'bce' and args.bce_pos_weight is not None:
            args.loss_pos_weight = str(args.bce_pos_weight)
    except argparse.ArgumentError as error:
        names = (error.argument_name or '').split('/')
        parser.error(f'{next((name for name in names if name.startswith("--")), names[0])} {error.message}'.strip())
    except UsageError as error:
        parser.error(str(error))
    return args, yaml.safe_dump(vars(args), default_flow_style=False)


def build_parser() -> Parser:
    """Return the parser: the flags of this project, then timm's in timm's groups."""
    parser = Parser(
        prog='train-kd',
        usage='%(prog)s DIR [-c RECIPE] [--model NAME] [--teacher SPEC] [FLAG ...]',
        description='timm\'s training script with a teacher in it.',
        epilog=f'Recipes for --config: {", ".join(sorted(RECIPES))}.',
        everyday=EVERYDAY,
    )
    parser.add_flag(DATA)
    parser.add_argument(
        '-c', '--config', type=str, metavar='RECIPE', default='',
        help='YAML file with values of flags (batch_size: 64), or the name of a recipe (see the end of this help); the '
             'command line overrides them',
    )
    version = f'timm-kd {__version__} (timm {timm.__version__}, torch {torch.__version__})'
    parser.add_argument('--version', action='version', version=version)
    for title, flags in {**kd_flags(), **TIMM_FLAGS}.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            parser.add_flag(flag, group)
    return parser
