"""The memory of a RAM block: a buffer, a file or memfd, or another process.

A *buffer* is an object that exports a C-contiguous buffer (``mmap``, ``bytearray``, a numpy array,
shared memory; writable for a load). A *file* is a :class:`FileMemory`; its holes are found with
SEEK_DATA, are not scanned and stay holes. Memory of another *process*, for saves only, is a
:class:`~pyqmigrate.io.process_memory.ProcessMemory`.

:func:`attach` makes an :class:`OpenMemory` of any of them, for the core.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import pyqmigrate._core as _core
from pyqmigrate.argument_types import check
from pyqmigrate.core import MemorySource
from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.io.in_use import Area, FileId, files_in_areas, files_in_use
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.process_memory import ProcessMemory, ProcessSource

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "OpenMemory",
    "FileMemory",
    "Memory",
    "ProcessMemory",
    "RamBlock",
    "SnapshotMemory",
    "attach",
    "check_blocks",
    "files_of",
]

# On a file system with larger blocks (hugetlbfs), reading a hole through a mapping allocates a huge
# page, and SEEK_DATA reports holes as data.
_LARGEST_MAPPED_PIECE = 65536


@dataclass(frozen=True)
class FileMemory:
    """Guest memory that is a file or a memfd.

    ``fd`` is borrowed and may be closed once the job has started. ``offset`` and ``length`` are in
    bytes; with None the memory ends at the end of the file. For a load ``fd`` must be writable.
    """

    fd: int
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True)
class SnapshotMemory:
    """A block of a snapshot as guest memory, for saves. Valid until the snapshot is closed.

    ``length`` and ``extent_bytes``, an upper bound of the data, are in bytes; ``identity`` is that
    of the snapshot's file, ``others`` those of other files with parts of it.
    """

    length: int
    extent_bytes: int
    identity: FileId
    source: MemorySource
    others: tuple[FileId, ...] = ()

    def part(self, offset: int, length: int) -> SnapshotMemory:
        """Return the bytes ``[offset, offset + length)``, whole pages, as memory."""
        if offset < 0 or length < 0 or offset + length > self.length:
            raise UsageError(f"bytes {offset} to {offset + length} are outside of {self.length}")
        if length == self.length:
            return self
        return SnapshotMemory(
            length,
            min(length, self.extent_bytes),
            self.identity,
            self.source.slice(offset),
            self.others,
        )


Memory: TypeAlias = Union["Buffer", FileMemory, ProcessMemory, SnapshotMemory]


@dataclass(frozen=True)
class RamBlock:
    """A named block of guest memory. Its length is a multiple of ``page_size``.

    ``page_size`` is the guest's target page size in bytes (4096 on x86; a power of two from 1 KiB
    to 64 KiB). ``address`` is the guest address of the block. It is written only if the content of
    shared blocks is left out (``x-ignore-shared``), and then the loading QEMU must have the same.
    """

    name: str
    memory: Memory
    page_size: int = 4096
    address: int = 0


class OpenMemory:
    """Memory that the core can use: ``core`` is its ``struct qm_memory *``.

    ``length`` is in bytes; ``extent_bytes`` is an upper bound of the data. Close it.
    """

    def __init__(self, name: str, memory: Memory, *, writable: bool) -> None:
        self.name = name
        self._mapping: mmap.mmap | None = None
        self._buffer: Any = None
        self._process: ProcessSource | None = None
        self._stored: SnapshotMemory | None = None
        self._fd = -1
        self.core = _core.ffi.new("struct qm_memory *")
        self.core.fd = -1
        try:
            if isinstance(memory, FileMemory):
                self._attach_file(memory, writable)
            elif isinstance(memory, ProcessMemory):
                self._attach_process(memory, writable)
            elif isinstance(memory, SnapshotMemory):
                self._attach_stored(memory, writable)
            else:
                self._attach_buffer(memory, writable)
        except BaseException:
            self.close()
            raise

    def _attach_buffer(self, memory: Buffer, writable: bool) -> None:
        try:
            self._buffer = _core.ffi.from_buffer("unsigned char[]", memory, writable)
        except (TypeError, ValueError, BufferError) as error:
            kind = "writable, C-contiguous" if writable else "C-contiguous"
            raise UsageError(
                f"memory of block {self.name!r} must be a {kind} buffer or a FileMemory: {error}"
            ) from None
        self.length = self.extent_bytes = len(self._buffer)
        self.core.base = self._buffer

    def _attach_file(self, memory: FileMemory, writable: bool) -> None:
        try:
            info = os.fstat(memory.fd)
            if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
                raise OSError(errno.EINVAL, "it is neither a file nor a memfd")
            self._open_own(memory.fd, writable)
            size = os.lseek(self._fd, 0, os.SEEK_END)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"descriptor {memory.fd} of block {self.name!r} cannot be used as memory: {error}"
            ) from error
        length = size - memory.offset if memory.length is None else memory.length
        if memory.offset < 0 or length < 0 or memory.offset + length > size:
            raise UsageError(
                f"memory of block {self.name!r} reaches from byte {memory.offset} to "
                f"{memory.offset + length} of a file of {size} bytes; give it its full size first"
            )
        self.length = length
        self.extent_bytes = min(length, info.st_blocks * 512)
        self.core.fd = self._fd
        self.core.fd_offset = memory.offset
        seals = self._seals()
        if length and seals is not None and (writable or self._may_be_mapped(seals, memory.offset)):
            self._map(memory.offset, length, writable)

    def _attach_process(self, memory: ProcessMemory, writable: bool) -> None:
        if writable:
            raise UsageError(
                f"memory of block {self.name!r} is that of another process, which can only be saved"
            )
        self._process = ProcessSource(memory, self.name)
        self.length = self.extent_bytes = memory.length
        self.core.fill = _core.ffi.addressof(_core.lib, "qm_process_fill")
        self.core.fill_arg = self._process.core
        if self._process.skips:
            self.core.next = _core.ffi.addressof(_core.lib, "qm_process_next")

    def _attach_stored(self, memory: SnapshotMemory, writable: bool) -> None:
        if writable:
            raise UsageError(f"memory of block {self.name!r} is a snapshot's, and can only be read")
        self._stored = memory  # the core only has pointers into it
        self.length, self.extent_bytes = memory.length, memory.extent_bytes
        self.core.fill, self.core.next = memory.source.fill, memory.source.next
        self.core.fill_arg = memory.source.argument

    def _open_own(self, fd: int, writable: bool) -> None:
        # SEEK_DATA moves the position of the description, and this one belongs to the caller.
        flags = os.O_RDWR if writable else os.O_RDONLY
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in (os.O_RDWR, flags):
            raise OSError(errno.EBADF, f"it is not open for {'writing' if writable else 'reading'}")
        try:
            self._fd = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        except OSError:
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)

    def _seals(self) -> int | None:
        """Return the seals of a file in memory (memfd, tmpfs, hugetlbfs); None for other files.

        Writing to a file on disk through a mapping would fill its holes, and fault on a full disk.
        """
        try:
            return fcntl.fcntl(self._fd, fcntl.F_GET_SEALS)
        except OSError:
            return None

    def _may_be_mapped(self, seals: int, offset: int) -> bool:
        """Return whether reading through a mapping never fails and never fills holes."""
        if not seals & fcntl.F_SEAL_SHRINK:
            return False
        if os.fstatvfs(self._fd).f_bsize > _LARGEST_MAPPED_PIECE:
            return False
        try:
            os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
        return True

    def _map(self, offset: int, length: int, writable: bool) -> None:
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._mapping = mmap.mmap(
                self._fd, offset - start + length, mmap.MAP_SHARED, protection, offset=start
            )
        except (OSError, ValueError, OverflowError):
            return  # the descriptor is enough, at the cost of a copy
        self._buffer = _core.ffi.from_buffer("unsigned char[]", self._mapping, writable)
        self.core.base = self._buffer + (offset - start)

    def refuse_as_source(self, fd: int) -> None:
        """Raise UsageError if a load from the file ``fd`` would overwrite this same file."""
        if self._fd >= 0 and FileId.of(os.fstat(fd)) == FileId.of(os.fstat(self._fd)):
            raise UsageError(
                f"the memory of block {self.name!r} is the file that is to be loaded, which would "
                "be overwritten: load into another file"
            )

    def unaligned(self, mem_align: int) -> bool:
        """Return whether direct I/O with this alignment has to go through bounce buffers."""
        base = int(_core.ffi.cast("uintptr_t", self.core.base))
        return base % mem_align != 0

    def close(self) -> None:
        """Release the buffer, the mapping, the process and the descriptor. Idempotent."""
        self.core.base = _core.ffi.NULL
        if self._buffer is not None:
            _core.ffi.release(self._buffer)
            self._buffer = None
        if self._mapping is not None:
            unmap(self._mapping)
            self._mapping = None
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = self.core.fd = -1


def files_of(memories: Iterable[OpenMemory]) -> dict[FileId, str]:
    """Return the known files of these memories, which must not be overwritten."""
    found: dict[FileId, str] = {}
    mapped: dict[int, list[Area]] = {}
    for memory in memories:
        what = f"the memory of block {memory.name!r}"
        if memory._stored is not None:
            stored = memory._stored
            found |= dict.fromkeys((stored.identity, *stored.others), "the snapshot that is read")
        elif memory._fd >= 0:
            found |= files_in_use([(memory._fd, what)])
        elif memory._process is None:
            address = int(_core.ffi.cast("uintptr_t", memory.core.base))
            mapped.setdefault(os.getpid(), []).append(Area(address, memory.length, what))
        elif not memory._process.skips:  # anonymous memory is not in a file
            process = memory._process.core
            area = Area(process.address, memory.length, what)
            mapped.setdefault(process.pid, []).append(area)
    for pid, areas in mapped.items():
        found |= files_in_areas(pid, areas)
    return found


def check_blocks(blocks: object) -> None:
    """Raise UsageError unless they are RamBlocks with fields of the documented types."""
    if isinstance(blocks, str | bytes | Mapping) or not isinstance(blocks, Sequence):
        raise UsageError(f"blocks must be a list of RamBlock, not {blocks!r}")
    for block in blocks:
        check("a block", block, RamBlock)
        check("the name of a block", block.name, str)
        check(f"page_size of block {block.name!r}", block.page_size, int)
        check(f"address of block {block.name!r}", block.address, int)
        if block.address < 0:
            raise UsageError(f"address of block {block.name!r} is {block.address}")


def attach(block: RamBlock, *, writable: bool) -> OpenMemory:
    """Return the open memory of a block. UsageError if it cannot be used, or is not whole pages."""
    memory = OpenMemory(block.name, block.memory, writable=writable)
    try:
        BlockSpec(block.name, memory.length, block.page_size, block.address)
    except BaseException:
        memory.close()
        raise
    return memory
