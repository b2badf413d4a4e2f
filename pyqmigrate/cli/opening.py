"""Open a snapshot of any kind for a verb, by its arguments."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from pyqmigrate.cli.arguments import Parser, add_base, add_bitmap_order, add_offset, add_page_size
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.standard_streams import read_from
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot

__all__ = ["add_snapshot", "opened", "opened_at_random"]


def add_snapshot(parser: Parser) -> None:
    """Add SNAPSHOT, and the options about it."""
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="a file, or - for standard input")
    add_offset(parser)
    add_page_size(parser)
    add_bitmap_order(parser)
    parser.add_argument(
        "--index",
        metavar="FILE",
        default=None,
        help="keep an index of a sequential stream there: where its pages are, for random reads",
    )
    add_base(parser)


@contextlib.contextmanager
def opened(args: argparse.Namespace, path: str, *, one_pass: bool = False) -> Iterator[Snapshot]:
    """Open the snapshot, also from standard input or a pipe. A sequential stream is read through,
    unless the verb makes its ``one_pass`` itself."""
    source, offset = read_from(path, args.offset)
    with open_snapshot(
        source,
        offset=offset,
        bitmap_order=args.bitmap_order,
        page_size=args.page_size,
        index=args.index,
        base=args.base,
        allow_pipe=True,
    ) as snapshot:
        if snapshot.one_pass and not one_pass:
            with shown("read through") as show:
                snapshot.read_through(show)
        yield snapshot


@contextlib.contextmanager
def opened_at_random(args: argparse.Namespace) -> Iterator[Snapshot]:
    """Open the snapshot of a verb that reads its pages at random, as ``random_access`` does."""
    from pyqmigrate.analysis.random_access import random_access  # other verbs do without

    with opened(args, args.snapshot, one_pass=True) as snapshot, contextlib.ExitStack() as stack:
        with shown("unpack" if snapshot.source.forward else "read through") as show:
            ready = stack.enter_context(random_access(snapshot, show))
        yield ready
