"""Guest memory in another process: saved, refused, and left as it was."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate import GuestMemoryError, ProcessMemory, RamBlock, UsageError
from pyqmigrate.io.process_memory import ProcessSource
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.load.sequential import start_sequential_load
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.kernel import memfd
from tests.harness.processes import PAGE, Holder, as_nobody
from tests.harness.snapshots import SLOW, known_memory, load, save_known

pytestmark = pytest.mark.usefixtures("same_descriptors")

PRIVATE, SHARED = mmap.MAP_PRIVATE, mmap.MAP_SHARED
PAGES = 3000  # not a whole number of chunks
SOME = [*range(40), *range(1000, 1500, 3), 2047, 2999]


def saved(path: Path, memory: ProcessMemory, **options: Any) -> pyqmigrate.SaveReport:
    return pyqmigrate.save(path, [RamBlock("ram", memory)], **options)


@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_snapshot_of_a_process_has_its_memory(disk: Path, sparse: str, direct_io: str) -> None:
    with Holder(PAGES, SOME, flags=PRIVATE) as holder:
        report = saved(disk / "snap", holder.memory, sparse=sparse, direct_io=direct_io)
        assert report.data_pages == len(SOME)
        assert report.zero_pages == PAGES - len(SOME)
        assert load(disk / "snap")["ram"].tobytes() == holder.content.tobytes()


@pytest.mark.parametrize("sparse", ["auto", "dense"])
def test_address_that_is_not_aligned_is_saved(disk: Path, sparse: str) -> None:
    with Holder(PAGES, SOME, flags=PRIVATE) as holder:
        memory = ProcessMemory(holder.pid, holder.address + 1024, (PAGES - 1) * PAGE)
        saved(disk / "snap", memory, sparse=sparse)
        expected = holder.content[1024 : 1024 + memory.length]
        assert load(disk / "snap")["ram"].tobytes() == expected.tobytes()


def test_sequential_stream_of_a_process_has_its_memory(disk: Path) -> None:
    with Holder(PAGES, SOME, flags=PRIVATE) as holder:
        start_sequential_save(disk / "stream", [RamBlock("ram", holder.memory)]).wait()
        loaded, source = bytearray(holder.length), StreamFile.open(disk / "stream")
        try:
            start_sequential_load(source, {"ram": loaded}).wait()
        finally:
            source.close()
        assert loaded == holder.content.tobytes()


@pytest.mark.parametrize("stated", ["kernel", "words"])
def test_pages_never_touched_do_not_come_into_being(
    disk: Path, stated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stated == "words":
        find = ProcessSource._find_pagemap

        def without_scan(self: ProcessSource, memory: ProcessMemory) -> bool:
            found = find(self, memory)
            self.core.has_scan = 0
            return found

        monkeypatch.setattr(ProcessSource, "_find_pagemap", without_scan)
    pages = 32 << 10  # 128 MiB
    with Holder(pages, range(2048), flags=PRIVATE) as holder:
        before = holder.page_tables()
        saved(disk / "snap", holder.memory)
        assert holder.page_tables() - before <= 16
        # Beside those touched, what follows them within a step, and what was probed.
        assert holder.present().sum() <= 2048 + 2 * 64
        assert load(disk / "snap")["ram"].tobytes() == holder.content.tobytes()


@pytest.mark.parametrize("flags", [PRIVATE, SHARED], ids=["private", "shared"])
def test_mapped_file_is_read_where_no_page_was_touched(disk: Path, shm: Path, flags: int) -> None:
    path = shm / "ram"
    path.write_bytes(bytes(range(1, 256)) * (PAGES * PAGE // 255 + 1))
    with Holder(PAGES, [7, 8], flags=flags, path=path) as holder:
        assert not holder.present().all()
        saved(disk / "snap", holder.memory)
        assert load(disk / "snap")["ram"].tobytes() == holder.content.tobytes()


def test_shared_memory_without_a_file_is_read(disk: Path) -> None:
    with Holder(PAGES, SOME, flags=SHARED) as holder:
        saved(disk / "snap", holder.memory)
        assert load(disk / "snap")["ram"].tobytes() == holder.content.tobytes()


@pytest.mark.parametrize(
    ("pid", "address", "length"),
    [
        (0, 0, PAGE),
        (-1, 0, PAGE),
        (1 << 40, 0, PAGE),
        (True, 0, PAGE),
        ("1", 0, PAGE),
        (1, -1, PAGE),
        (1, 0, 0),
        (1, 0, -1),
        (1, (1 << 64) - PAGE, 2 * PAGE),
        (1, 0.0, PAGE),
    ],
)
def test_what_no_process_has_is_refused(disk: Path, pid: Any, address: Any, length: Any) -> None:
    memory = ProcessMemory(pid, address, length)
    with pytest.raises(UsageError):
        memory.refusal()
    with pytest.raises(UsageError):
        saved(disk / "snap", memory)
    assert not [*disk.iterdir()]


def test_part_of_a_page_is_not_a_block(disk: Path) -> None:
    with Holder(4, [0], flags=PRIVATE) as holder:
        memory = ProcessMemory(holder.pid, holder.address, PAGE + 1)
        with pytest.raises(UsageError, match="multiple of the page size"):
            saved(disk / "snap", memory)


def test_nothing_is_loaded_into_a_process(disk: Path) -> None:
    save_known(disk / "snap")
    length = len(known_memory())
    with Holder(length // PAGE, [0], flags=PRIVATE) as holder:
        with (
            pyqmigrate.open_snapshot(disk / "snap") as snapshot,
            pytest.raises(UsageError, match="only be saved"),
        ):
            snapshot.load({"ram": holder.memory})
        assert holder.present().sum() == 1


def refused(memory: ProcessMemory, disk: Path) -> GuestMemoryError:
    """What a save raises; nothing is left of it, and refusal() says the same."""
    with pytest.raises(GuestMemoryError) as caught:
        saved(disk / "snap", memory)
    assert caught.value.block == "ram"
    assert not [*disk.iterdir()]
    refusal = memory.refusal()
    assert refusal is not None
    assert refusal.errno == caught.value.errno
    return caught.value


def test_readable_memory_has_no_refusal() -> None:
    with Holder(4, [0], flags=PRIVATE) as holder:
        assert holder.memory.refusal() is None


def test_process_that_is_not_there_is_refused(disk: Path) -> None:
    with Holder(4, [0], flags=PRIVATE) as holder:
        holder.end()
        assert refused(holder.memory, disk).errno == errno.ESRCH


@pytest.mark.parametrize("shift", [-PAGE, 1 << 30])
def test_address_without_memory_is_refused(disk: Path, shift: int) -> None:
    """Before or behind what is mapped: a wrong address is seen before the target is touched."""
    with Holder(4, [0], flags=PRIVATE) as holder:
        memory = ProcessMemory(holder.pid, shift % (1 << 40), 4 * PAGE)
        assert refused(memory, disk).errno == errno.EFAULT


def test_another_user_is_refused_with_eperm() -> None:
    if os.getuid() == 0:
        with Holder(4, [0], flags=PRIVATE) as holder:
            assert as_nobody(holder.memory) == errno.EPERM
        return
    refusal = ProcessMemory(1, 1 << 20, PAGE).refusal()
    assert refusal is not None
    assert refusal.errno == errno.EPERM
    assert "CAP_SYS_PTRACE" in str(refusal)


def test_gap_in_the_middle_is_an_error_that_says_where(disk: Path) -> None:
    with Holder(PAGES, range(PAGES), flags=PRIVATE, unmapped=2000 * PAGE) as holder:
        assert holder.memory.refusal() is None
        with pytest.raises(GuestMemoryError, match=f"{2000 * PAGE:#x} of block 'ram'") as caught:
            saved(disk / "snap", holder.memory)
        assert caught.value.errno == errno.EFAULT
        assert not [*disk.iterdir()]


def test_process_that_ends_while_it_is_saved_is_an_error(disk: Path) -> None:
    with Holder(PAGES, range(PAGES), flags=PRIVATE) as holder:
        job = pyqmigrate.start_save(
            disk / "snap", [RamBlock("ram", holder.memory)], max_bandwidth=SLOW
        )
        holder.end()
        job.set_max_bandwidth(0)
        with pytest.raises(GuestMemoryError) as caught:
            job.result()
        assert caught.value.errno == errno.ESRCH
        assert not [*disk.iterdir()]


def test_blocks_of_all_kinds_go_into_one_snapshot(disk: Path) -> None:
    known = known_memory()
    with Holder(PAGES, SOME, flags=PRIVATE) as holder, memfd(len(known)) as fd:
        os.pwrite(fd, known.tobytes(), 0)
        blocks = [
            RamBlock("process", holder.memory),
            RamBlock("file", pyqmigrate.FileMemory(fd)),
            RamBlock("buffer", known.tobytes()),
        ]
        pyqmigrate.save(disk / "snap", blocks)
        loaded = load(disk / "snap")
        assert loaded["process"].tobytes() == holder.content.tobytes()
        assert loaded["file"].tobytes() == loaded["buffer"].tobytes() == known.tobytes()
