"""The options of the verbs that look through memory."""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Parser, add_channels
from pyqmigrate.cli.sizes import read_range

__all__ = ["add_area", "shown_place"]


def add_area(parser: Parser) -> None:
    """Add ``--block``, ``--address-range`` and ``--channels``."""
    area = parser.add_mutually_exclusive_group()
    area.add_argument("--block", metavar="NAME", help="look only into this RAM block")
    area.add_argument(
        "--address-range",
        type=_read_range,
        metavar="A-B",
        help="only what starts at the guest-physical addresses A to B (not included)",
    )
    add_channels(parser, 2)


def _read_range(text: str) -> tuple[int, int]:
    found = read_range(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a range; write it as 0x1000-0x2000 or 1G-2G"
        )
    return found


def shown_place(block: str, offset: int, address: int | None) -> str:
    """Return where something is, for people: the address, and the place in its block."""
    shown = "-" if address is None else f"{address:#x}"
    return f"{shown:>12}  {block}:{offset:#x}"
