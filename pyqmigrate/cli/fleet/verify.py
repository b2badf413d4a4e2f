"""Verify many snapshots: each with its seal, if it has one, and its structure.

Damage is named. What cannot be verified now (no permission, a server that does not answer, an unknown
format) has failed, and is tried again in the next run. Files in directories and behind prefixes that
are not snapshots are skipped, and named. A stored snapshot is read through its store, each page
checked. Of an increment only the structure of the base is checked: it is a snapshot of its own. The
base of an increment in an object store is not looked for.

JSON: ``verb``; ``table`` (null without one); ``good_count``, ``damaged_count``, ``failed_count``,
``skipped_count``; ``done_before``, how many of the results the table had; ``seconds``; ``results``, a
list by name of ``name``, ``identity``, ``verdict`` (good, damaged, failed, skipped), ``message``,
``seconds``, ``finished`` (since 1970), ``dask_worker`` (null: this machine), and ``found``: of a snapshot
that is good ``kind``, ``machine``, ``block_count``, ``data_pages``, ``zero_pages``, ``seal`` (null, or
``algorithm``, ``intact``, ``damage_count``, ``damages``, the first 20, ``bytes_read``) and of an increment
``base``; of one that is not as sealed, ``seal``. The exit code is 1 if any is damaged, otherwise 3 if any
has failed.
"""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.fleet.arguments import add_fleet
from pyqmigrate.cli.fleet.outcome import run_fleet
from pyqmigrate.cli.outcome import Outcome
from pyqmigrate.fleet.work import Verb, Work

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "verify", _run, __doc__)
    add_fleet(parser, jobs="one for each processor")


def _run(args: argparse.Namespace) -> Outcome:
    return run_fleet(args, Work(Verb.VERIFY))
