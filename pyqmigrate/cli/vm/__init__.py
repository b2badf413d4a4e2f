"""Work with a running QEMU: save, restore and clone it, keep guests ready, check what a save would do,
wait for its memory."""

from __future__ import annotations

from pyqmigrate.cli.arguments import Verbs, add_general

__all__ = ["add_parser"]

_VERBS = ("save", "check", "restore", "clone", "pool", "wait")


def add_parser(verbs: Verbs) -> None:
    """Add ``vm`` with its verbs."""
    text = (__doc__ or "").strip()
    parser = verbs.add_parser(
        "vm", help=text[:1].lower() + text[1:].rstrip("."), description=text, allow_abbrev=False
    )
    add_general(parser)
    parser.offer(__name__, _VERBS)
