"""`python -m timm_kd.hub push RUN_DIR REPO_ID`: push a finished run, or try again after a push that failed."""

import argparse
import logging

from ..files import print_out
from ..process import ending
from . import push_run


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: With an `ExitCode`, where the push failed.
    """
    parser = argparse.ArgumentParser(prog='python -m timm_kd.hub', description=__doc__)
    push = parser.add_subparsers(dest='command', required=True).add_parser('push', help='push a run to the Hub')
    push.add_argument('run_dir', metavar='RUN_DIR', help='output folder of a run')
    push.add_argument('repo_id', metavar='REPO_ID', help='OWNER/NAME on the Hub, created if it does not exist')
    push.add_argument('--private', action='store_true', help='the repository must be private')
    push.add_argument('--revision', help='branch to push to, created if it does not exist (main)')
    push.add_argument('--checkpoint', help='checkpoint to publish (the best one; its EMA weights, if tracked)')
    push.add_argument('--license', help='licence for the model card, such as apache-2.0 (none)')
    push.add_argument('--dataset', help="the training data's id on the Hub, for the model card (none)")
    push.add_argument('--dry-run', action='store_true', help='write RUN_DIR/hub, say what would go up, do not push')
    options = vars(parser.parse_args(argv))
    del options['command']
    logging.basicConfig(format='%(message)s')
    logging.getLogger('timm_kd').setLevel(logging.INFO)
    with ending('timm_kd.hub'):
        print_out(push_run(**options))


if __name__ == '__main__':
    main()
