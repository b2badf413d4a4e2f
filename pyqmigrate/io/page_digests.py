"""Compute digests of the pages of guest memory, and find the pages that differ from them.

A digest is the xxh3-128 of a page, 16 bytes. Several channels read the memory, in the core and without
the GIL, at memory speed::

    with PageDigests(blocks) as digests:                 # the RAM blocks, as for a save
        digests.start_compute(channels=2).wait()         # while the guest runs
        ...
        changed = {name: Bitmap(table.npages) for name, table in digests.tables.items()}
        digests.start_compare(changed, channels=2).wait()    # while it is stopped

A page that was never digested differs from every content: its entry is 16 zero bytes.

While the guest runs, a comparison sees each page at a different instant. If the changed pages are then
copied while it still runs, the comparison must not update the table: the copy may have newer content,
and if the guest then restores the old content, the page would look unchanged. Use ``update=False``, and
enter the digests of the copies with :meth:`DigestTable.enter`.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pyqmigrate import _core
from pyqmigrate.core import Channel
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE, Data
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, check_channels, split_ranges
from pyqmigrate.io.job import Job
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.memory import OpenMemory, RamBlock, attach

__all__ = ["DigestReport", "DigestTable", "PageDigests"]

_PIECE = 1 << 20  # bytes of a table moved at a time


class DigestTable:
    """The digests of the ``npages`` pages of one block, each 16 bytes; all zero at first.

    ``core`` is the ``unsigned char *`` that the core works on. Its anonymous memory is
    allocated when digests are entered. Raises NotSupported if there is not enough memory.
    """

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.nbytes = npages * DIGEST_SIZE
        # Private: reading shared anonymous memory allocates it.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._memory = mmap.mmap(-1, max(self.nbytes, mmap.PAGESIZE), flags=flags)
        except (OSError, OverflowError) as error:
            raise NotSupported(
                f"not enough memory for the digests of {npages} pages ({error})"
            ) from error
        self._buffer = _core.ffi.from_buffer("unsigned char[]", self._memory)
        self.core: Any = self._buffer

    def __len__(self) -> int:
        return self.npages

    def __getitem__(self, page: int) -> bytes:
        if not 0 <= page < self.npages:
            raise IndexError(f"page {page} of {self.npages}")
        return self._memory[page * DIGEST_SIZE : (page + 1) * DIGEST_SIZE]

    def enter(self, first: int, pages: Data, page_size: int) -> None:
        """Enter the digests of ``pages``, which were copied from page ``first`` on.

        UsageError unless these are whole pages of the block.
        """
        npages, rest = divmod(len(pages), page_size)
        if rest or not 0 <= first <= self.npages - npages:
            raise UsageError(
                f"{len(pages)} bytes are not whole pages of {page_size} bytes from page {first} on "
                f"of {self.npages}"
            )
        data = _core.ffi.from_buffer("unsigned char[]", pages)
        try:
            entry = self.core + first * DIGEST_SIZE
            if _core.lib.qm_digest_bytes(data, npages, page_size, entry):
                raise UsageError(f"pages cannot have {page_size} bytes")
        finally:
            _core.ffi.release(data)

    def enter_zeros(self, page_size: int) -> None:
        """Enter the digest of a zero page for all pages. UsageError for an invalid page size."""
        if _core.lib.qm_digest_zeros(self.npages, page_size, self.core):
            raise UsageError(f"pages cannot have {page_size} bytes")

    def forget(self, first: int, npages: int) -> None:
        """Clear the entries of some pages, so that they differ from every content."""
        if not 0 <= first <= self.npages - npages:
            raise UsageError(f"pages {first} to {first + npages} of {self.npages} do not exist")
        for start in range(first, first + npages, _PIECE // DIGEST_SIZE):
            end = min(start + _PIECE // DIGEST_SIZE, first + npages)
            self._memory[start * DIGEST_SIZE : end * DIGEST_SIZE] = bytes(
                (end - start) * DIGEST_SIZE
            )

    def pieces(self) -> Iterator[bytes]:
        """Yield the entries in order, a MiB at a time."""
        for start in range(0, self.nbytes, _PIECE):
            yield self._memory[start : min(start + _PIECE, self.nbytes)]

    def put(self, offset: int, entries: Data) -> None:
        """Store entries at byte ``offset`` of the table. UsageError outside of it."""
        if not 0 <= offset <= self.nbytes - len(entries):
            raise UsageError(f"a table of {self.nbytes} bytes has no room at {offset}")
        self._memory[offset : offset + len(entries)] = entries

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self.core = None
        _core.ffi.release(self._buffer)
        unmap(self._memory)


@dataclass(frozen=True)
class DigestReport:
    """The result of a pass over memory. ``pages`` were examined, ``zero_pages`` of them are zero, and
    ``changed_pages`` differ from the table (all of them when digests were only taken)."""

    pages: int
    zero_pages: int
    changed_pages: int
    seconds: float


class PageDigests:
    """The open memory of RAM blocks, and a :class:`DigestTable` for each of them by name.

    ``blocks`` are as for a save; their memory is only read, and borrowed until :meth:`close`.
    ``tables`` are those of an earlier pass, where given. One job at a time. Raises UsageError as a
    save does for its blocks, and for a table of another size.
    """

    def __init__(
        self, blocks: Sequence[RamBlock], tables: Mapping[str, DigestTable] | None = None
    ) -> None:
        self._names = [block.name for block in blocks]
        self._memories: list[OpenMemory] = []
        self._blocks: list[Any] = []
        self.tables: dict[str, DigestTable] = dict(tables or {})
        try:
            for block in blocks:
                memory = attach(block, writable=False)
                self._memories.append(memory)
                core = _core.ffi.new("struct qm_block *")
                core.len, core.page_size = memory.length, block.page_size
                self._blocks.append(core)
                npages = memory.length // block.page_size
                if block.name not in self.tables:
                    self.tables[block.name] = DigestTable(npages)
                table = self.tables[block.name]
                if table.npages != npages:
                    raise UsageError(
                        f"the digests of block {block.name!r} are of {table.npages} pages, but it "
                        f"has {npages}"
                    )
        except BaseException:
            self.close()
            raise

    def start_compute(
        self, *, selection: Mapping[str, Bitmap] | None = None, channels: int = 4
    ) -> Job[DigestReport]:
        """Start to enter the digests of all pages, or of those whose bits ``selection`` has set.

        Blocks that ``selection`` does not name are left out. The job's result raises
        GuestMemoryError when memory goes away, and Cancelled.
        """
        return self._start(None, selection, True, channels)

    def start_compare(
        self,
        changed: Mapping[str, Bitmap],
        *,
        update: bool = True,
        selection: Mapping[str, Bitmap] | None = None,
        channels: int = 4,
    ) -> Job[DigestReport]:
        """Start to set, in ``changed``, the bits of pages that differ from their digests.

        There must be a bitmap for each block that is looked at; bits that are set stay so.
        ``update``: the tables get the new digests. ``selection`` and what the result raises are as
        in :meth:`start_compute`.
        """
        missing = [name for name in self._chosen(selection) if name not in changed]
        if missing:
            raise UsageError(f"a bitmap for the changed pages of block {missing[0]!r} is missing")
        return self._start(changed, selection, update, channels)

    def _chosen(self, selection: Mapping[str, Bitmap] | None) -> list[str]:
        return [name for name in self._names if selection is None or name in selection]

    def _start(
        self,
        changed: Mapping[str, Bitmap] | None,
        selection: Mapping[str, Bitmap] | None,
        update: bool,
        channels: int,
    ) -> Job[DigestReport]:
        for bitmaps in (changed, selection):
            for name, bitmap in (bitmaps or {}).items():
                if name not in self.tables:
                    raise UsageError(f"unknown block {name!r}")
                if bitmap.npages != self.tables[name].npages:
                    raise UsageError(f"a bitmap of block {name!r} has {bitmap.npages} pages")
        crew = Channels(check_channels(channels), "pyqmigrate-digests")
        total = sum(
            self._blocks[number].len
            if selection is None
            else selection[name].count() * self._blocks[number].page_size
            for number, name in enumerate(self._names)
            if selection is None or name in selection
        )
        return Job(crew, total, lambda: self._run(crew, changed, selection, update))

    def _run(
        self,
        crew: Channels,
        changed: Mapping[str, Bitmap] | None,
        selection: Mapping[str, Bitmap] | None,
        update: bool,
    ) -> DigestReport:
        started = time.monotonic()
        null = _core.ffi.NULL
        before = sum(bitmap.count() for bitmap in (changed or {}).values())

        def digest(channel: Channel, item: Range) -> int:
            name = self._names[item.block]
            block, memory = self._blocks[item.block], self._memories[item.block].core
            selected = null if selection is None else selection[name].core
            table = self.tables[name].core
            fault = channel.fault.core
            pages = (item.first, item.npages, fault)
            fault.in_memory, fault.at = 1, 0
            if changed is None:
                rc = _core.lib.qm_digest_pages(
                    crew.core.core, channel.core, block, memory, selected, table, *pages
                )
            else:
                bits = changed[name].core
                rc = _core.lib.qm_compare_pages(
                    crew.core.core,
                    channel.core,
                    block,
                    memory,
                    selected,
                    table,
                    update,
                    bits,
                    *pages,
                )
            return int(rc)

        crew.run(self._ranges(selection), digest, "guest memory", self._names)
        totals = crew.totals()
        pages = totals.data_pages + totals.zero_pages
        found = sum(bitmap.count() for bitmap in (changed or {}).values()) - before
        return DigestReport(
            pages,
            totals.zero_pages,
            pages if changed is None else found,
            time.monotonic() - started,
        )

    def _ranges(self, selection: Mapping[str, Bitmap] | None) -> Iterator[Range]:
        for number, name in enumerate(self._names):
            if selection is not None and name not in selection:
                continue
            block = self._blocks[number]
            for item in split_ranges(number, block.len // block.page_size, block.page_size):
                if selection is None or selection[name].may_hold(item.first, item.npages):
                    yield item

    def close(self) -> None:
        """Release the memory; the tables belong to the caller and stay. Idempotent."""
        for memory in self._memories:
            memory.close()
        self._memories = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
