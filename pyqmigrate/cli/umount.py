"""Unmount a directory that mount has mounted, and wait until its keeper has ended.

A mount that is in use stays, and the processes that use it are named. With --lazy it loses its name at
once; open files stay readable, and the keeper ends with the last of them.

JSON: ``directory``; ``keeper``, its process, or null if none answered; ``ended``, false if files are
still open.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.mount.unmounting import end_mount

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "umount", _run, __doc__)
    parser.add_argument("directory", metavar="DIR", help="the mount point")
    parser.add_argument(
        "--lazy", action="store_true", help="take the name away at once, even if files are open"
    )


def _run(args: argparse.Namespace) -> Outcome:
    unmounted = end_mount(args.directory, lazy=args.lazy)
    place = printable(unmounted.directory)
    how = "unmounted" if unmounted.ended else "unmounted; files of it are still open"
    return Outcome(asdict(unmounted), [f"{place}: {how}"])
