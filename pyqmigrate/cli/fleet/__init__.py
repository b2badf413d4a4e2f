"""Work with many snapshots: verify, describe, seal them or add them to a store."""

from __future__ import annotations

from pyqmigrate.cli.arguments import Verbs, add_general

__all__ = ["add_parser"]

_VERBS = ("verify", "info", "add", "seal", "table")


def add_parser(verbs: Verbs) -> None:
    """Add ``fleet`` with its verbs."""
    text = (__doc__ or "").strip()
    parser = verbs.add_parser(
        "fleet", help=text[:1].lower() + text[1:].rstrip("."), description=text, allow_abbrev=False
    )
    add_general(parser)
    parser.offer(__name__, _VERBS)
