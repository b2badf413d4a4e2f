"""Memories: what is taken, what is refused, and that all of it is let go."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate import FileMemory, RamBlock, UsageError
from pyqmigrate.core import Transfer
from tests.harness.snapshots import SLOW, known_memory, load, ram, save_known

LENGTH = len(known_memory())
SHRINK = fcntl.F_SEAL_SHRINK
ALL_SEALS = SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@contextmanager
def memfd(
    content: bytes | None = None, *, size: int = LENGTH, at: int = 0, seals: int = 0
) -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if content is not None:
        for start in range(0, len(content), 4096):
            if any(content[start : start + 4096]):
                os.pwrite(fd, content[start : start + 4096], at + start)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    try:
        yield fd
    finally:
        os.close(fd)


def saved(disk: Path, memory: Any, **options: Any) -> bytes:
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)], **options)
    return load(disk / "snap")["ram"].tobytes()


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda raw: array.array("Q", raw),
        lambda raw: np.frombuffer(raw, dtype=np.uint64).reshape(8, -1),
        lambda raw: memoryview(raw).cast("I"),
    ],
    ids=["bytes", "bytearray", "memoryview", "array", "numpy", "cast"],
)
def test_everything_with_the_buffer_protocol_can_be_saved(disk: Path, make: Any) -> None:
    raw = known_memory().tobytes()
    assert saved(disk, make(raw)) == raw


def test_a_mapping_and_shared_memory_can_be_saved_and_loaded(disk: Path) -> None:
    raw = known_memory().tobytes()
    shared = shared_memory.SharedMemory(create=True, size=LENGTH)
    try:
        shared.buf[:] = raw
        assert saved(disk, shared.buf) == raw
        shared.buf[:] = b"\x77" * LENGTH
        with mmap.mmap(-1, LENGTH) as mapping, pyqmigrate.open_snapshot(disk / "snap") as snapshot:
            snapshot.load({"ram": shared.buf})
            assert bytes(shared.buf) == raw
            snapshot.load({"ram": mapping})
            assert mapping[:] == raw
            assert saved(disk, mapping) == raw
    finally:
        shared.close()
        shared.unlink()


@pytest.mark.parametrize(
    "memory",
    [
        None,
        5,
        "text",
        [1, 2],
        object(),
        np.zeros((64, 128), dtype=np.uint8)[:, ::2],
        memoryview(bytes(8192))[::2],
    ],
    ids=["None", "int", "str", "list", "object", "strided array", "strided view"],
)
def test_what_is_not_a_contiguous_buffer_is_refused(disk: Path, memory: Any) -> None:
    with pytest.raises(UsageError, match="'ram'"):
        pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)])


@pytest.mark.parametrize("length", [0, 1, 4095, 4097, 8191])
def test_lengths_are_whole_pages(disk: Path, length: int) -> None:
    with pytest.raises(UsageError, match="'ram'"):
        pyqmigrate.save(disk / "snap", [RamBlock("ram", bytes(length))])


@pytest.mark.parametrize("page_size", [0, -4096, 512, 4095, 12288, 1 << 17])
def test_page_sizes_that_are_none_are_refused(disk: Path, page_size: int) -> None:
    with pytest.raises(UsageError, match="page size"):
        pyqmigrate.save(disk / "snap", [RamBlock("ram", bytes(1 << 18), page_size)])


def test_a_read_only_buffer_cannot_be_loaded_into(disk: Path) -> None:
    save_known(disk / "snap")
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        for memory in (bytes(LENGTH), memoryview(bytearray(LENGTH)).toreadonly()):
            with pytest.raises(UsageError, match="writable"):
                snapshot.load({"ram": memory})


# ---- exports -------------------------------------------------------------------------------------


def test_a_buffer_is_held_during_a_save_and_let_go_after(disk: Path) -> None:
    memory = bytearray(known_memory().tobytes())
    job = pyqmigrate.start_save(disk / "snap", [RamBlock("ram", memory)], max_bandwidth=SLOW)
    with pytest.raises(BufferError):
        memory.append(0)
    job.set_max_bandwidth(0)
    job.result(10)
    memory.append(0)


@pytest.mark.parametrize("how", ["cancel", "failure", "argument"])
def test_a_buffer_is_let_go_after_a_save_that_failed(
    disk: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = bytearray(known_memory().tobytes())
    block = RamBlock("ram", memory)
    if how == "cancel":
        job = pyqmigrate.start_save(disk / "snap", [block], max_bandwidth=SLOW)
        job.cancel()
        with pytest.raises(pyqmigrate.Cancelled) as caught:
            job.result(5)
        assert caught.value
    elif how == "failure":

        def refuse(fd: int) -> None:
            raise OSError(5, "injected")

        with monkeypatch.context() as patched, pytest.raises(pyqmigrate.TargetError):
            patched.setattr(os, "fsync", refuse)
            pyqmigrate.save(disk / "snap", [block])
    else:
        with pytest.raises(UsageError):
            pyqmigrate.save(disk / "snap", [block, block])
        with pytest.raises(pyqmigrate.TargetError):
            pyqmigrate.save(disk / "none" / "snap", [block])
    memory.append(0)


def test_a_buffer_is_held_during_a_load_and_let_go_after(disk: Path) -> None:
    raw = save_known(disk / "snap").tobytes()
    memory = bytearray(LENGTH)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        job = snapshot.start_load({"ram": memory})
        job.result(5)
        memory.append(0)
        del memory[LENGTH:]
        assert memory == raw
        job = snapshot.start_load({"ram": memory})
        job.cancel()
        with pytest.raises(pyqmigrate.Cancelled):
            job.result(5)
        memory.append(0)
        with pytest.raises(UsageError):
            snapshot.load({"ram": memory})
        memory.append(0)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seals", [0, SHRINK, ALL_SEALS])
@pytest.mark.parametrize("offset", [0, 4096, 1024, 4097])
@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_a_memfd_is_saved_and_its_holes_stay(
    disk: Path, seals: int, offset: int, direct_io: str
) -> None:
    raw = known_memory().tobytes()
    size = offset + LENGTH + 4096
    with memfd(raw, size=size, at=offset, seals=seals) as fd:
        blocks = os.fstat(fd).st_blocks
        assert saved(disk, FileMemory(fd, offset, LENGTH), direct_io=direct_io) == raw
        assert os.fstat(fd).st_blocks == blocks


def test_a_file_memory_without_a_length_reaches_to_the_end(disk: Path) -> None:
    raw = known_memory().tobytes()
    with memfd(raw) as fd:
        assert saved(disk, FileMemory(fd)) == raw
        assert saved(disk, FileMemory(fd, 8192)) == raw[8192:]


def test_an_ordinary_file_is_saved_and_loaded(disk: Path) -> None:
    raw = known_memory().tobytes()
    path = disk / "ram.raw"
    path.write_bytes(b"head" + raw + b"tail")
    fd = os.open(path, os.O_RDWR)
    assert saved(disk, FileMemory(fd, 4, LENGTH)) == raw
    os.pwrite(fd, b"\x77" * LENGTH, 4)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        snapshot.load({"ram": FileMemory(fd, 4, LENGTH)})
    os.close(fd)
    assert path.read_bytes() == b"head" + raw + b"tail"


def test_a_load_makes_holes_of_clear_pages_in_a_memfd(disk: Path) -> None:
    raw = save_known(disk / "snap").tobytes()
    with memfd(b"\x77" * LENGTH) as fd, pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        report = snapshot.load({"ram": FileMemory(fd)})
        assert os.pread(fd, LENGTH, 0) == raw
        assert os.fstat(fd).st_blocks * 512 == report.data_pages * 4096
        os.pwrite(fd, b"\x77" * LENGTH, 0)
        snapshot.load({"ram": FileMemory(fd)}, clear="leave")
        left = np.frombuffer(os.pread(fd, LENGTH, 0), dtype=np.uint8).reshape(-1, 4096)
        clear = ~known_memory().reshape(-1, 4096).any(axis=1)
        assert (left[clear] == 0x77).all()


@pytest.mark.parametrize("direct_io", ["auto", "off"])
@pytest.mark.parametrize("offset", [4096, 1024, 4097])
def test_a_load_at_an_offset_changes_nothing_around_it(
    disk: Path, offset: int, direct_io: str
) -> None:
    raw = save_known(disk / "snap").tobytes()
    size = offset + LENGTH + 10000
    with memfd(b"\x77" * size, size=size) as fd:
        with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
            snapshot.load({"ram": FileMemory(fd, offset, LENGTH)}, direct_io=direct_io)
        after = os.pread(fd, size, 0)
    assert after == b"\x77" * offset + raw + b"\x77" * 10000


def test_the_position_of_a_descriptor_is_not_moved(disk: Path) -> None:
    with memfd(known_memory().tobytes()) as fd:
        os.lseek(fd, 4321, os.SEEK_SET)
        saved(disk, FileMemory(fd))
        with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
            snapshot.load({"ram": FileMemory(fd)})
        assert os.lseek(fd, 0, os.SEEK_CUR) == 4321


def test_a_descriptor_may_be_closed_once_the_job_has_started(disk: Path) -> None:
    raw = known_memory().tobytes()
    with memfd(raw) as fd:
        job = pyqmigrate.start_save(
            disk / "snap", [RamBlock("ram", FileMemory(fd))], max_bandwidth=SLOW
        )
    job.set_max_bandwidth(0)
    job.result(10)
    assert load(disk / "snap")["ram"].tobytes() == raw


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, None),
        (0, LENGTH + 4096),
        (LENGTH + 4096, None),
        (4096, LENGTH),
        (0, -4096),
        (0, 1 << 64),
        (1 << 64, 4096),
        (100, None),
    ],
)
def test_what_is_not_inside_the_file_is_refused(
    disk: Path, offset: int, length: int | None
) -> None:
    with memfd() as fd, pytest.raises(UsageError, match="'ram'"):
        saved(disk, FileMemory(fd, offset, length))


def test_what_is_not_a_file_is_refused(disk: Path, same_descriptors: None) -> None:
    reader, writer = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    with memfd() as closed:
        pass
    for fd in [reader, null, closed, -1]:
        with pytest.raises(UsageError):
            saved(disk, FileMemory(fd, 0, 4096))
    for fd in (reader, writer, null):
        os.close(fd)


def test_a_read_only_descriptor_is_not_loaded_into(disk: Path) -> None:
    save_known(disk / "snap")
    path = disk / "ram.raw"
    path.write_bytes(b"\x77" * LENGTH)
    fd = os.open(path, os.O_RDONLY)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot, pytest.raises(UsageError):
        snapshot.load({"ram": FileMemory(fd)})
    os.close(fd)
    assert path.read_bytes() == b"\x77" * LENGTH


@pytest.mark.parametrize("left", [0, 4096, LENGTH // 2, LENGTH - 1])
@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
def test_a_memfd_that_shrinks_before_its_pages_are_read_is_a_guest_memory_error(
    disk: Path, left: int, sparse: str
) -> None:
    memory = ram(512, density=1.0)
    with memfd(memory.tobytes()) as fd:
        blocks = [RamBlock("first", memory), RamBlock("ram", FileMemory(fd))]
        job = pyqmigrate.start_save(
            disk / "snap", blocks, channels=1, max_bandwidth=4 * SLOW, sparse=sparse
        )
        os.ftruncate(fd, left)
        job.set_max_bandwidth(0)
        with pytest.raises(pyqmigrate.GuestMemoryError) as caught:
            job.result(10)
    assert caught.value.block == "ram"
    assert not (disk / "snap").exists()


def test_a_memfd_that_shrinks_under_a_load_is_a_guest_memory_error(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = ram(512, density=1.0)
    pyqmigrate.save(disk / "snap", [RamBlock("a", memory), RamBlock("b", memory)])
    with memfd() as fd, pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        read = Transfer.read

        def read_and_shrink(*arguments: Any) -> int:  # "a" is read, "b" is not yet
            result = read(*arguments)
            os.ftruncate(fd, 0)
            return result

        # One thread reads the blocks, one after the other.
        monkeypatch.setattr("pyqmigrate.snapshot.load.mapped_ram._THREADS_A_CHANNEL", 1)
        monkeypatch.setattr(Transfer, "read", read_and_shrink)
        with pytest.raises(pyqmigrate.GuestMemoryError) as caught:
            snapshot.load({"a": bytearray(LENGTH), "b": FileMemory(fd)}, channels=1)
        assert os.fstat(fd).st_size == 0
    assert caught.value.block == "b"
