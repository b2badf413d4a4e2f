"""Add many snapshots to a store.

A stored snapshot is named by its path below the directory or prefix that was given, with + for
slashes: fleet add /snap stores /snap/web/monday as web+monday. What an earlier run has added is left as
it is. Objects are added by way of a file without a name in the directory for temporary files.
Snapshots are added one after another by default: only pages that are in the store already are shared.

JSON: as of fleet verify; ``found`` has ``stored_as``, ``added`` (false: an earlier run did), ``new_bytes``,
and if it was added ``parent`` (or null) and ``pages``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.fleet.arguments import add_fleet
from pyqmigrate.cli.fleet.outcome import run_fleet
from pyqmigrate.cli.outcome import Outcome, counted
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.fleet.result import Result
from pyqmigrate.fleet.work import Verb, Work
from pyqmigrate.io.place import absolute

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "add", _run, __doc__)
    add_fleet(parser, jobs="1")
    parser.add_argument(
        "--store", metavar="STORE", required=True, help="the store: a directory or a URL"
    )


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.store import Store

    store = args.store if "://" in args.store else os.fspath(absolute(args.store))
    with Store.open(store):  # an error about it is not one of each snapshot
        pass
    return run_fleet(args, Work(Verb.ADD, store=store), _lines)


def _lines(results: Sequence[Result]) -> list[str]:
    added = [result for result in results if result.data["added"]]
    new = show_size(sum(result.data["new_bytes"] for result in added))
    return [f"{counted(len(added), 'snapshot')} added, {new} new"]
