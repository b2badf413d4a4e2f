"""Copy snapshots from one store to another, such as from a directory to an object store.

Only packs that are missing there are sent, each snapshot after its packs. A copy that was interrupted
is resumed by the same command. TARGET is empty or missing, and becomes a store with the same key; or it
was made so before.

JSON: ``store``, ``target``; ``copied`` and ``present`` (names of snapshots); ``sent_packs``,
``sent_bytes``; ``present_packs``; ``seconds``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, counted
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.store.opening import add_store, add_threads, opened_store

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "copy", _run, __doc__)
    add_store(parser)
    parser.add_argument("target", metavar="TARGET", help="another store: a directory or a URL")
    parser.add_argument("names", metavar="NAME", nargs="*", help="a snapshot (default: all)")
    add_threads(parser)


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.copying import copy

    with opened_store(args) as store, shown("copy") as show:
        report = copy(store, args.target, args.names or None, channels=args.channels, progress=show)
    rate = show_rate(report.sent_bytes, report.seconds)
    lines = [
        f"{counted(len(report.copied), 'snapshot')} copied, {len(report.present)} were there",
        f"{counted(report.sent_packs, 'pack')} sent, {show_size(report.sent_bytes)} in "
        f"{report.seconds:.2f} s, {rate} MiB/s; {report.present_packs} were there",
    ]
    return Outcome({"store": args.store, "target": args.target, **asdict(report)}, lines)
