"""What timm's own tests import as `train`: this project's script under the names of timm's (see CONTRIBUTING.md)."""
import sys

from timm.models import create_model  # the tests put a tiny model in its place

from timm_kd.cli import build_parser, checks, parse_args
from timm_kd.cli.parser import Parser
from timm_kd.errors import UsageError
from timm_kd.files import FolderLock
from timm_kd.setup import student
from timm_kd.train import run


class Refused(SystemExit, ValueError):
    """A refusal is a ValueError in some of timm's tests, the end of the program in others."""


def _refuse(parser: Parser, message: str) -> None:
    raise Refused(message)


Parser.error = _refuse
checks._data = lambda args, changed: iter(())  # timm's script looks for the data folder when it opens the data set
parser = build_parser()


def _parse_args():
    return parse_args(sys.argv[1:])


def main():
    """Train as the command line says."""
    student.create_model = create_model
    with FolderLock() as lock:
        args, args_text = _parse_args()
        try:
            run(args, args_text, sys.argv[1:], lock)
        except UsageError as error:
            raise Refused(str(error)) from error
