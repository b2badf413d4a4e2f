"""Send the pages of a post-copy migration over a socket; in the core, without the GIL.

    sending = PageSending([SentBlock("pc.ram", 4096, 1, data, pending, sent)], header, end)
    sending.connect(connection)
    while True:
        events = sending.serve(push=True, quiet=200_000, timeout=None)
        if events & Events.DUE:
            sending.send(0, first, npages, pages)

What the core can do alone does not come here: requests for pages of a file, for zero pages, and for
pages that were sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyqmigrate._core as _core
from pyqmigrate.errors import UsageError
from pyqmigrate.format.digest import Data
from pyqmigrate.io.bitmap import Bitmap

if TYPE_CHECKING:  # few snapshots are sealed
    from pyqmigrate.io.checked_pages import CheckedPages

__all__ = ["Events", "PageSending", "PagesInFile", "Requested", "SentBlock"]

_RECEIVED = 1 << 14


class Events:
    """Why :meth:`PageSending.serve` returned: bits of a number, since a flag's operators take long.

    ``REQUEST``: :attr:`PageSending.requested` has to be answered. ``MESSAGE``: :meth:`PageSending.received`
    has bytes. ``ANSWERED``, ``PUSHED``: the pages of :meth:`PageSending.send` were sent. ``DUE``: pages
    can be sent that nobody has asked for. ``SLOW``, ``CONTROL``: a descriptor of these is readable. ``EMPTY``: a
    block has no more pages that have to be sent.
    """

    REQUEST: int = _core.lib.QM_REQUEST
    MESSAGE: int = _core.lib.QM_MESSAGE
    ANSWERED: int = _core.lib.QM_ANSWERED
    PUSHED: int = _core.lib.QM_PUSHED
    DUE: int = _core.lib.QM_DUE
    SLOW: int = _core.lib.QM_WOKEN_0
    CONTROL: int = _core.lib.QM_WOKEN_1
    TIMEOUT: int = _core.lib.QM_TIMEOUT
    EMPTY: int = _core.lib.QM_EMPTY


@dataclass(frozen=True)
class PagesInFile:
    """Where the pages of a block are in a file that the core may read: its descriptor, the position of page
    0, and, if they have to be compared, with what. All is borrowed."""

    fd: int
    pages_offset: int
    checked: CheckedPages | None = None


@dataclass(frozen=True)
class SentBlock:
    """A block: its name, page size in bytes, how many pages are one of the destination, its bitmaps
    (``struct qm_served_block``), which are borrowed, and where its pages are."""

    name: str
    page_size: int
    together: int
    data: Bitmap
    pending: Bitmap
    sent: Bitmap
    place: PagesInFile | None = None


@dataclass(frozen=True, slots=True)
class Requested:
    """Pages ``[first, first + npages)`` of block number ``block``, asked for at ``since``, in nanoseconds of
    ``time.monotonic_ns()``."""

    block: int
    first: int
    npages: int
    since: int


class PageSending:
    """One connection after another, for one thread. Close it.

    part_header, part_end: the bytes around the records of a PART.
    """

    def __init__(self, blocks: Sequence[SentBlock], part_header: bytes, part_end: bytes) -> None:
        self._kept: list[Any] = list(blocks)
        self._pages: list[Any] = [None, None]  # that are being sent: nobody asked; requested
        self._blocks = _core.ffi.new("struct qm_served_block[]", len(blocks))
        for core, block in zip(self._blocks, blocks, strict=True):
            self._fill(core, block)
        self._serving = _core.ffi.new("struct qm_serving *")
        self._sent = _core.ffi.new("struct qm_sent_pages *")
        core = _core.lib.qm_postcopy_create(self._blocks, len(blocks), part_header, part_end)
        if not core:
            raise MemoryError
        self._core: Any = _core.ffi.gc(core, _core.lib.qm_postcopy_destroy)

    def _fill(self, core: Any, block: SentBlock) -> None:
        name = _core.ffi.new("unsigned char[]", block.name.encode("utf-8", "surrogateescape"))
        self._kept.append(name)
        core.name, core.name_len = name, len(name) - 1
        core.page_size, core.together, core.npages = (
            block.page_size,
            block.together,
            block.data.npages,
        )
        core.data, core.pending, core.sent = block.data.core, block.pending.core, block.sent.core
        place = block.place
        core.fd = -1
        if place is None:
            return
        core.pages_offset = place.pages_offset
        if place.checked is None:
            core.fd = place.fd
        elif place.pages_offset % place.checked.unit == 0 == block.page_size % place.checked.unit:
            core.fd = place.fd
            core.digests, core.checked = place.checked.table.core, place.checked.pieces.core

    def connect(self, connection: socket.socket) -> None:
        """Go over to a new connection, which is borrowed; its bitmaps may have been changed."""
        self._pages = [None, None]
        for core, block in zip(self._blocks, self._kept, strict=False):
            core.left = block.pending.count()
        _core.lib.qm_postcopy_connect(self._core, connection.fileno())

    @property
    def left(self) -> int:
        """How many pages with data have not been sent."""
        return sum(core.left for core in self._blocks)

    @property
    def idle(self) -> bool:
        """Whether nothing is being sent: what goes out now does not cut a record off."""
        return bool(_core.lib.qm_postcopy_idle(self._core))

    @property
    def pushing(self) -> bool:
        """Whether pages are being sent that nobody has asked for."""
        return self._pages[0] is not None

    @property
    def answering(self) -> bool:
        """Whether requested pages are being sent, of :meth:`send` or by the core alone."""
        return bool(_core.lib.qm_postcopy_answering(self._core))

    def send(self, block: int, first: int, npages: int, pages: Data | None, since: int = 0) -> None:
        """Have :meth:`serve` send pages ``[first, first + npages)``; those that were sent are left out.

        pages: their content, kept until they are sent; None if they are zeros.
        since: when they were asked for; 0 for others, of which only those with data are sent.

        UsageError if such pages are being sent (:attr:`pushing`, :attr:`answering`), or do not exist.
        """
        requested = since != 0
        sent = self._sent
        sent.block, sent.first, sent.npages, sent.since = block, first, npages, since
        size = npages * self._blocks[block].page_size
        if pages is not None and len(pages) < size:
            raise UsageError(f"{len(pages)} bytes are not {npages} pages")
        content = _core.ffi.NULL if pages is None else _core.ffi.from_buffer(pages)
        sent.bytes = content
        if self._pages[requested] is not None or _core.lib.qm_postcopy_send(self._core, sent):
            raise UsageError(f"pages {first} to {first + npages} of block {block} cannot be sent")
        self._pages[requested] = (content, pages)

    def serve(
        self,
        *,
        push: bool,
        quiet: int,
        timeout: int | None,
        slow: int = -1,
        control: int = -1,
        raw: bool = False,
        every: bool = False,
        waits: bool = False,
    ) -> int:
        """Answer requests and send, until the caller has something to do; return what.

        push: whether the caller has pages that nobody has asked for.
        quiet: nanoseconds without a request before such pages are sent; timeout: nanoseconds, None for ever.
        raw: return all that is received as messages: the caller has the start of an incomplete one.

        every: return every request for pages that were not sent.
        waits: whether the caller has an answer that waits for the end of :attr:`answering`.

        Raises OSError if the connection has ended.
        """
        serving = self._serving
        serving.all, serving.waits = every, waits
        serving.push, serving.raw, serving.quiet = push, raw, quiet
        serving.timeout = -1 if timeout is None else timeout
        serving.wake = (slow, control)
        rc = _core.lib.qm_postcopy_serve(self._core, serving)
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))
        events = int(serving.events)
        if events & Events.PUSHED:
            self._pages[0] = None
        if events & Events.ANSWERED:
            self._pages[1] = None
        return events

    @property
    def requested(self) -> Requested:
        """The request of the last :meth:`serve`."""
        serving = self._serving
        return Requested(serving.block, serving.first, serving.npages, serving.since)

    def received(self) -> bytes:
        """Return what was received and is not a request; of the messages after it, too."""
        out = _core.ffi.new("unsigned char[]", _RECEIVED)
        length = _core.lib.qm_postcopy_received(self._core, out, _RECEIVED)
        return bytes(_core.ffi.buffer(out, length))

    @property
    def last_asked(self) -> int | None:
        """The number of the block that the latest request was for, None before any."""
        number = int(_core.lib.qm_postcopy_last_asked(self._core))
        return None if number < 0 else number

    def asked(self, block: int) -> None:
        """Note a request that was among the messages: for pages of this block."""
        self._serving.requests += 1
        _core.lib.qm_postcopy_asked(self._core, block)

    def to_json(self) -> dict[str, Any]:
        """Return how many pages were sent, requests, and how long the answers took, in seconds."""
        serving = self._serving
        answers = int(serving.answers)
        return {
            "pages_sent": sum(core.total for core in self._blocks),
            "requests": int(serving.requests),
            "mean_latency": serving.answer_ns / answers / 1e9 if answers else 0.0,
            "longest_latency": serving.longest_ns / 1e9,
        }

    def close(self) -> None:
        """Free the memory; the connection stays open. Idempotent."""
        if self._core is not None:
            _core.ffi.release(self._core)
            self._core = None
