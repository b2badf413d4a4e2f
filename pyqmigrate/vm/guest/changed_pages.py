"""The changed and the touched pages of a guest that maps a snapshot privately.

A guest restored with mode ``instant`` maps the pages of its snapshot as they are in the file. The
first write to one makes a copy that belongs to the guest alone; the kernel shows which pages of
a mapping are such copies (``PAGEMAP_SCAN``, Linux 6.7; before that, one word a page in
``/proc/PID/pagemap``)::

    with RestoredRam(pid, blocks) as ram:
        ram.check(base)                          # the blocks really are the pages of this file
        changed = ram.find_changed(channels=2)   # {"pc.ram": ChangedPages(...)}

A page counts as changed when it is in memory or in swap and is not the file's: also when the guest
wrote what was there before, and when KSM has merged it. Pages that only were read do not count. A
page that was given back (``MADV_DONTNEED``) has the file's content again, and does not count.

The answer is that of one instant only while the guest is stopped.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyqmigrate.core import Channel
from pyqmigrate.errors import GuestMemoryError, UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, check_channels
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.maps_file import map_lines
from pyqmigrate.io.pagemap import Find, MappedPages, address_of, can_scan, list_runs

__all__ = ["ChangedPages", "RestoredRam", "RestoredBlock", "Mapping", "list_mappings"]

_SCANNED_AT_ONCE = 1 << 30  # bytes of a block that one call looks at
_MAPS_MAX = 64 << 20  # bytes of /proc/PID/maps
_MAPS_PIECE = 1 << 16
_END = 1 << 64


@dataclass(frozen=True)
class RestoredBlock:
    """A RAM block of a process: ``length`` bytes from ``address`` on, whose byte 0 should be at
    ``file_offset`` of the snapshot. ``page_size`` is that of the snapshot's bitmap."""

    name: str
    address: int
    length: int
    file_offset: int
    page_size: int = 4096


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps. ``start`` and ``end`` are addresses, ``offset`` that of the file in
    bytes; ``device`` and ``inode`` are as the kernel prints them there, ``path`` is empty or a
    name in brackets for memory without a file."""

    start: int
    end: int
    private: bool
    offset: int
    device: str
    inode: str
    path: str

    @property
    def anonymous(self) -> bool:
        return self.inode == "0"


@dataclass
class ChangedPages:
    """The pages of one block that have a bit set in ``bitmap``, ``count`` of them."""

    bitmap: Bitmap
    page_size: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.page_size

    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """``(first page, pages)`` for each stretch of them, in order."""
        return list_runs(self.bitmap, first, end)

    def close(self) -> None:
        """Release the bitmap. Idempotent."""
        self.bitmap.close()


class RestoredRam:
    """The RAM blocks that a process has mapped, held ready for questions about their pages.

    Needs the right to trace the process, as reading its memory does, but reads none of it.
    ``uses_scan`` says whether the kernel answers by ranges; ``scan=False`` forces the words. A process
    that ends is noticed, also when its number is given to another. Raises GuestMemoryError when it is
    gone or may not be looked at, UsageError for blocks that cannot exist.
    """

    def __init__(
        self, pid: int, blocks: Sequence[RestoredBlock], *, scan: bool | None = None
    ) -> None:
        self.pid = pid
        self.blocks = tuple(blocks)
        self._fds = contextlib.ExitStack()
        self._pages: list[MappedPages] = []
        try:
            for block in self.blocks:
                _check_block(block)
            # Files opened relative to the directory belong to this process and its present memory,
            # even if the pid is reused later.
            directory = self._open(f"/proc/{pid}", os.O_DIRECTORY)
            self._maps = self._open("maps", dir_fd=directory)
            pagemap = self._open("pagemap", dir_fd=directory)
            self._check_alive()
            has_scan = can_scan(pagemap) if scan is None else scan
            self.uses_scan = has_scan
            for block in self.blocks:
                self._pages.append(
                    MappedPages(
                        pagemap, block.address, block.length, block.page_size, has_scan=has_scan
                    )
                )
        except BaseException:
            self.close()
            raise

    def check(self, base: int) -> None:
        """Raise UsageError unless every block is a private mapping of its pages in the file ``base``.

        ``base`` is a descriptor that is open for reading. A block may be mapped in several pieces;
        each of them must be private, of this very file, and at the place that belongs to it.
        """
        device, inode = _as_mapped(base)
        mappings = self.mappings()
        for block in self.blocks:
            address, end = block.address, block.address + block.length
            for piece in mappings:
                if piece.end <= address or piece.start >= end:
                    continue
                if piece.start > address:
                    break
                fault = _mapping_fault(piece, block, device, inode)
                if fault is not None:
                    raise UsageError(
                        f"RAM block {block.name!r} of process {self.pid} does not map the base "
                        f"privately: {fault} at address {max(piece.start, block.address):#x}"
                    )
                address = piece.end
                if address >= end:
                    break
            if address < end:
                raise UsageError(
                    f"RAM block {block.name!r} of process {self.pid} does not map the base "
                    f"privately: nothing is mapped at address {address:#x}"
                )

    def mappings(self) -> list[Mapping]:
        """The mappings of the process, by address. Raises GuestMemoryError."""
        text, offset = bytearray(), 0
        try:
            while piece := os.pread(self._maps, _MAPS_PIECE, offset):
                text += piece
                offset += len(piece)
                if offset > _MAPS_MAX:
                    raise OSError(errno.EFBIG, "too many mappings")
        except OSError as error:
            raise self._refused(error, "list the mappings of") from error
        if not text:
            raise self._gone()
        return list_mappings(text.decode("utf-8", "surrogateescape"))

    def mapped_file(self, block: RestoredBlock) -> Mapping | None:
        """The private mapping of a file that the first byte of ``block`` is in: where to look for the
        snapshot that the guest was restored from. None for other memory."""
        for piece in self.mappings():
            if piece.start <= block.address < piece.end:
                return piece if piece.private and not piece.anonymous else None
        return None

    def pages_of(self, name: str) -> MappedPages:
        """Return the pages of a block, for :class:`pyqmigrate.io.stash.Stash`."""
        for block, pages in zip(self.blocks, self._pages, strict=True):
            if block.name == name:
                return pages
        raise UsageError(f"unknown block {name!r}")

    def find_changed(self, *, channels: int = 1) -> dict[str, ChangedPages]:
        """The pages of each block, by its name, that the process has changed.

        Blocks until the kernel has looked at all of them: about 7 ms a GiB of pages that are in
        memory, less where there are none, on each channel. Raises GuestMemoryError.
        """
        return self._find(MappedPages.find_changed, channels)

    def find_present(self, *, channels: int = 1) -> dict[str, ChangedPages]:
        """The pages of each block, by its name, that are in the page table of the process: those it
        touched, and neighbours that the kernel mapped with them. As :meth:`find_changed`."""
        return self._find(MappedPages.find_present, channels)

    def look_for_present(self, bitmaps: Sequence[Bitmap]) -> None:
        """Set in ``bitmaps``, one for each block, the bits of pages as :meth:`find_present` does."""
        self._run(MappedPages.find_present, bitmaps, Channels(1, "pyqmigrate-pagemap"))

    def _find(self, find: Find, channels: int) -> dict[str, ChangedPages]:
        crew = Channels(check_channels(channels), "pyqmigrate-pagemap")
        bitmaps: list[Bitmap] = []
        try:
            for block in self.blocks:
                bitmaps.append(Bitmap(block.length // block.page_size))
            self._run(find, bitmaps, crew)
        except BaseException:
            for bitmap in bitmaps:
                bitmap.close()
            raise
        return {
            block.name: ChangedPages(bitmap, block.page_size, bitmap.count())
            for block, bitmap in zip(self.blocks, bitmaps, strict=True)
        }

    def _run(self, find: Find, bitmaps: Sequence[Bitmap], crew: Channels) -> None:
        def look(item: Range) -> None:
            pages, bits = self._pages[item.block], bitmaps[item.block]
            rc = find(pages, crew.core, bits, item.first, item.npages)
            if rc:
                block = self.blocks[item.block].name
                raise GuestMemoryError(-rc, "cannot find out the state of the pages", block=block)

        def move(_: Channel, item: Range) -> int:
            look(item)
            return 0

        if crew.count == 1:
            for item in self._ranges():
                look(item)
        else:
            crew.run(self._ranges(), move, "pagemap", [block.name for block in self.blocks])
        # A process that ends loses its pages before it is gone: nothing found means nothing unless
        # its memory is still there afterwards.
        self._check_alive()

    def _ranges(self) -> Iterator[Range]:
        for number, block in enumerate(self.blocks):
            npages, step = block.length // block.page_size, _SCANNED_AT_ONCE // block.page_size
            for first in range(0, npages, step):
                yield Range(number, first, min(step, npages - first))

    def _check_alive(self) -> None:
        """Raise GuestMemoryError where the memory is gone. Touches none of it: a page that is read
        comes into the page table."""
        try:
            alive = os.pread(self._maps, 1, 0)
        except OSError as error:
            raise self._refused(error, "look at the pages of") from error
        if not alive:
            raise self._gone()

    def _open(self, name: str, flags: int = 0, dir_fd: int | None = None) -> int:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=dir_fd)
        except OSError as error:
            raise self._refused(error, "look at the pages of") from error
        self._fds.callback(os.close, fd)
        return fd

    def _gone(self) -> GuestMemoryError:
        return GuestMemoryError(errno.ESRCH, f"cannot look at the pages of process {self.pid}")

    def _refused(self, error: OSError, what: str) -> GuestMemoryError:
        number = error.errno or errno.EIO
        number = errno.ESRCH if number == errno.ENOENT else number
        return GuestMemoryError(number, f"cannot {what} process {self.pid}")

    def close(self) -> None:
        """Close what was opened. Idempotent."""
        self._fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def list_mappings(text: str) -> list[Mapping]:
    """The mappings that the text of /proc/PID/maps lists; lines of another form are left out."""
    found = []
    for line in map_lines(text):
        fields = line.split(maxsplit=5)
        if len(fields) < 5:
            continue
        bounds, rights, offset, device, inode, *path = fields
        try:
            start, end = (int(number, 16) for number in bounds.split("-"))
            at = int(offset, 16)
        except ValueError:
            continue
        name = path[0] if path else ""
        found.append(Mapping(start, end, rights[3:4] == "p", at, device, inode, name))
    return found


def _check_block(block: RestoredBlock) -> None:
    page, size = mmap.PAGESIZE, block.page_size
    if not 1024 <= size <= 65536 or size & (size - 1):
        raise UsageError(f"pages of block {block.name!r} cannot have {size} bytes")
    if block.address < 0 or block.length <= 0 or block.address + block.length > _END:
        raise UsageError(
            f"block {block.name!r} cannot have {block.length} bytes at {block.address:#x}"
        )
    if block.length % size:
        raise UsageError(f"block {block.name!r} is not whole pages of {size} bytes")
    if block.address % page or block.file_offset % page:
        raise UsageError(
            f"block {block.name!r} starts at address {block.address:#x} and file offset "
            f"{block.file_offset:#x}, where nothing can be mapped"
        )


def _mapping_fault(piece: Mapping, block: RestoredBlock, device: str, inode: str) -> str | None:
    """What keeps a piece from being a private mapping of its part of the base."""
    if piece.anonymous:
        return "there is anonymous memory"
    if not piece.private:
        return f"{piece.path!r} is mapped shared"
    if (piece.device, piece.inode) != (device, inode):
        return f"another file, {piece.path!r}, is mapped"
    offset = block.file_offset + piece.start - block.address
    if piece.offset != offset:
        return f"file offset {piece.offset:#x} is mapped in place of {offset:#x}"
    return None


def _as_mapped(fd: int) -> tuple[str, str]:
    """The device and inode that the kernel lists for a mapping of the file.

    They need not be those of stat(): on btrfs and overlayfs the device differs. So a page of the
    file is mapped here, and looked up in our own list.
    """
    try:
        memory = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise UsageError(f"the base cannot be mapped: {error}") from error
    try:
        address = address_of(memory)
        text = Path("/proc/self/maps").read_bytes().decode("utf-8", "surrogateescape")
    finally:
        unmap(memory)
    for piece in list_mappings(text):
        if piece.start <= address < piece.end:
            return piece.device, piece.inode
    raise UsageError("the base cannot be identified: its mapping is not listed in /proc/self/maps")
