"""Keep many snapshots: deduplicated and compressed, in a directory or an object store."""

from __future__ import annotations

from pyqmigrate.cli.arguments import Verbs, add_general

__all__ = ["add_parser"]

_VERBS = ("create", "add", "list", "show", "get", "rm", "gc", "verify", "copy")


def add_parser(verbs: Verbs) -> None:
    """Add ``store`` with its verbs."""
    text = (__doc__ or "").strip()
    parser = verbs.add_parser(
        "store", help=text[:1].lower() + text[1:].rstrip("."), description=text, allow_abbrev=False
    )
    add_general(parser)
    parser.offer(__name__, _VERBS)
