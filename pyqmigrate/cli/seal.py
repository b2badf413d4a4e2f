"""Make a snapshot durable and verifiable: write SNAPSHOT.seal beside it.

First the structure is verified. Then pages whose bit is clear and that do not read as zeros in the file
become holes, so that an instant restore need not search for them. The seal contains a digest of every
MiB of the file, which verify compares with the file. An existing seal is replaced.

If --bitmap-order is not given, and fewer pages would have to be cleared with the bitmaps in the other
byte order, nothing is cleared and the option is required.

A snapshot that a guest runs from (vm restore) can be sealed unless pages have to be cleared in it.

JSON: ``snapshot``; ``seal``, an object of ``path`` and ``algorithm``; ``file_size``;
``bytes_read`` (without holes); ``clear_pages_zero`` (false for a sequential stream, which has no clear
pages); ``cleared_pages``; ``seconds``; ``direct_io``, ``direct_io_reason`` (of the reading); ``channels``;
``bitmap_order`` (little or big; null for a sequential stream).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import (
    Verbs,
    add_bitmap_order,
    add_channels,
    add_direct_io,
    add_offset,
    add_page_size,
    add_verb,
)
from pyqmigrate.cli.outcome import Outcome, counted, printable, seal_data, shown_seal
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.standard_streams import refuse_standard
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.integrity.seal import seal

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "seal", _run, __doc__)
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="the snapshot to seal")
    parser.add_argument(
        "--algorithm",
        choices=[str(name) for name in Algorithm],
        default="xxh3-128",
        help="digest algorithm (default: xxh3-128; blake3 and sha256 also detect deliberate changes)",
    )
    add_page_size(parser)
    add_bitmap_order(parser)
    add_offset(parser)
    add_channels(parser, default=4)
    add_direct_io(parser)


def _run(args: argparse.Namespace) -> Outcome:
    refuse_standard(args.snapshot, "a seal is written beside a file")
    with shown("seal") as show:
        report = seal(
            args.snapshot,
            algorithm=args.algorithm,
            offset=args.offset,
            page_size=args.page_size,
            bitmap_order=args.bitmap_order,
            channels=args.channels,
            direct_io=args.direct_io,
            progress=show,
        )
    rate = show_rate(report.bytes_read, report.seconds)
    place = printable(shown_seal(args.snapshot, report.seal))
    lines = [
        f"{place}: {report.algorithm} of {show_size(report.size)}",
        f"{show_size(report.bytes_read)} read in {report.seconds:.2f} s, {rate} MiB/s, "
        f"{counted(report.channels, 'channel')}, direct I/O {'on' if report.direct_io else 'off'} "
        f"({report.direct_io_reason})",
    ]
    if report.cleared_pages:
        lines.append(f"{counted(report.cleared_pages, 'clear page')} with old bytes became holes")
    data = asdict(report)
    data["seal"] = seal_data(report.seal, data.pop("algorithm"))
    data["file_size"] = data.pop("size")
    return Outcome(data, lines)
