"""Make a plain file of a stored snapshot.

PATH is a sparse mapped-ram file, which QEMU and every verb here read; without PATH, NAME in the current
directory. It appears when it is complete and durable, and has the time of change that the snapshot
had; its seal, and if the store has them its record (PATH.vm.json) and working set, are written beside
it. A file that has the name is replaced.

JSON: ``store``, ``name``; ``path``, ``beside`` (absolute paths); ``size``, ``bytes_written``,
``bytes_allocated``; ``seconds``, fsync included.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.store.opening import add_store, add_threads, opened_store

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "get", _run, __doc__)
    add_store(parser)
    parser.add_argument("name", metavar="NAME", help="a snapshot of the store")
    parser.add_argument("path", metavar="PATH", nargs="?", help="the file to write (default: NAME)")
    add_threads(parser)


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.getting import get

    with opened_store(args) as store, shown("get") as show:
        report = get(
            store, args.name, args.path or args.name, channels=args.channels, progress=show
        )
    rate = show_rate(report.bytes_written, report.seconds)
    return Outcome(
        {"store": args.store, **asdict(report)},
        [
            f"{printable(report.path)}: {show_size(report.size)}, "
            f"{show_size(report.bytes_allocated)} allocated",
            f"{show_size(report.bytes_written)} written in {report.seconds:.2f} s, {rate} MiB/s",
            *(f"beside it: {printable(path)}" for path in report.beside),
        ],
    )
