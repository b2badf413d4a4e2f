"""Work with a real QEMU: save it, restore it, clone it, look at what a save would do."""

from __future__ import annotations

from pyqmigrate.cli.arguments import Verbs
from pyqmigrate.cli.vm import check, clone, restore, save

__all__ = ["add_parser"]

_VERBS = (save, check, restore, clone)


def add_parser(verbs: Verbs) -> None:
    """Add ``vm`` with its verbs. Nothing that talks to QEMU is imported before one of them runs."""
    text = (__doc__ or "").strip()
    parser = verbs.add_parser(
        "vm", help=text[:1].lower() + text[1:].rstrip("."), description=text, allow_abbrev=False
    )
    inner = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add_parser(inner)
