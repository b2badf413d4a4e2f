"""Remove snapshots from a store, by name or by age.

With --keep all snapshots are removed but these: 7d keeps the newest one of each of the last seven days
that have any, w is for weeks (from Monday), m for months, y for years, h for hours; 7d/4w/12m keeps what
one of the rules keeps. The time of a snapshot is when its file was saved. The rules are applied to the
snapshots of each guest by themselves: guests are told apart by UUID, or else by machine type and RAM
blocks. --match limits them to some names. --dry-run shows what would be removed.

A snapshot that is in use (a mount, a restored guest) is not removed, and makes the exit code 3. Packs
remain until the next gc.

JSON: ``store``; ``removed``, ``kept`` (with --keep), ``in_use`` (names); ``dry_run``; ``notes`` (sentences).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, counted, printable
from pyqmigrate.cli.store.opening import add_store, opened_store

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "rm", _run, __doc__)
    add_store(parser)
    parser.add_argument("names", metavar="NAME", nargs="*", help="a snapshot of the store")
    parser.add_argument("--keep", metavar="RULES", help="what to keep, such as 7d/4w/12m")
    parser.add_argument("--match", metavar="PATTERN", help="only names like this, such as 'web-*'")
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="remove nothing, show what would be"
    )


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.removing import remove

    with opened_store(args) as store:
        report = remove(store, args.names, keep=args.keep, match=args.match, dry_run=args.dry_run)
    what = "would be removed" if report.dry_run else "removed"
    lines = [f"{what}: {printable(name)}" for name in report.removed]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"in use, not removed: {printable(name)}" for name in report.in_use]
    lines.append(
        f"{counted(len(report.removed), 'snapshot')} {what}"
        + (f", {len(report.kept)} kept" if args.keep else "")
    )
    code = ExitCode.REFUSED if report.in_use else ExitCode.DONE
    return Outcome({"store": args.store, **asdict(report)}, lines, code)
