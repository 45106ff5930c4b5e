"""Fill a teacher cache ahead of training, look into one, and check what it holds.

    python -m timm_kd.teacher_cache fill --epochs-range 0 50 <the training flags, --teacher-cache DIR among them>
    python -m timm_kd.teacher_cache info DIR
    python -m timm_kd.teacher_cache verify DIR [training flags that differ here, such as --device cpu]
"""
import argparse
import json
import logging
from contextlib import closing
from pathlib import Path

import numpy as np

from ..cli.messages import in_flags
from ..cli.parser import number
from ..errors import ExitCode, UsageError
from ..files import print_out
from ..fill import fill, verify
from ..process import ending
from ..run.log import setup_logging
from .epoch_file import EpochFile
from .folder import KEY_FILE, VALIDATION_FILES, epoch_files, format_bytes, read_members, read_rows, read_validation
from .key import read_key


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Raises:
        SystemExit: With an `ExitCode`; `FAILED` where `verify` finds rows that differ.
    """
    options, further = _parser().parse_known_args(argv)
    setup_logging(in_flags)
    logging.captureWarnings(True)
    with ending('timm_kd.teacher_cache', 'interrupted; what is stored stays, the same command goes on.', in_flags):
        if options.command == 'fill':
            fill(further, options.epochs_range)
        elif further and options.command == 'info':
            raise UsageError(f'{" ".join(further)}: info takes a folder and nothing else.')
        elif options.command == 'info':
            print_out(describe(Path(options.folder)))
        elif not verify(options.folder, further, options.batches):
            raise SystemExit(ExitCode.FAILED)


def describe(folder: Path) -> str:
    """Return what a cache holds, in lines: its teacher, its key, and the rows present of each epoch.

    Raises:
        UsageError: The folder is no cache, or a file of it is damaged.
    """
    rows, layout = read_rows(folder)
    lines = [f'{folder}: teacher logits']
    for member in read_members(folder) or ():
        lines.append(f'teacher   {member["source"]} ({member["model_name"]}, {member["num_params"]} parameters)')
    for validation in map(read_validation, sorted(folder.glob(VALIDATION_FILES))):
        for metrics in validation.get('metrics', ()):
            lines.append(f'          top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % in validation')
    lines.append(
        f'rows      {rows["count"]} an epoch, by {rows["by"]}, {rows["classes"]} classes as {rows["dtype"]}'
        + (f', the {rows["topk"]} largest' if rows['topk'] else '')
    )
    total = 0
    for path in epoch_files(folder).values():
        with closing(EpochFile(path, rows['count'], layout.row_bytes, writable=False)) as file:
            present = int(np.count_nonzero(file.checksums))
        num_bytes = path.stat().st_blocks * 512
        total += num_bytes
        lines.append(f'{path.name}  {present} rows ({100 * present / rows["count"]:.1f} %), {format_bytes(num_bytes)}')
    lines.append(f'in all    {format_bytes(total)} on disk')
    key = read_key(folder / KEY_FILE)
    lines.append('key       ' + json.dumps({name: value for name, value in key.items() if name != 'rows'}))
    return '\n'.join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m timm_kd.teacher_cache', allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    filling = commands.add_parser(
        'fill', allow_abbrev=False, help='run the teacher alone over the training images and store its logits',
    )
    filling.add_argument(
        '--epochs-range', nargs=2, type=int, metavar=('A', 'B'),
        help='epochs from A up to, not including, B, so that machines can share the work (unset: all of the schedule)',
    )
    info = commands.add_parser('info', allow_abbrev=False, help='print what a cache holds')
    verifying = commands.add_parser('verify', allow_abbrev=False, help='compute a sample of rows again, and compare')
    for command in (info, verifying):
        command.add_argument('folder', metavar='DIR')
    verifying.add_argument(
        '--batches', type=number(int, above=0), default=2, help='batches to compute again of each stored epoch',
    )
    return parser


if __name__ == '__main__':
    main()
