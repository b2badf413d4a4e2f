"""Remove the packs that no snapshot of a store needs.

Packs that are younger than an hour stay, since an add that was interrupted can use them when it is run
again. While a snapshot is added or copied to the store, nothing is removed, and the exit code is 3;
--wait waits for the end of that. It can be killed at any moment.

JSON: ``store``; ``snapshot_count``; ``removed_packs``, ``removed_bytes``; ``kept_packs``,
``kept_bytes`` (that snapshots need); ``young_packs``, ``young_bytes`` (that stay because they are
young); ``removed_working_sets``; ``dry_run``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, counted
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.cli.store.opening import add_store, opened_store

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "gc", _run, __doc__)
    add_store(parser)
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="remove nothing, show what would be"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        metavar="SECONDS",
        default=0.0,
        help="how long to wait for those who add to the store (default: 0)",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 1e9:
        raise ValueError(text)
    return seconds


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.garbage import gc

    with opened_store(args) as store, shown("gc") as show:
        report = gc(store, dry_run=args.dry_run, wait=args.wait, progress=show)
    what = "would be removed" if report.dry_run else "removed"
    lines = [
        f"{counted(report.removed_packs, 'pack')} {what}, {show_size(report.removed_bytes)}",
        f"{counted(report.kept_packs, 'pack')} kept, {show_size(report.kept_bytes)}, for "
        f"{counted(report.snapshot_count, 'snapshot')}",
    ]
    if report.young_packs:
        lines.append(
            f"{counted(report.young_packs, 'pack')} not needed, but younger than an hour, "
            f"{show_size(report.young_bytes)}"
        )
    return Outcome({"store": args.store, **asdict(report)}, lines)
