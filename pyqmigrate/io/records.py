"""The page records of a sequential stream: encode, decode, and the staging of decoded pages.

``csrc/qmigrate.h`` documents the calls and the form of the records. An object belongs to one thread
at a time, and keeps the fault of its last call.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyqmigrate._core as _core
from pyqmigrate.core import Channel, Fault, JobState, Transfer
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.block_index import BlockIndex
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.memory import OpenMemory

__all__ = [
    "CHANGES_MAX",
    "STAGING_MAX",
    "BlockName",
    "Decoded",
    "Decoder",
    "Encoder",
    "RecordError",
    "RecordFault",
    "StagingBuffer",
]

CHANGES_MAX: int = _core.lib.QM_CHANGES_MAX  # to one page, in an index
STAGING_MAX: int = _core.lib.QM_STAGING_MAX  # bytes of a block in one staging buffer


class BlockName:
    """A block's name as the core's ``struct qm_name``."""

    def __init__(self, name: str) -> None:
        data = name.encode("utf-8", "surrogateescape")
        self._text = _core.ffi.new("unsigned char[]", data)
        self.core = _core.ffi.new("struct qm_name *")
        self.core.bytes, self.core.len = self._text, len(data)


class Encoder:
    """A stream that is written front to back through a buffer.

    ``fd`` is borrowed, and written from position ``position`` on; with -1 bytes are only counted.
    ``forward``: it is a pipe or a socket. Methods that return an int return 0, or a negative errno
    with the place in ``fault``.
    """

    def __init__(self, fd: int, position: int, *, forward: bool = False) -> None:
        core = _core.lib.qm_encoder_create(fd, position)
        if core == _core.ffi.NULL:
            raise MemoryError
        self._core = _core.ffi.gc(core, _core.lib.qm_encoder_destroy)
        self.fault = Fault()
        if forward:
            _core.lib.qm_encoder_go_forward(self._core)

    @property
    def position(self) -> int:
        """Position of the next byte, behind everything appended, written out or not."""
        return int(_core.lib.qm_encoder_position(self._core))

    def forget_block(self) -> None:
        """Make the next record name its block in any case."""
        _core.lib.qm_encoder_forget_block(self._core)

    def put(self, job: JobState, data: bytes) -> int:
        """Append bytes verbatim."""
        return int(_core.lib.qm_encoder_put(job.core, self._core, data, len(data), self.fault.core))

    def flush(self, job: JobState) -> int:
        """Write out what is buffered."""
        return int(_core.lib.qm_encoder_flush(job.core, self._core, self.fault.core))

    def put_pages(
        self, transfer: Transfer, channel: Channel, name: BlockName, first: int, npages: int
    ) -> int:
        """Append a record for each selected page; the fault is the channel's."""
        return int(
            _core.lib.qm_encode_pages(
                transfer.core,
                channel.core,
                self._core,
                name.core,
                first,
                npages,
                channel.fault.core,
            )
        )


class RecordFault(enum.IntEnum):
    """What is wrong with a record: ``enum qm_record_fault``."""

    FLAGS = _core.lib.QM_RECORD_FLAGS
    COMPRESSED = _core.lib.QM_RECORD_COMPRESSED
    NO_BLOCK = _core.lib.QM_RECORD_NO_BLOCK
    UNKNOWN = _core.lib.QM_RECORD_UNKNOWN
    OUTSIDE = _core.lib.QM_RECORD_OUTSIDE
    DELTA = _core.lib.QM_RECORD_DELTA
    MULTIFD = _core.lib.QM_RECORD_MULTIFD
    SCATTERED = _core.lib.QM_RECORD_SCATTERED
    CHANGES = _core.lib.QM_RECORD_CHANGES


@dataclass(frozen=True)
class RecordError:
    """The record at which a decoder failed: its word and the word's position. ``block`` is the
    number of its block or None, ``name`` that of an unlisted block."""

    fault: RecordFault
    word: int
    position: int
    block: int | None
    name: bytes


class Decoded(enum.IntEnum):
    """Why a decoder stopped, if it did not fail."""

    ALL = 0  # the section continues behind the bytes given
    END = 1  # the section ended
    UNSTAGED = 2  # the next page belongs to a part of a block that is not staged


class Decoder:
    """A decoder of the records of ``blocks``, (name, length) pairs, to one sink a block.

    Choose the sinks, then :meth:`start`. A block without a sink has its records checked and
    dropped. ``position`` is that of the next byte of the stream. MemoryError.
    """

    def __init__(self, blocks: Sequence[tuple[str, int]], page_size: int) -> None:
        self.page_size = page_size
        self.position = 0
        self.fault = Fault()
        names = [name.encode("utf-8", "surrogateescape") for name, _ in blocks]
        self._names = _core.ffi.new("unsigned char[]", b"".join(names))
        self._blocks = _core.ffi.new("struct qm_record_block[]", len(blocks))
        self._kept: list[object] = []
        self._core: Any = None
        name_offset = 0
        for block, name, (_, length) in zip(self._blocks, names, blocks, strict=True):
            block.name.bytes, block.name.len = self._names + name_offset, len(name)
            block.len = length
            name_offset += len(name)

    def write_to_memory(self, block: int, memory: OpenMemory, seen: Bitmap) -> None:
        """Write the pages of block number ``block`` to memory, and mark them in ``seen``."""
        self._sink(block, _core.lib.QM_SINK_MEMORY, seen).memory = memory.core
        self._kept.append(memory)

    def write_to_index(self, block: int, index: BlockIndex) -> None:
        """Record in ``index`` where the pages are."""
        self._sink(block, _core.lib.QM_SINK_INDEX, None).index = index.core
        self._kept.append(index)

    def write_to_staging(self, block: int, seen: Bitmap) -> None:
        """Put the pages into the staging buffer given to :meth:`stage`."""
        self._sink(block, _core.lib.QM_SINK_STAGING, seen)

    def mark_content(self, block: int, content: Bitmap, seen: Bitmap) -> None:
        """Set the bits of pages that are not zero in ``content``."""
        self._sink(block, _core.lib.QM_SINK_CONTENT, seen).content = content.core
        self._kept.append(content)

    def _sink(self, number: int, kind: int, seen: Bitmap | None) -> Any:
        block = self._blocks[number]
        block.sink = kind
        if seen is not None:
            block.seen = seen.core
            self._kept.append(seen)
        return block

    def start(self, *, fresh: bool = True) -> None:
        """Make the decoder ready. ``fresh``: a change to a page that no record mentioned before
        applies to zeros, whatever the memory contains."""
        core = _core.lib.qm_decoder_create(self._blocks, len(self._blocks), self.page_size, fresh)
        if core == _core.ffi.NULL:
            raise MemoryError
        self._core = _core.ffi.gc(core, _core.lib.qm_decoder_destroy)

    def decode_file(self, job: JobState, fd: int, end: int) -> int:
        """Decode the file from ``position`` to the end of the section, at most to ``end``. Returns
        a :class:`Decoded` (END or UNSTAGED), or a negative errno."""
        position = _core.ffi.new("int64_t *", self.position)
        rc = int(_core.lib.qm_decode_file(job.core, self._core, fd, position, end, self.fault.core))
        self.position = int(position[0])
        return rc

    def decode(self, job: JobState, data: bytes | memoryview) -> int:
        """Decode bytes of the stream that start at ``position``. Returns a :class:`Decoded`, or a
        negative errno."""
        used = _core.ffi.new("size_t *")
        _core.lib.qm_decoder_seek(self._core, self.position)
        rc = int(
            _core.lib.qm_decode(
                job.core, self._core, _core.ffi.from_buffer(data), len(data), used, self.fault.core
            )
        )
        self.position += int(used[0])
        return rc

    def unstaged(self) -> tuple[int, int]:
        """After UNSTAGED: the number of the next page's block, and its offset."""
        offset = _core.ffi.new("uint64_t *")
        return int(_core.lib.qm_decoder_wants(self._core, offset)), int(offset[0])

    def stage(self, block: int, buffer: StagingBuffer) -> None:
        """Use ``buffer``, which was placed, for the pages of its part of block ``block``."""
        _core.lib.qm_decoder_set_staging(self._core, block, buffer.core)

    def error(self) -> RecordError:
        """Return what is wrong, after a return of ``-EBADMSG``."""
        error = _core.ffi.new("struct qm_record_error *")
        _core.lib.qm_decoder_error(self._core, error)
        return RecordError(
            RecordFault(error.what),
            int(error.word),
            int(error.at),
            int(error.block) if error.block >= 0 else None,
            bytes(error.name[0 : error.name_len]),
        )


class StagingBuffer:
    """Memory for a part of a block, whose pages are assembled there before they are written.

    ``stack`` frees it.
    """

    def __init__(self, stack: contextlib.ExitStack, page_size: int) -> None:
        memory = mmap.mmap(-1, STAGING_MAX, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        stack.callback(unmap, memory)
        memory.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        base = _core.ffi.from_buffer("unsigned char[]", memory, True)
        stack.callback(_core.ffi.release, base)
        words = -(-STAGING_MAX // page_size // 64)
        self._page_size = page_size
        self._kept = _core.ffi.new("uint64_t[]", words), _core.ffi.new("uint64_t[]", words)
        self.core = _core.ffi.new("struct qm_staging *")
        self.core.base = base
        self.core.filled, self.core.zeroed = self._kept

    def place(self, offset: int, length: int, fd: int, position: int, data: Bitmap) -> None:
        """Assign the buffer to the bytes ``[offset, offset + length)`` of a block, which belong at
        ``position`` of ``fd``; bits of ``data``, the whole block's, are the pages there."""
        self.core.off, self.core.len = offset, length
        self.core.fd, self.core.at = fd, position
        self.core.data = data.core + offset // self._page_size // 64

    def write(self, transfer: Transfer, channel: Channel) -> int:
        """Write the pages to their places. Returns how many pages have old bytes in the file now,
        or a negative errno."""
        return int(
            _core.lib.qm_write_staging(transfer.core, channel.core, self.core, channel.fault.core)
        )
