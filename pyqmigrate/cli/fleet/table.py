"""Print the table of results that --table keeps.

It is a SQLite file: other questions are for sqlite3 or any program that reads such files.

JSON: ``table``, and ``rows``, a list by verb, options and name: ``verb``, ``options`` (of add the store, of
seal the algorithm, otherwise empty) and the values of ``results`` of fleet verify.
"""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.fleet.outcome import result_data, when
from pyqmigrate.cli.outcome import Outcome, counted, table
from pyqmigrate.fleet.result import Verdict
from pyqmigrate.fleet.table import ResultTable
from pyqmigrate.fleet.work import Verb

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "table", _run, __doc__)
    parser.add_argument("table", metavar="FILE", help="the table, as it was given to --table")
    parser.add_argument(
        "--verb", choices=[str(verb) for verb in Verb], default=None, help="only of this verb"
    )
    parser.add_argument(
        "--verdict",
        choices=[str(verdict) for verdict in Verdict],
        default=None,
        help="only results with this verdict",
    )


def _run(args: argparse.Namespace) -> Outcome:
    with ResultTable(args.table, reading=True) as kept:
        rows = [
            row
            for row in kept.rows()
            if args.verb in (None, row.verb) and args.verdict in (None, row.result.verdict)
        ]
    data = {
        "table": args.table,
        "rows": [
            {"verb": row.verb, "options": row.options, **result_data(row.result)} for row in rows
        ],
    }
    lines = table(
        ("snapshot", "verb", "verdict", "finished", "seconds"),
        [
            (
                row.result.name,
                row.verb,
                row.result.verdict,
                when(row.result.finished),
                f"{row.result.seconds:.2f}",
            )
            for row in rows
        ],
        left=4,
    )
    return Outcome(data, [*lines, counted(len(rows), "result")])
