"""List the snapshots of a store.

``new`` is what each added to the packs when it was stored. A damaged snapshot is listed with its
error, and makes the exit code 1.

JSON: ``store``; ``snapshots``, a list of ``name``, ``damage`` (null), ``size`` (bytes of the file that is
shown), ``mtime_ns`` (when the file was saved), ``added_ns``, ``machine``, ``uuid`` (null), ``parent``
(null), ``source`` (what was added: mapped-ram, sequential, increment or libvirt), ``labels``, ``pages``
(stored as pages), ``same_pages`` (that repeat one word), ``new_pages`` and ``new_bytes`` (that were
stored for it), ``packs`` (that it needs), ``document_bytes``; of a damaged one only ``name`` and
``damage``, which says what is wrong.
"""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, printable, table
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.cli.store.opening import add_store, entry_data, opened_store, shown_time

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "list", _run, __doc__)
    add_store(parser)


def _run(args: argparse.Namespace) -> Outcome:
    with opened_store(args) as store:
        entries = store.list()
    rows = [
        (
            entry.name,
            shown_time(entry.head.mtime_ns),
            show_size(entry.head.size),
            show_size(entry.head.counts.new_bytes),
            entry.head.source,
            entry.head.parent or "",
        )
        for entry in entries
        if entry.head is not None
    ]
    damaged = [entry for entry in entries if entry.head is None]
    lines = (
        table(("snapshot", "saved", "size", "new", "from", "parent"), rows, left=2) if rows else []
    )
    lines += [
        f"damaged: {printable(entry.name)}: {printable(entry.error or '')}" for entry in damaged
    ]
    data = {"store": args.store, "snapshots": [entry_data(entry) for entry in entries]}
    return Outcome(data, lines, ExitCode.BAD if damaged else ExitCode.DONE)
