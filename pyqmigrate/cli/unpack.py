"""Unpack a snapshot of any kind into sparse raw files.

Every RAM block becomes ``NAME.raw`` in DIR, which is created if necessary. Bytes of the name outside
``[A-Za-z0-9._-]``, and a leading dot, are written as ``%XX``. ``blocks.json`` lists the files. SNAPSHOT
must not be one of them. A sequential stream is read once, front to back, and may come through a pipe
(``-``).

JSON: ``snapshot``; ``directory``; ``blocks``, a list of ``name``, ``file`` (null if the content
is not in the snapshot), ``length``, ``page_size``, ``data_pages``, ``zero_pages``;
``bytes_allocated``; ``seconds``, fsync included.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, printable, table
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.cli.standard_streams import refuse_standard
from pyqmigrate.export.raw import unpack

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "unpack", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("directory", metavar="DIR", help="the directory for the raw files")
    parser.add_argument(
        "--block",
        metavar="NAME",
        action="append",
        help="only this block; can be given several times (default: all blocks)",
    )


def _run(args: argparse.Namespace) -> Outcome:
    refuse_standard(args.directory, "raw files go into a directory")
    with opened(args, args.snapshot, one_pass=True) as snapshot, shown("unpack") as show:
        report = unpack(snapshot, args.directory, blocks=args.block, progress=show)
    rows = [
        (
            block.name,
            block.file or "(not in this file)",
            show_size(block.length),
            block.data_pages,
            block.zero_pages,
        )
        for block in report.blocks
    ]
    return Outcome(
        {"snapshot": args.snapshot, "directory": args.directory, **asdict(report)},
        [
            *table(("block", "file", "length", "data pages", "zero pages"), rows, left=2),
            f"{printable(args.directory)}: {show_size(report.bytes_allocated)} allocated, "
            f"{report.seconds:.2f} s",
        ],
    )
