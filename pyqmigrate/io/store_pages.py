"""Pages of a store: their digests, which of them are known, and XOR; in the core, without the GIL.

A store page has 4096 bytes, whatever the page size of the guest (docs/internals/store-format.md).
"""

from __future__ import annotations

import mmap
from array import array
from dataclasses import dataclass
from typing import Any

import pyqmigrate._core as _core
from pyqmigrate.core import Block
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE, Data
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.keyed import KEY_SIZE
from pyqmigrate.format.store.numbers import Numbers
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.mapping import unmap

__all__ = [
    "ExaminedPages",
    "FoundPages",
    "KnownPages",
    "PlacedRuns",
    "examine_pages",
    "page_digests",
    "xor_into",
]

_SLOTS_MIN = 1 << 16
_MAP_NORESERVE = 0x4000
_RUN = 3  # numbers: first file page, pages, number of the first page (or the word that fills them)


def page_digests(key: bytes, pages: Data) -> bytes:
    """Return the digests, 16 bytes each, of whole pages. UsageError for anything else."""
    npages, rest = divmod(len(pages), PAGE)
    if rest or len(key) != KEY_SIZE:
        raise UsageError(
            f"{len(pages)} bytes are not whole pages, or the key is not {KEY_SIZE} bytes"
        )
    digests = bytearray(npages * DIGEST_SIZE)
    with _core.ffi.from_buffer(pages) as data, _core.ffi.from_buffer(digests) as out:
        _core.lib.qm_blake3_pages(key, data, npages, 0, out)
    return bytes(digests)


def xor_into(data: bytearray | memoryview, other: Data) -> None:
    """XOR ``data`` with ``other``, which is as long."""
    if len(data) != len(other):
        raise UsageError(f"{len(data)} bytes cannot be XORed with {len(other)}")
    with _core.ffi.from_buffer(data) as to, _core.ffi.from_buffer(other) as from_:
        _core.lib.qm_xor(to, from_, len(data))


@dataclass(frozen=True)
class ExaminedPages:
    """What kind each page is (0 zero, 1 filled with one word, 2 data), and its digest or word."""

    kinds: bytearray
    digests: bytearray


def examine_pages(
    key: bytes, block: Block, bitmap: Bitmap | None, offset: int, data: memoryview
) -> ExaminedPages:
    """Examine whole pages, at byte ``offset`` of a block.

    Pages of the block whose bits are clear become zeros in ``data``. UsageError outside of the block.
    """
    npages = len(data) // PAGE
    examined = ExaminedPages(bytearray(npages), bytearray(npages * DIGEST_SIZE))
    if npages == 0:
        return examined
    bits = _core.ffi.NULL if bitmap is None else bitmap.core
    buffer = _core.ffi.from_buffer
    with buffer(data) as at, buffer(examined.kinds) as kinds, buffer(examined.digests) as digests:
        rc = _core.lib.qm_examine_pages(key, block.core, bits, offset, at, npages, kinds, digests)
    if rc:
        raise UsageError(f"{npages} pages at byte {offset} are not in the block")
    return examined


@dataclass(frozen=True)
class FoundPages:
    """Runs of one call of :meth:`KnownPages.find`, three numbers each: first file page, pages, and the
    number of the first known page (``runs``) or the word that fills them (``fills``). ``fresh`` is
    how many new pages there were."""

    runs: Numbers
    fills: Numbers
    fresh: int


@dataclass(frozen=True)
class PlacedRuns:
    """Runs split at the bounds of packs: file pages, lengths, pages in the pack, and the packs."""

    firsts: Numbers
    counts: Numbers
    pages: Numbers
    packs: Numbers


@dataclass
class _Scratch:
    """Arrays for one call; they grow to the largest."""

    room: int = 0
    runs: Any = None
    fills: Any = None


class KnownPages:
    """The digests of the pages that a store has, by number, and a table to look them up.

    Pages are numbered pack by pack in the order of :meth:`add_pack`, new ones after them. ``room`` is
    the most pages that there will be, at most 2**32 - 1. Memory: 16 bytes for each page, and 8 to 16
    for its place in the table. For one thread at a time. NotSupported without enough memory.
    """

    def __init__(self, room: int) -> None:
        if not 0 <= room < 1 << 32:
            raise NotSupported(
                f"{room} pages are too many to compare; fewer than 2**32 are possible"
            )
        self._core: Any = _core.ffi.new("struct qm_known *")
        self._digests, self._digests_core = self._map(max(room * DIGEST_SIZE, 1))
        self._slots, slots_core = self._map(_SLOTS_MIN * 4)
        self._core.digests, self._core.room = self._digests_core, room
        self._set_slots(slots_core, _SLOTS_MIN)
        self._scratch = _Scratch()
        self.starts: Numbers = array("Q", [0])

    @staticmethod
    def _map(length: int) -> tuple[mmap.mmap, Any]:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, length, flags=flags)
        except (OSError, OverflowError) as error:
            raise NotSupported(f"not enough memory for the digests of a store ({error})") from error
        return memory, _core.ffi.from_buffer("unsigned char[]", memory)

    def _set_slots(self, slots_core: Any, nslots: int) -> None:
        self._slots_core = slots_core
        self._core.slots = _core.ffi.cast("uint32_t *", slots_core)
        self._core.nslots = nslots

    def __len__(self) -> int:
        return int(self._core.npages)

    def add_pack(self, digests: Data) -> None:
        """Add the pages of a pack, before the first :meth:`find`. UsageError if there is no room."""
        first = len(self)
        npages = first + len(digests) // DIGEST_SIZE
        if npages > self._core.room:
            raise UsageError(f"there is no room for {npages} known pages")
        self._digests[first * DIGEST_SIZE : npages * DIGEST_SIZE] = digests
        self._grow(npages)
        _core.lib.qm_known_index(self._core, first, npages)
        self.starts.append(npages)

    def digests(self, first: int, npages: int) -> bytes:
        """Return the digests of some pages, by number."""
        return self._digests[first * DIGEST_SIZE : (first + npages) * DIGEST_SIZE]

    def find(
        self,
        data: memoryview,
        page: int,
        examined: ExaminedPages,
        fresh: memoryview,
        places: memoryview,
    ) -> FoundPages:
        """Look up the pages at ``data``, which begin at page ``page`` of the file, and enter new ones.

        New pages are copied to ``fresh``, and their file pages to ``places`` (of "Q"); both have room
        for as many pages as ``data``. UsageError for too little room.
        """
        npages = len(examined.kinds)
        if min(len(data), len(fresh)) < npages * PAGE or len(places) < npages:
            raise UsageError(f"there is no room for {npages} pages")
        if npages == 0:
            return FoundPages(array("Q"), array("Q"), 0)
        self._grow(len(self) + npages)
        found, scratch = _core.ffi.new("struct qm_found *"), self._scratch
        if scratch.room < npages:
            scratch.room = npages
            scratch.runs = _core.ffi.new("struct qm_page_run[]", npages)
            scratch.fills = _core.ffi.new("struct qm_page_run[]", npages)
        found.room, found.runs, found.fills = npages, scratch.runs, scratch.fills
        buffer = _core.ffi.from_buffer
        with (
            buffer("unsigned char[]", data) as at,
            buffer("unsigned char[]", fresh) as new,
            buffer("uint64_t[]", places) as new_places,
            buffer("unsigned char[]", examined.kinds) as kinds,
            buffer("unsigned char[]", examined.digests) as digests,
        ):
            found.fresh, found.places = new, new_places
            if _core.lib.qm_find_pages(self._core, found, at, page, npages, kinds, digests):
                raise UsageError(f"there is no room for {npages} known pages more")
        return FoundPages(
            _numbers(scratch.runs, found.nruns), _numbers(scratch.fills, found.nfills), found.nfresh
        )

    def _grow(self, npages: int) -> None:
        """Make the table large enough."""
        nslots = int(self._core.nslots)
        if 2 * npages <= nslots:
            return
        while nslots < 3 * npages:
            nslots *= 2
        old = (self._slots, self._slots_core)
        self._slots, slots_core = self._map(nslots * 4)
        self._set_slots(slots_core, nslots)
        _release(*old)
        _core.lib.qm_known_index(self._core, 0, len(self))

    def place(self, runs: Numbers, starts: Numbers) -> PlacedRuns:
        """Return where runs of known pages are: pack g has the numbers ``[starts[g], starts[g + 1])``.

        UsageError for a number of no pack.
        """
        nruns = len(runs) // _RUN
        buffer, lib = _core.ffi.from_buffer, _core.lib
        with buffer("struct qm_page_run[]", runs) as at, buffer("uint64_t[]", starts) as bounds:
            null = _core.ffi.NULL
            count = lib.qm_split_runs(at, nruns, bounds, len(starts), null, null)
            if count < 0:
                raise UsageError("a run has pages of no pack")
            parts = _core.ffi.new("struct qm_page_run[]", max(count, 1))
            groups = array("I", bytes(4 * count))
            with buffer("uint32_t[]", groups) as packs:
                lib.qm_split_runs(at, nruns, bounds, len(starts), parts, packs)
        found = _numbers(parts, count)
        return PlacedRuns(
            found[0::_RUN], array("I", found[1::_RUN]), array("I", found[2::_RUN]), groups
        )

    def close(self) -> None:
        """Release the memory. Idempotent."""
        if self._core is not None:
            self._core = None
            _release(self._digests, self._digests_core)
            _release(self._slots, self._slots_core)


def _release(memory: mmap.mmap, core: Any) -> None:
    _core.ffi.release(core)
    unmap(memory)


def _numbers(runs: Any, count: int) -> Numbers:
    numbers: Numbers = array("Q")
    if count:
        numbers.frombytes(_core.ffi.buffer(runs, count * _core.ffi.sizeof("struct qm_page_run")))
    return numbers
