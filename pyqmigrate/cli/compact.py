"""Compress a snapshot into one file that is read without unpacking it.

Every reading verb opens DST as it is: info, verify, devices, convert, diff, vm restore. It is a file in
Zstandard's seekable form, so ``zstd -d DST`` makes the plain file of it, and ``zstd -t`` tests it.

SNAPSHOT is a snapshot of any kind. Of a mapped-ram file DST has every byte, also libvirt's header before
it. Of an increment, a sequential stream or a compressed one, DST has the mapped-ram file that convert
makes, which temporarily takes disk space beside DST. The seal and the record beside SNAPSHOT
(SNAPSHOT.seal, SNAPSHOT.vm.json) and its working set become part of DST; a snapshot without a current seal
gets one in DST.

DST appears only when it is complete and durable; it must not be SNAPSHOT. It needs the package zstandard.

JSON: ``snapshot``; ``target``; ``size`` of the plain file, ``compact_size`` (bytes); ``frames``,
``zero_frames`` (numbers); ``converted`` (true: DST has a conversion of SNAPSHOT); ``sealed`` (true: the
seal of SNAPSHOT was taken along); ``seconds``; ``channels``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_channels, add_verb
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.compaction import LEVEL_MAX, CompactReport, compact

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "compact", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("target", metavar="DST", help="the compact file to write")
    parser.add_argument(
        "--level",
        type=_read_level,
        metavar="N",
        default=1,
        help=f"compression, 1 to {LEVEL_MAX} (default: 1)",
    )
    add_channels(parser)


def _read_level(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= LEVEL_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {LEVEL_MAX}")
    return int(text)


def _run(args: argparse.Namespace) -> Outcome:
    with opened(args, args.snapshot, one_pass=True) as snapshot, shown("compact") as show:
        report = compact(
            snapshot, args.target, level=args.level, channels=args.channels, progress=show
        )
    data = asdict(report) | {"snapshot": args.snapshot, "target": args.target}
    return Outcome(data, _lines(args.target, report))


def _lines(target: str, report: CompactReport) -> list[str]:
    share = 100 * report.compact_size / max(report.size, 1)
    lines = [
        f"{printable(target)}: {show_size(report.compact_size)} for {show_size(report.size)} "
        f"({share:.0f}%), {report.zero_frames} of {report.frames} frames without data",
        f"compressed in {report.seconds:.2f} s, {show_rate(report.size, report.seconds)} MiB/s",
    ]
    if report.converted:
        lines.append("converted to mapped-ram, which is what zstd -d makes of it")
    return lines
