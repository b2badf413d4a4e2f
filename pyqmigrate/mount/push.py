"""Bytes that go into the page cache before anybody reads them: a working set, in its order.

The kernel takes them (FUSE_NOTIFY_STORE) as if they had been read. A read that somebody waits for goes
first: the pusher pauses while one is served.
"""

from __future__ import annotations

import array
import errno
import os
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyqmigrate.errors import TargetError
from pyqmigrate.log import logger
from pyqmigrate.mount.board import Board
from pyqmigrate.mount.connection import DeviceConnection
from pyqmigrate.mount.nodes import Nodes

__all__ = ["PushRange", "encode_ranges", "push"]

_CHUNK = 1 << 20  # bytes that go in one message
_PAGE = 4096
_POLL = 0.0005
_PAUSE_MAX = 0.05  # seconds: a store that is always read from gets its working set all the same


class PushRange(NamedTuple):
    """Bytes of a node. ``offset`` and ``length`` in bytes."""

    node: int
    offset: int
    length: int


def encode_ranges(ranges: Iterable[PushRange]) -> int:
    """Return a descriptor of a file with the ranges, for a worker. The caller closes it."""
    words = array.array("Q", (word for piece in ranges for word in piece))
    fd = os.memfd_create("pyqmigrate-push", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        words.tofile(file)
    return fd


def decode_ranges(fd: int) -> Iterator[PushRange]:
    """Yield the ranges of a file that :func:`encode_ranges` made; close ``fd``."""
    words = array.array("Q")
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        words.frombytes(file.read())
    for number in range(0, len(words), 3):
        yield PushRange(*words[number : number + 3])


def push(fd: int, connection: DeviceConnection, nodes: Nodes, board: Board) -> int:
    """Push the ranges of a file of :func:`encode_ranges`, beginning where an earlier worker ended.

    Returns the bytes that the kernel took. A range that cannot be read is skipped.
    """
    taken = 0
    for number, piece in enumerate(decode_ranges(fd)):
        if number < board.pushed:
            continue
        try:
            taken += _push_range(piece, connection, nodes, board)
        except OSError as error:
            logger.warning("cannot push %s: %s", piece, error)
        board.pushed = number + 1
    return taken


def _push_range(piece: PushRange, connection: DeviceConnection, nodes: Nodes, board: Board) -> int:
    node = nodes.get(piece.node)
    start = piece.offset // _PAGE * _PAGE
    end = min(-(-(piece.offset + piece.length) // _PAGE) * _PAGE, node.size)
    taken = 0
    for offset in range(start, end, _CHUNK):
        length = min(_CHUNK, end - offset)
        _give_way(board)
        file = nodes.acquire(piece.node)
        try:
            data = file.read(offset, length)
        finally:
            nodes.release(piece.node)
        if len(data) != length:
            raise TargetError(errno.EIO, f"{len(data)} bytes came instead of {length}", node.name)
        if connection.store(piece.node, offset, data):
            taken += length
    return taken


def _give_way(board: Board) -> None:
    """Wait while a read is being served."""
    until = time.monotonic() + _PAUSE_MAX
    while not board.is_idle() and time.monotonic() < until:
        time.sleep(_POLL)
