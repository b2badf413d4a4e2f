"""``--describe``: let a stopped QEMU describe device state that the file does not describe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyqmigrate.cli.arguments import Parser

if TYPE_CHECKING:
    from pyqmigrate.snapshot.base import Snapshot

__all__ = ["add_describe", "description_for"]

HINT = "--describe"


def add_describe(parser: Parser) -> None:
    """Add ``--describe``, and the command line that may come after ``--``."""
    parser.add_argument(
        "--describe",
        action="store_true",
        help="let a QEMU that never runs describe device state that the file does not describe; "
        "the VM's command line is the one in the record beside the file, or comes last, after --",
    )
    parser.takes_command_line = True
    parser.command_line_option = "--describe"
    parser.set_defaults(command=[])


def description_for(args: argparse.Namespace, snapshot: Snapshot) -> bytes | None:
    """Return the description, None without ``--describe``.

    Raises UsageError if no command line is known, NotSupported if the device state cannot be
    described.
    """
    if not args.describe:
        return None
    # The library for QMP is an extra; the other options work without it.
    from pyqmigrate.cli.interruption import run_interruptible
    from pyqmigrate.vm.twin.twin import describe_snapshot

    return run_interruptible(describe_snapshot(snapshot, args.command))
