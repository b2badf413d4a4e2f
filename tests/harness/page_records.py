"""Page records in plain Python: the twin of the core's encoder and decoder, and C's shapes."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyqmigrate._core import ffi, lib
from tests.harness.kernel import Bits, Bytes, Memory, new_job, to_bits, to_words

ZERO, PAGE, EOS, CONTINUE, XBZRLE, FLUSH = 0x02, 0x08, 0x10, 0x20, 0x40, 0x200
END_MARK = struct.pack(">Q", EOS)


def word(offset: int, flags: int) -> bytes:
    return struct.pack(">Q", offset | flags)


def str8(name: bytes) -> bytes:
    return bytes([len(name)]) + name


def encode(memory: Bytes, page_size: int, name: bytes, want: Bits, named: bool) -> bytes:
    """Records of the pages wanted, PAGE for those that are not zero."""
    parts = []
    for k in np.flatnonzero(want).tolist():
        page = memory[k * page_size : (k + 1) * page_size].tobytes()
        zero = page.count(0) == page_size
        flags = (ZERO if zero else PAGE) | (CONTINUE if named else 0)
        parts.append(word(k * page_size, flags))
        parts.append(b"" if named else str8(name))
        parts.append(b"\0" if zero else page)
        named = True
    return b"".join(parts)


@dataclass(frozen=True)
class Record:
    """One record: a page of a block becomes ``fill`` bytes, ``page``, or changed by ``delta``.

    A delta is a list of (bytes left alone, new bytes).
    """

    block: int
    number: int
    fill: int | None = None
    page: bytes | None = None
    delta: tuple[tuple[int, bytes], ...] | None = None


def length(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7])


def delta_bytes(delta: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(length(same) + length(len(new)) + new for same, new in delta)


def stream_of(records: Sequence[Record], names: Sequence[bytes], page_size: int) -> bytes:
    """A section of these records: blocks are named where they change."""
    parts, current = [], None
    for record in records:
        flags = ZERO if record.fill is not None else PAGE if record.page is not None else XBZRLE
        same = record.block == current
        parts.append(word(record.number * page_size, flags | (CONTINUE if same else 0)))
        parts.append(b"" if same else str8(names[record.block]))
        if record.fill is not None:
            parts.append(bytes([record.fill]))
        elif record.page is not None:
            parts.append(record.page)
        else:
            body = delta_bytes(record.delta or ())
            parts.append(struct.pack(">BH", 1, len(body)) + body)
        current = record.block
    return b"".join(parts) + END_MARK


def apply(
    records: Sequence[Record], memories: Sequence[Bytes], page_size: int, *, fresh: bool
) -> tuple[list[Bytes], list[Bits]]:
    """Memories after the records, and which of their pages were mentioned."""
    after = [memory.copy() for memory in memories]
    seen = [np.zeros(len(memory) // page_size, dtype=bool) for memory in memories]
    for record in records:
        k = record.number
        page = after[record.block][k * page_size : (k + 1) * page_size]
        if record.fill is not None:
            page[:] = record.fill
        elif record.page is not None:
            page[:] = np.frombuffer(record.page, dtype=np.uint8)
        else:
            if fresh and not seen[record.block][k]:
                page[:] = 0
            at = 0
            for same, new in record.delta or ():
                at += same
                page[at : at + len(new)] = np.frombuffer(new, dtype=np.uint8)
                at += len(new)
        seen[record.block][k] = True
    return after, seen


class Name:
    """A ``struct qm_name`` and its bytes."""

    def __init__(self, name: bytes) -> None:
        self._bytes = ffi.new("unsigned char[]", name)
        self.core = ffi.new("struct qm_name *")
        self.core.bytes, self.core.len = self._bytes, len(name)


class Decoder:
    """The core's decoder over blocks; a memory that is None is skipped."""

    def __init__(
        self,
        names: Sequence[bytes],
        lengths: Sequence[int],
        memories: Sequence[Memory | None],
        page_size: int,
        *,
        fresh: bool = True,
    ) -> None:
        self.npages = [size // page_size for size in lengths]
        self.words = [to_words(np.zeros(n, dtype=bool)) for n in self.npages]
        self._keep = ([Name(name) for name in names], list(memories))
        self.blocks = ffi.new("struct qm_record_block[]", len(names))
        for n, memory in enumerate(memories):
            self.blocks[n].name = self._keep[0][n].core[0]
            self.blocks[n].len = lengths[n]
            if memory is not None:
                self.blocks[n].sink = lib.QM_SINK_MEMORY
                self.blocks[n].memory = memory.core
                self.blocks[n].seen = self.words[n]
        self.core = ffi.gc(
            lib.qm_decoder_create(self.blocks, len(names), page_size, fresh), lib.qm_decoder_destroy
        )
        assert self.core != ffi.NULL
        self.job = new_job()
        self.fault = ffi.new("struct qm_fault *")

    def seen(self) -> list[Bits]:
        return [to_bits(words, n) for words, n in zip(self.words, self.npages, strict=True)]

    def feed(self, data: bytes) -> tuple[int, int]:
        """``(result, bytes taken)`` of one call."""
        used = ffi.new("size_t *")
        # A buffer of just this size, so that a sanitizer sees a read past its end.
        exact = ffi.new("unsigned char[]", data) if data else ffi.new("unsigned char[1]")
        rc = lib.qm_decode(self.job, self.core, exact, len(data), used, self.fault)
        return int(rc), int(used[0])

    def feed_sliced(self, data: bytes, cuts: Iterable[int]) -> tuple[int, int]:
        """The last result, and all bytes taken, of ``data`` in slices."""
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        taken, rc = 0, 0
        for start, stop in itertools.pairwise(edges):
            rc, used = self.feed(data[start:stop])
            taken += used
            if rc:
                break
        return rc, taken

    def error(self) -> Any:
        error = ffi.new("struct qm_record_error *")
        lib.qm_decoder_error(self.core, error)
        return error


NAMES = [b"pc.ram", b"a", b"b" * 255]
