"""A snapshot of any kind, opened for a verb as its arguments say."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from pyqmigrate.classic import ClassicSnapshot
from pyqmigrate.cli.arguments import Parser, add_bitmap_order, add_offset
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.sizes import read_size
from pyqmigrate.opening import AnySnapshot, open_snapshot

__all__ = ["add_snapshot", "opened"]


def add_snapshot(parser: Parser, name: str = "snapshot") -> None:
    """SNAPSHOT, and what may be said about it."""
    parser.add_argument(name, metavar=name.upper())
    add_offset(parser)
    parser.add_argument(
        "--page-size", type=read_size, metavar="SIZE", default=None,
        help="of a classic stream that does not tell it (default: 4096)",
    )
    add_bitmap_order(parser)
    parser.add_argument(
        "--index", metavar="FILE", default=None,
        help="keep an index of a classic stream there: where its pages are, for random reads",
    )


@contextlib.contextmanager
def opened(
    args: argparse.Namespace, path: str, *, one_pass: bool = False
) -> Iterator[AnySnapshot]:
    """The snapshot. A classic stream is read through, unless the verb needs just ``one_pass``, and
    makes that itself: then it may come through a pipe."""
    with open_snapshot(
        path, offset=args.offset, bitmap_order=args.bitmap_order, page_size=args.page_size,
        index=args.index, piped=one_pass,
    ) as snapshot:
        if not one_pass and isinstance(snapshot, ClassicSnapshot):
            with shown("read through") as show:
                snapshot.read_through(show)
        yield snapshot
