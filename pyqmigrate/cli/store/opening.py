"""The arguments that the verbs of ``store`` share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pyqmigrate.cli.arguments import Parser
from pyqmigrate.store.store import SnapshotEntry, Store

__all__ = ["add_store", "add_threads", "entry_data", "opened_store", "shown_time"]


def add_store(
    parser: Parser, help: str = "a directory, or a URL such as s3://bucket/prefix"
) -> None:
    parser.add_argument("store", metavar="STORE", help=help)


def add_threads(parser: Parser) -> None:
    from pyqmigrate.cli.arguments import read_channels

    parser.add_argument(
        "--channels",
        type=read_channels,
        metavar="N",
        default=4,
        help="threads, each with a pack of 8 MiB at most (default: 4)",
    )


@contextlib.contextmanager
def opened_store(args: argparse.Namespace) -> Iterator[Store]:
    with Store.open(args.store) as store:
        yield store


def shown_time(time_ns: int) -> str:
    """Return a time for people, in the local time zone."""
    try:
        return datetime.fromtimestamp(time_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def entry_data(entry: SnapshotEntry) -> dict[str, Any]:
    """Return a snapshot of a list for ``--json``."""
    data: dict[str, Any] = {"name": entry.name, "damage": entry.error}
    head = entry.head
    if head is None:
        return data
    return data | {
        "size": head.size,
        "mtime_ns": head.mtime_ns,
        "added_ns": head.added_ns,
        "machine": head.machine,
        "uuid": None if head.uuid is None else _uuid(head.uuid),
        "parent": head.parent,
        "source": head.source,
        "labels": dict(head.labels),
        "pages": head.counts.pages,
        "same_pages": head.counts.same_pages,
        "new_pages": head.counts.new_pages,
        "new_bytes": head.counts.new_bytes,
        "packs": entry.packs,
        "document_bytes": entry.stored_bytes,
    }


def _uuid(value: bytes) -> str:
    text = value.hex()
    return "-".join([text[:8], text[8:12], text[12:16], text[16:20], text[20:]])
