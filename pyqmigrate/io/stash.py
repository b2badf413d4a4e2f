"""Pages of guest memory at one instant, kept in this process until they are written.

A guest that is stopped for a copy to memory stands still for a third of a second a GiB; writing to a
disk takes longer. The pages are at their offsets in private anonymous memory as long as the block,
which costs only where pages are copied::

    with Stash([StashBlock("pc.ram", memory, 4096, pages=mapped_pages)]) as stash:
        stash.prepare(channels=2)              # while the guest runs: make the memory resident
        stash.start_copy(channels=2).wait()    # while it is stopped
        ...                           # stash.memory_of("pc.ram", identity), stash.pages["pc.ram"]
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyqmigrate._core as _core
from pyqmigrate.core import Channel, MemorySource
from pyqmigrate.errors import GuestMemoryError, NotSupported, UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, check_channels
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.job import Job
from pyqmigrate.io.layered import buffer_memory, layered
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.memory import Memory, OpenMemory, ProcessMemory, RamBlock, SnapshotMemory, attach
from pyqmigrate.io.pagemap import MappedPages

__all__ = ["Stash", "StashBlock"]

_MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class StashBlock:
    """A block whose pages are copied.

    With ``changed``, the block is a private mapping of a file in another process, and its changed
    pages are copied. Otherwise the pages are those of ``pages``, which is borrowed and may change until
    the copy; without both they are all pages. ``page_size`` is in bytes.
    """

    name: str
    memory: Memory
    page_size: int = 4096
    changed: MappedPages | None = None
    pages: Bitmap | None = None


class Stash:
    """Memory for the pages of blocks. Close it.

    ``pages`` are bitmaps of what the copy copied, by block. Raises UsageError for unsuitable
    blocks, GuestMemoryError if memory cannot be read, NotSupported if there is no address space.
    """

    def __init__(self, blocks: Sequence[StashBlock]) -> None:
        self.pages: dict[str, Bitmap] = {}
        self._blocks: dict[str, _Block] = {}
        try:
            for block in blocks:
                self._blocks[block.name] = _Block(block)
                self.pages[block.name] = self._blocks[block.name].pages
        except BaseException:
            self.close()
            raise

    def prepare(self, *, channels: int = 2, room: int | None = None) -> int:
        """Find the changed pages, and make the memory of all pages resident; return their bytes.

        Call it once, while the guest runs, so that the copy has few page faults. Raises NotSupported
        for more than ``room`` bytes, before memory is used; GuestMemoryError; MemoryError if there is
        not enough memory.
        """
        crew = Channels(check_channels(channels), "pyqmigrate-stash")
        with contextlib.ExitStack() as stack:
            found: list[tuple[_Block, Bitmap]] = []
            for block in self._blocks.values():
                seen = block.find(crew)
                if seen is not block.pages:
                    stack.callback(seen.close)
                found.append((block, seen))
            expected = sum(seen.count() * block.page_size for block, seen in found)
            if room is not None and expected > room:
                raise NotSupported(
                    f"{expected >> 20} MiB have changed, and {room >> 20} MiB of the host's memory may "
                    "be used for copies of them"
                )
            for block, seen in found:
                try:
                    block.core.bits = seen.core
                    self._run(_core.lib.qm_stash_populate, crew, [block])
                finally:
                    block.core.bits = block.pages.core
        return expected

    def start_copy(self, *, channels: int = 2) -> Job[int]:
        """Begin to copy the pages; the result is their bytes. The guest is stopped. Call it once.

        The result raises GuestMemoryError and Cancelled.
        """
        crew = Channels(check_channels(channels), "pyqmigrate-stash")
        blocks = list(self._blocks.values())

        def copy() -> int:
            self._run(_core.lib.qm_stash_copy, crew, blocks)
            return crew.totals().bytes_done

        return Job(crew, sum(block.length for block in blocks), copy)

    def _run(self, step: Any, crew: Channels, blocks: Sequence[_Block]) -> None:
        for block in blocks:
            block.core.next = 0

        def ranges() -> Iterator[Range]:
            for number, block in enumerate(blocks):
                for _ in range(crew.count):  # each channel takes parts until none is left
                    yield Range(number, 0, block.pages.npages)

        def work(channel: Channel, item: Range) -> int:
            channel.fault.core.in_memory, channel.fault.core.at = 1, 0
            core = blocks[item.block].core
            if step is _core.lib.qm_stash_copy:
                return int(step(crew.core.core, core, channel.fault.core))
            return int(step(crew.core.core, core))

        crew.run(ranges(), work, "guest memory", [block.name for block in blocks])

    def buffer(self, name: str) -> mmap.mmap:
        """Return the memory of a block: zeros outside of its pages. It belongs to the stash."""
        return self._blocks[name].memory

    def memory_of(self, name: str, identity: FileId) -> SnapshotMemory:
        """Return a block as memory to save. Pages that were not copied are zeros, and are passed over
        without a look at them."""
        block = self._blocks[name]
        source = MemorySource.mapped_ram(block.none, block.none.npages, 0, block.page_size, -1)
        zeros = SnapshotMemory(block.length, 0, identity, source)
        return layered(buffer_memory(block.memory, identity), zeros, block.pages, block.page_size)

    def over(self, name: str, lower: SnapshotMemory) -> SnapshotMemory:
        """Return a block as memory to save, with pages of ``lower`` where none were copied."""
        block = self._blocks[name]
        upper = buffer_memory(block.memory, lower.identity)
        return layered(upper, lower, block.pages, block.page_size)

    def close(self) -> None:
        """Release the memory. Idempotent; not before its last use as memory to save."""
        for block in self._blocks.values():
            block.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Block:
    def __init__(self, block: StashBlock) -> None:
        if block.changed is not None and not isinstance(block.memory, ProcessMemory):
            raise UsageError(f"block {block.name!r} is not the memory of another process")
        self.name, self.page_size, self.changed = block.name, block.page_size, block.changed
        self._open: OpenMemory = attach(
            RamBlock(block.name, block.memory, block.page_size), writable=False
        )
        self.length = self._open.length
        npages = self.length // block.page_size
        self._owned: list[Bitmap] = []
        self.none = self._bitmap(npages)
        if block.pages is not None:
            self.pages = block.pages
        else:
            self.pages = self._bitmap(npages)
            if block.changed is None:
                self.pages.fill(memoryview(b"\xff" * ((npages + 7) // 8)))
        if self.pages.npages != npages:
            raise UsageError(f"a bitmap of {self.pages.npages} pages for block {block.name!r}")
        self.memory = _map(self.length)
        self._buffer = _core.ffi.from_buffer("unsigned char[]", self.memory)
        self.core = _core.ffi.new("struct qm_stash *")
        self.core.memory, self.core.base = self._open.core, self._buffer
        if isinstance(block.memory, ProcessMemory):
            self.core.process = _core.ffi.cast("struct qm_process *", self._open.core.fill_arg)
        self.core.bits, self.core.npages = self.pages.core, npages
        self.core.page_size = block.page_size
        if block.changed is not None:
            self.core.changed = block.changed.core

    def _bitmap(self, npages: int) -> Bitmap:
        bitmap = Bitmap(npages)
        self._owned.append(bitmap)
        return bitmap

    def find(self, crew: Channels) -> Bitmap:
        """Return the pages as they are now: a new bitmap, or the given one."""
        if self.changed is None:
            return self.pages
        seen = Bitmap(self.pages.npages)
        rc = self.changed.find_changed(crew.core, seen, 0, seen.npages)
        if rc:
            seen.close()
            raise GuestMemoryError(-rc, "cannot find the changed pages", block=self.name)
        return seen

    def close(self) -> None:
        _core.ffi.release(self._buffer)
        unmap(self.memory)
        self._open.close()
        for bitmap in self._owned:
            bitmap.close()


def _map(length: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, length, flags=flags)
    except (OSError, OverflowError) as error:
        raise NotSupported(f"there is no address space for {length} bytes ({error})") from error
    if hasattr(memory, "madvise"):
        # A huge page would cost 2 MiB where one page changed.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
