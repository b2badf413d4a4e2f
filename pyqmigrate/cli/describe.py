"""``--describe``: device state that its file does not describe, described by a stopped QEMU."""

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
        help="describe device state that the file does not describe, by a QEMU that never runs; "
        "the VM's command line is that of the record beside the file, or comes last, after --",
    )
    parser.takes_command_line = True
    parser.command_line_option = "--describe"
    parser.set_defaults(command=[])


def description_for(args: argparse.Namespace, snapshot: Snapshot) -> bytes | None:
    """Return the description that was asked for, None where none was.

    Raises UsageError where no command line is known, NotSupported where the device state cannot be
    described.
    """
    if not args.describe:
        return None
    # The library for QMP is an extra: what does not need it works without.
    from pyqmigrate.cli.interruption import run_interruptible
    from pyqmigrate.vm.twin.twin import describe_snapshot

    return run_interruptible(describe_snapshot(snapshot, args.command))
