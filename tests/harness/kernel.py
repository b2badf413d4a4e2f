"""The core's structures, built from Python values, for tests."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyqmigrate._core import ffi, lib

CHUNK = lib.QM_CHUNK
PAGE_SIZES = [1 << bits for bits in range(10, 17)]
POISON = 0xEE  # what a file holds where nothing was written; never in guest memory
DIRECT_UNIT = 4096

Bits = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

# As pyqmigrate.snapshot.save.mapped_ram has them: bytes of gap, share in percent, everything.
AUTO = (128 << 10, 50, 0)
EXACT = (0, 0, 0)
DENSE = (0, 0, 1)
POLICIES = {"auto": AUTO, "exact": EXACT, "dense": DENSE}


def new_job() -> Any:
    return ffi.gc(lib.qm_job_create(), lib.qm_job_destroy)


def new_channel() -> Any:
    return ffi.gc(lib.qm_channel_create(), lib.qm_channel_destroy)


def totals(job: Any) -> Any:
    out = ffi.new("struct qm_totals *")
    lib.qm_job_totals(job, out)
    return out


def to_words(bits: Bits) -> Any:
    """A bitmap as the core wants it; keep it referenced."""
    words = ffi.new("uint64_t[]", max(1, -(-len(bits) // 64)))
    packed = np.packbits(bits, bitorder="little").tobytes()
    ffi.memmove(words, packed, len(packed))
    return words


def to_bits(words: Any, npages: int) -> Bits:
    raw = np.frombuffer(ffi.buffer(words), dtype=np.uint8)
    return np.unpackbits(raw, bitorder="little")[:npages].astype(bool)


def new_block(length: int, page_size: int, pages_offset: int) -> Any:
    block = ffi.new("struct qm_block *")
    block.len, block.page_size, block.pages_offset = length, page_size, pages_offset
    return block


def new_policy(policy: tuple[int, int, int]) -> Any:
    core = ffi.new("struct qm_policy *")
    core.max_gap, core.gap_share, core.everything = policy
    return core


class Transfer:
    """A ``struct qm_transfer``, and what it points to; NULL for what is not given."""

    def __init__(self, job: Any, block: Any, **fields: Any) -> None:
        self._keep = (job, block, fields)
        self.core = ffi.new("struct qm_transfer *")
        self.core.job, self.core.block = job, block
        for name, value in fields.items():
            setattr(self.core, name, value)


class Memory:
    """A ``struct qm_memory`` and what keeps it alive."""

    def __init__(
        self, *, base: Bytes | None = None, fd: int = -1, fd_offset: int = 0, fill: Any = None
    ) -> None:
        self.core = ffi.new("struct qm_memory *")
        self.core.fd, self.core.fd_offset = fd, fd_offset
        self._keep = (base, fill)
        if base is not None:
            self._view = ffi.from_buffer("unsigned char[]", base)
            self.core.base = self._view
        if fill is not None:
            self.core.fill = fill


class File:
    """A file with a buffered and a direct descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def core(
        self, *, direct: bool, mem_align: int = DIRECT_UNIT, off_align: int = DIRECT_UNIT
    ) -> Any:
        file = ffi.new("struct qm_file *")
        file.fd = self.fd
        file.fd_direct = self.direct if direct else -1
        file.mem_align, file.off_align = (mem_align, off_align) if direct else (1, 1)
        return file

    def fill(self, data: bytes) -> None:
        os.ftruncate(self.fd, 0)
        self.write_at(0, data)

    def write_at(self, at: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], at + done)

    def poison(self, size: int) -> None:
        self.fill(bytes([POISON]) * size)

    def holes(self, size: int) -> None:
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, size)

    def read(self, at: int, length: int) -> Bytes:
        parts, have = [], 0
        while have < length:
            part = os.pread(self.fd, length - have, at + have)
            if not part:
                break
            parts.append(part)
            have += len(part)
        return np.frombuffer(b"".join(parts), dtype=np.uint8)

    def allocated(self, at: int, length: int, unit: int = DIRECT_UNIT) -> Bits:
        """Which units of the range are allocated, as SEEK_DATA tells after an fsync."""
        os.fsync(self.fd)
        have = np.zeros(-(-length // unit), dtype=bool)
        position = at
        while position < at + length:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                break
            stop = os.lseek(self.fd, start, os.SEEK_HOLE)
            have[max(start - at, 0) // unit : -(-max(stop - at, 0) // unit)] = True
            position = stop
        return have

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.direct)


@contextmanager
def memfd(size: int, seals: int = 0) -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        if seals:
            import fcntl

            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def guest(bits: Bits, page_size: int, seed: int = 0, shift: int = 0) -> Bytes:
    """Memory whose page k holds data where ``bits[k]``, ``shift`` bytes off a page boundary.

    A data page holds its own bytes, at times just one of them not zero; never POISON.
    """
    rng = np.random.default_rng(seed)
    raw = np.frombuffer(mmap.mmap(-1, len(bits) * page_size + shift + 4096), dtype=np.uint8)
    memory = raw[shift : shift + len(bits) * page_size]
    pages = memory.reshape(len(bits), page_size)
    fills = rng.integers(1, POISON, len(bits), dtype=np.uint8)
    pages[bits] = fills[bits, None]
    for k in np.flatnonzero(bits)[::7]:
        pages[k] = 0
        pages[k, rng.integers(page_size)] = fills[k]
    return memory


def write(
    memory: Memory,
    block: Any,
    file: Any,
    policy: tuple[int, int, int],
    data: Any,
    *,
    selection: Any = ffi.NULL,
    job: Any = None,
    channel: Any = None,
    tail: bool = True,
    fault: Any = None,
    step: int = 1,
) -> int:
    """qm_write over a whole block, ``step`` chunks a call, and qm_write_tail; the first -errno."""
    job = job or new_job()
    channel = channel or new_channel()
    fault = fault or ffi.new("struct qm_fault *")
    transfer = Transfer(
        job,
        block,
        file=file,
        memory=memory.core,
        policy=new_policy(policy),
        selection=selection,
        data=data,
    )
    npages = block.len // block.page_size
    pages = step * CHUNK // block.page_size
    for first in range(0, npages, pages):
        rc: int = lib.qm_write(transfer.core, channel, first, min(pages, npages - first), fault)
        if rc:
            return rc
    if not tail:
        return 0
    return int(lib.qm_write_tail(transfer.core, channel, fault))


def read(
    memory: Memory,
    block: Any,
    file: Any,
    data: Any,
    *,
    max_gap: int = 128 << 10,
    zero_clear: bool = True,
    job: Any = None,
    fault: Any = None,
    step: int = 1,
) -> int:
    """qm_read over a whole block; the first -errno."""
    job = job or new_job()
    channel = new_channel()
    fault = fault or ffi.new("struct qm_fault *")
    policy = ffi.new("struct qm_policy *", {"max_gap": max_gap, "zero_clear": zero_clear})
    transfer = Transfer(job, block, file=file, memory=memory.core, policy=policy, data=data)
    npages = block.len // block.page_size
    pages = step * CHUNK // block.page_size
    for first in range(0, npages, pages):
        rc: int = lib.qm_read(transfer.core, channel, first, min(pages, npages - first), fault)
        if rc:
            return rc
    return 0


def store(fd: int, memory: Any, at: int = 0) -> None:
    """Put memory into a file, zero pages of 4 KiB left as holes."""
    for start in range(0, len(memory), 4096):
        piece = memory[start : start + 4096]
        if piece.any():
            os.pwrite(fd, piece.tobytes(), at + start)


def fill_from(memory: Any, *, end: int | None = None, error: int = 0) -> Any:
    end = len(memory) if end is None else end

    @ffi.callback("ssize_t(void *, void *, uint64_t, size_t)")
    def fill(_: Any, buffer: Any, offset: int, length: int) -> int:
        if error and offset + length > end:
            return -error
        length = max(min(length, end - offset), 0)
        ffi.memmove(buffer, memory[offset : offset + length].tobytes(), length)
        return length

    return fill


def mapped(fd: int, offset: int, length: int) -> Any:
    start = offset // 4096 * 4096
    mapping = mmap.mmap(fd, length + offset - start, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
    return np.frombuffer(mapping, dtype=np.uint8)[offset - start :]
