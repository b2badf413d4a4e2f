"""New pages -> compressed frames -> packs, in order."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.format.digest import DIGEST_SIZE, Data
from pyqmigrate.format.store.config import PAGE, StoreConfig
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.keys import pack_key
from pyqmigrate.format.store.numbers import Numbers
from pyqmigrate.format.store.pack import (
    MAGIC,
    NO_BASE,
    PACK_MAX,
    PAGES_MAX,
    TRAILER_SIZE,
    BasePage,
    PackFooter,
    footer_size,
)
from pyqmigrate.format.store.zstd import compress
from pyqmigrate.io.store_pages import xor_into
from pyqmigrate.store.place import Place

__all__ = ["BasePages", "FrameMaker", "MadeFrame", "PackWriter"]

_WRITES = 2  # packs that are being written, at most
_PATIENCE = 3  # frames that are not tried after XOR has failed again and again


@dataclass(frozen=True)
class MadeFrame:
    """A compressed frame. ``bases`` has the base of each page of an XOR frame; it is None for a plain
    one."""

    data: bytes
    npages: int
    bases: Sequence[BasePage | None] | None = None


class BasePages:
    """The pages of the parent by file page: what new pages may be XORed with."""

    def base(self, page: int) -> BasePage | None:
        """Return the plain page that file page ``page`` of the parent is or is XORed with."""
        raise NotImplementedError

    def contents(self, bases: Sequence[BasePage | None]) -> Sequence[Data | None]:
        """Return the content of each base."""
        raise NotImplementedError


class FrameMaker:
    """Compresses new pages, for several threads. Where a frame that is XORed with its bases is smaller,
    it is made so; where it was not, the following ones are tried less often."""

    def __init__(self, config: StoreConfig, parent: BasePages | None) -> None:
        self._level = config.zstd_level
        self._pages = config.frame_pages
        self._parent = parent
        self._lock = threading.Lock()
        self._pause = 0
        self._left = 0

    def make(self, pages: memoryview, places: Sequence[int]) -> list[MadeFrame]:
        """Return the frames of new pages, which are at file pages ``places``."""
        return [
            self._frame(
                pages[first * PAGE : (first + self._pages) * PAGE],
                places[first : first + self._pages],
            )
            for first in range(0, len(places), self._pages)
        ]

    def _frame(self, pages: memoryview, places: Sequence[int]) -> MadeFrame:
        plain = compress(pages, self._level)
        if self._parent is None or not self._is_tried():
            return MadeFrame(plain, len(places))
        xored = self._xored(self._parent, pages, places)
        # Its bases take bytes of the footer.
        better = xored is not None and len(xored.data) + 8 * len(places) < len(plain)
        with self._lock:
            self._pause = 0 if better else min(2 * self._pause + 1, _PATIENCE)
            self._left = self._pause
        return xored if better and xored is not None else MadeFrame(plain, len(places))

    def _is_tried(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left < 0

    def _xored(
        self, parent: BasePages, pages: memoryview, places: Sequence[int]
    ) -> MadeFrame | None:
        try:
            bases = [parent.base(place) for place in places]
            if not any(bases):
                return None
            contents = parent.contents(bases)
        except PyqmigrateError:
            return None  # a damaged pack cannot help; who reads the parent is told
        content = bytearray(pages)
        view = memoryview(content)
        for number, base in enumerate(contents):
            if base is not None:
                xor_into(view[number * PAGE : (number + 1) * PAGE], base)
        return MadeFrame(compress(content, self._level), len(places), bases)


class PackWriter:
    """Writes frames into packs of a place, in order; for one thread.

    ``starts`` has the number of the first page of each pack and, at the end, that after the last;
    ``packs`` their digests. Close it with :meth:`finish` or :meth:`abandon`.
    """

    def __init__(self, place: Place, config: StoreConfig, first: int) -> None:
        self._place = place
        self._key = config.key
        self._threads = ThreadPoolExecutor(1, "pyqmigrate-packs")
        self._writes: deque[Future[None]] = deque()
        self.packs: list[bytes] = []
        self.starts: Numbers = array("Q", [first])
        self.bytes_written = 0
        self.base_packs: dict[bytes, set[bytes]] = {}  # of each pack that has XOR frames
        self._begin()

    def _begin(self) -> None:
        self._frames: list[bytes] = []
        self._lengths, self._npages, self._kinds = array("I"), array("H"), array("H")
        self._base_numbers, self._base_pages = array("I"), array("I")
        self._bases: dict[bytes, int] = {}
        self._digests = bytearray()
        self._size = len(MAGIC) + TRAILER_SIZE

    def add(self, frame: MadeFrame, digests: bytes) -> None:
        """Add a frame with the digests of its pages. Raises what writing an earlier pack raised."""
        more = set() if frame.bases is None else {base.pack for base in frame.bases if base}
        more -= self._bases.keys()
        xor_pages = 0 if frame.bases is None else frame.npages
        pages = len(self._digests) // DIGEST_SIZE + frame.npages
        footer = footer_size(
            len(self._lengths) + 1,
            pages,
            len(self._base_pages) + xor_pages,
            len(self._bases) + len(more),
        )
        if self._frames and (self._size + len(frame.data) + footer > PACK_MAX or pages > PAGES_MAX):
            self._write()
        self._frames.append(frame.data)
        self._size += len(frame.data)
        self._lengths.append(len(frame.data))
        self._npages.append(frame.npages)
        self._kinds.append(frame.bases is not None)
        for base in frame.bases or ():
            if base is None:
                self._base_numbers.append(NO_BASE)
                self._base_pages.append(NO_BASE)
            else:
                self._base_numbers.append(self._bases.setdefault(base.pack, len(self._bases)))
                self._base_pages.append(base.page)
        self._digests += digests

    def _write(self) -> None:
        footer = PackFooter(
            self._lengths,
            self._npages,
            self._kinds,
            tuple(self._bases),
            self._base_numbers,
            self._base_pages,
            bytes(self._digests),
        )
        data = b"".join([MAGIC, *self._frames, footer.encode(self._key)])
        pack = keyed_digest(self._key, [data])
        self.packs.append(pack)
        if self._bases:
            self.base_packs[pack] = set(self._bases)
        self.starts.append(self.starts[-1] + len(footer))
        self.bytes_written += len(data)
        self._begin()
        while len(self._writes) >= _WRITES:
            self._writes.popleft().result()
        self._writes.append(self._threads.submit(self._put, pack, data))

    def _put(self, pack: bytes, data: bytes) -> None:
        """Write a pack. One that is there under its name is the same, or damaged: then it is replaced."""
        key = pack_key(pack)
        if not self._place.write_new(key, data) and bytes(self._place.read(key)) != data:
            self._place.replace(key, data)

    def finish(self) -> None:
        """Write the last pack, and wait until all are durable. Raises TargetError."""
        try:
            if self._frames:
                self._write()
            while self._writes:
                self._writes.popleft().result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End the thread; packs that were written stay, for a later adder. Idempotent."""
        self._threads.shutdown(wait=True, cancel_futures=True)
