"""Add a snapshot of any kind to a store: only pages that are not in it yet are stored.

A mapped-ram file, a sequential stream, a file of libvirt's or an increment is stored as the mapped-ram
file that convert makes of it. If there is a seal beside it (SNAPSHOT.seal, see the verb seal) and its parent
in the store has one, only the pieces that differ are read; of an increment whose base is sealed and in the
store, only those with changed pages. The record that vm save wrote
(SNAPSHOT.vm.json) is stored with it.

The parent is a stored snapshot of the same guest, which the new one is compared with: by default the
one that shares the most. It makes the work shorter and pages smaller; nothing depends on its being
kept.

A file of the store appears when it is complete and durable, the snapshot last: an add that was killed
leaves nothing that is listed, and packs that an add by the same command uses again.

JSON: ``store``, ``snapshot``, as they were named; ``name``; ``source`` (mapped-ram, sequential, increment
or libvirt); ``parent`` (null); ``size`` of the file that is shown, ``data_bytes`` of the guest,
``bytes_read``; ``pages`` (stored as pages), ``same_pages`` (that repeat one word), ``new_pages``;
``new_packs``, ``new_bytes`` (written for it), ``snapshot_bytes`` (its own document); ``sealed`` (its seal was used);
``seconds``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, counted, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import show_rate, show_size
from pyqmigrate.cli.store.opening import add_store, opened_store
from pyqmigrate.errors import UsageError

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "add", _run, __doc__)
    add_store(parser)
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="a file")
    parser.add_argument("--name", metavar="NAME", help="its name there (default: that of the file)")
    parser.add_argument(
        "--parent",
        metavar="NAME",
        default="auto",
        help="the stored snapshot to compare it with: auto (the default), none, or its name",
    )
    parser.add_argument(
        "--label",
        metavar="KEY=TEXT",
        action="append",
        default=[],
        type=_label,
        dest="labels",
        help="a text to store with it; can be given several times",
    )


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=TEXT")
    return key, value


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.adding import add

    labels = dict(args.labels)
    if len(labels) != len(args.labels):
        raise UsageError("a label was given twice")
    with opened_store(args) as store, shown("add") as show:
        report = add(
            store,
            args.snapshot,
            args.name,
            parent=None if args.parent == "none" else args.parent,
            labels=labels,
            progress=show,
        )
    rate = show_rate(report.size, report.seconds)
    lines = [
        f"{printable(report.name)}: {show_size(report.size)} of a {report.source} file, "
        f"{counted(report.new_pages, 'new page')} of {report.pages + report.same_pages}",
        f"{show_size(report.new_bytes + report.snapshot_bytes)} written, "
        f"{show_size(report.bytes_read)} read, in {report.seconds:.2f} s, {rate} MiB/s"
        + (f"; compared with {printable(report.parent)}" if report.parent else ""),
    ]
    return Outcome({"store": args.store, "snapshot": args.snapshot, **asdict(report)}, lines)
