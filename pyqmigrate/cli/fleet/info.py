"""Show what many snapshots contain, in a line each.

Of objects and stored snapshots only the framing is read: headers, bitmaps, device state; a sequential
stream has to be read through.

JSON: as of fleet verify; ``found`` has ``kind``, ``machine``, ``uuid`` (or null), ``file_size``,
``bytes_allocated`` (null: not a local file), ``total_ram``, ``block_count``, ``data_pages``,
``zero_pages``, ``complete``, ``loadable``, and of a local increment ``base``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.fleet.arguments import add_fleet
from pyqmigrate.cli.fleet.outcome import run_fleet
from pyqmigrate.cli.outcome import Outcome, table
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.fleet.result import Result
from pyqmigrate.fleet.work import Verb, Work

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "info", _run, __doc__)
    add_fleet(parser, jobs="one for each processor")


def _run(args: argparse.Namespace) -> Outcome:
    return run_fleet(args, Work(Verb.INFO), _lines)


def _lines(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    rows = [
        (
            result.name,
            result.data["kind"],
            result.data["machine"] or "-",
            show_size(result.data["total_ram"]),
            show_size(result.data["file_size"]),
            result.data["data_pages"],
        )
        for result in results
    ]
    return [*table(("snapshot", "kind", "machine", "RAM", "size", "data pages"), rows, left=3), ""]
