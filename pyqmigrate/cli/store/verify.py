"""Verify a store: every pack, every page, and that every snapshot finds what it needs.

Every pack is read whole and compared with the digest in its name; every page is decompressed and
compared with its digest. Each damage is reported with its pack, frame and page, and with the snapshots
that cannot be read whole for it. With NAMEs only those snapshots and the packs that they need are
verified. The exit code is 1 for damage.

JSON: ``store``; ``intact``; ``snapshot_count``, ``packs``, ``unneeded_packs`` (numbers); ``bytes_read``;
``damages`` (the first 1000), a list of ``why``, ``names`` (of snapshots), ``pack``, ``frame``, ``page``
(each null if it does not apply); ``damage_count``; ``seconds``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, counted, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.store.opening import add_store, add_threads, opened_store

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "verify", _run, __doc__)
    add_store(parser)
    parser.add_argument("names", metavar="NAME", nargs="*", help="a snapshot (default: all)")
    add_threads(parser)


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.verifying import verify

    with opened_store(args) as store, shown("verify") as show:
        report = verify(store, args.names or None, channels=args.channels, progress=show)
    lines = [f"damaged   {printable(str(damage))}" for damage in report.damages]
    if report.damage_count > len(report.damages):
        lines.append(f"          and {report.damage_count - len(report.damages)} more")
    verdict = "intact" if report.intact else "NOT intact"
    rate = show_rate(report.bytes_read, report.seconds)
    lines.append(
        f"{counted(report.snapshot_count, 'snapshot')}, {counted(report.packs, 'pack')}: {verdict}: "
        f"{show_size(report.bytes_read)} read in {report.seconds:.2f} s, {rate} MiB/s"
    )
    if report.unneeded_packs:
        lines.append(
            f"{counted(report.unneeded_packs, 'pack')} needed by no snapshot: see store gc"
        )
    data = {"store": args.store, "intact": report.intact, **asdict(report)}
    return Outcome(data, lines, ExitCode.DONE if report.intact else ExitCode.BAD)
