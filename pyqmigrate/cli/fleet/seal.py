"""Seal many snapshots: local files, each as the verb seal does.

A file with a seal of the same algorithm that fits its size and time of change is left as it is. Objects
are sealed before they are uploaded, and stored snapshots always have a seal.

JSON: as of fleet verify; ``found`` has ``sealed_before``, ``bytes_read`` and ``cleared_pages``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.fleet.arguments import add_fleet
from pyqmigrate.cli.fleet.outcome import run_fleet
from pyqmigrate.cli.outcome import Outcome, counted
from pyqmigrate.fleet.result import Result
from pyqmigrate.fleet.work import Verb, Work
from pyqmigrate.format.digest import Algorithm

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "seal", _run, __doc__)
    add_fleet(parser, jobs="one for each processor")
    parser.add_argument(
        "--algorithm",
        choices=[str(name) for name in Algorithm],
        default="xxh3-128",
        help="digest algorithm (default: xxh3-128; blake3 and sha256 also detect deliberate changes)",
    )


def _run(args: argparse.Namespace) -> Outcome:
    return run_fleet(args, Work(Verb.SEAL, algorithm=Algorithm(args.algorithm)), _lines)


def _lines(results: Sequence[Result]) -> list[str]:
    before = sum(bool(result.data["sealed_before"]) for result in results)
    return [f"{counted(before, 'snapshot')} had a seal already"] if before else []
