"""Bytes that go into the page cache before anybody reads them: a working set, in its order.

The kernel takes them (FUSE_NOTIFY_STORE) as if they had been read. A read that somebody waits for goes
first: the pusher pauses while one is served.
"""

from __future__ import annotations

import array
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.io.plain_file import PlainFile, views_of
from pyqmigrate.log import logger
from pyqmigrate.mount.board import Board
from pyqmigrate.mount.connection import Body, DeviceConnection
from pyqmigrate.mount.nodes import Node, Nodes

__all__ = ["PushRange", "decode_ranges", "encode_ranges", "push", "ranges_of"]

_CHUNK = 1 << 20  # bytes that go in one message
_PAGE = 4096
_KNOWN_LIMIT = 60.0  # seconds until the kernel knows a node; otherwise it takes nothing
_MADE_LIMIT = 1.0  # seconds until the kernel has made a node of which it was told
_POLL = 0.0005
_PAUSE_MAX = 0.05  # seconds: a store that is always read from gets its working set all the same


class PushRange(NamedTuple):
    """Bytes of a node. ``offset`` and ``length`` in bytes."""

    node: int
    offset: int
    length: int


def ranges_of(wanted: Iterable[tuple[str, int, int]], nodes: Iterable[Node]) -> list[PushRange]:
    """Return the ranges that a client wants: names of open files, offsets and lengths in bytes.

    Raises UsageError for a name that no node has, and for impossible numbers.
    """
    by_name = {node.name: node.number for node in nodes}  # the newest one
    ranges = []
    for name, offset, length in wanted:
        if name not in by_name:
            raise UsageError(f"{name!r} has not been opened: nothing can be pushed for it")
        if not (0 <= offset < 1 << 63 and 0 < length < 1 << 63):
            raise UsageError(f"{length} bytes at {offset} cannot be pushed")
        ranges.append(PushRange(by_name[name], offset, length))
    return ranges


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


def push(
    ranges: Iterable[PushRange],
    connection: DeviceConnection,
    nodes: Nodes,
    board: Board,
    ready: threading.Event | None = None,
) -> int:
    """Push ranges, beginning where an earlier worker ended.

    ``ready`` is set when the kernel knows their nodes. Returns the bytes that it took. What follows
    something that cannot be read is left out.
    """
    pieces = (piece for whole in ranges for piece in _cut(whole, nodes.get(whole.node).size))
    pusher = _Pusher(connection, nodes, board, ready)
    rest = itertools.islice(pieces, board.pushed, None)
    for number, group in itertools.groupby(rest, key=lambda piece: piece.node):
        pusher.push(number, group)
    return pusher.taken


def _cut(whole: PushRange, size: int) -> Iterator[PushRange]:
    """Yield whole pages of a range of a node of ``size`` bytes, as the messages have them."""
    start = whole.offset // _PAGE * _PAGE
    end = min(-(-(whole.offset + whole.length) // _PAGE) * _PAGE, size)
    for offset in range(start, end, _CHUNK):
        yield PushRange(whole.node, offset, min(_CHUNK, end - offset))


@runtime_checkable
class _ReadsAhead(Protocol):
    """A file that reads many ranges at once, as that of a store does."""

    def prefetch(
        self, ranges: Iterable[tuple[int, int]], *, workers: int, done: Callable[[int, int], None]
    ) -> int: ...


class _Pusher:
    """Pushes ranges, and counts the bytes that the kernel took."""

    def __init__(
        self,
        connection: DeviceConnection,
        nodes: Nodes,
        board: Board,
        ready: threading.Event | None,
    ) -> None:
        self._connection, self._nodes, self._board = connection, nodes, board
        self._ready = ready
        self._is_made = ready is None
        self._lock = threading.Lock()
        self.taken = 0

    def push(self, number: int, pieces: Iterable[PushRange]) -> None:
        """Push pieces of one node."""
        node, file = self._nodes.get(number), self._nodes.acquire(number)

        def store(offset: int, length: int) -> None:
            self._store(node, file, PushRange(number, offset, length))

        try:
            if isinstance(file, _ReadsAhead):
                # Many reads of a remote store are under way at once.
                file.prefetch(
                    ((piece.offset, piece.length) for piece in pieces),
                    workers=self._nodes.files.readers,
                    done=store,
                )
            else:
                for piece in pieces:
                    store(piece.offset, piece.length)
        except (OSError, PyqmigrateError) as error:
            logger.warning("cannot push all of %s: %s", node.name, error)
        finally:
            self._nodes.release(number)

    def _store(self, node: Node, file: PlainFile, piece: PushRange) -> None:
        if self._ready is not None and not self._ready.wait(_KNOWN_LIMIT):
            self._ready.set()  # nobody looks it up: the others need not wait as long
        _give_way(self._board)
        data = views_of(file, piece.offset, piece.length)
        taken = self._offer(piece, data)
        with self._lock:
            self.taken += piece.length if taken else 0
            self._board.pushed += 1

    def _offer(self, piece: PushRange, data: Sequence[Body]) -> bool:
        """Return whether the kernel takes a piece. It makes a node only after it was told of it."""
        until = time.monotonic() + _MADE_LIMIT
        while not (taken := self._connection.store(piece.node, piece.offset, data)):
            if self._is_made or time.monotonic() > until:
                break
            time.sleep(_POLL)
        self._is_made = True
        return taken


def _give_way(board: Board) -> None:
    """Wait while a read is being served."""
    until = time.monotonic() + _PAUSE_MAX
    while not board.is_idle() and time.monotonic() < until:
        time.sleep(_POLL)
