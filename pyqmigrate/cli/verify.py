"""Verify that a snapshot is whole and well-formed.

Checked are its structure, every length and offset against each other and the file's size, every
bitmap or page record, and that the end of the stream is there. The format has no checksums:
flipped bits in pages cannot be seen.

JSON: ``snapshot``; ``valid``, true; ``blocks``, ``data_pages``, ``zero_pages`` (numbers). A
snapshot that is bad is an error, with exit code 1.
"""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, counted, printable

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "verify", _run, __doc__)
    add_snapshot(parser)


def _run(args: argparse.Namespace) -> Outcome:
    with opened(args, args.snapshot) as snapshot:
        snapshot.verify()
        blocks = [block for block in snapshot.blocks.values() if not block.external]
        data = sum(block.data_pages for block in blocks)
        zero = sum(block.zero_pages for block in blocks)
        count = len(snapshot.blocks)
    return Outcome(
        {"snapshot": args.snapshot, "valid": True, "blocks": count,
         "data_pages": data, "zero_pages": zero},
        [f"{printable(args.snapshot)}: well-formed and whole: {counted(count, 'block')}, "
         f"{counted(data, 'data page')}, {counted(zero, 'zero page')}"],
    )  # fmt: skip
