"""A load: the right blocks into the right memory, or a clear error."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate import BlockMismatch, FileMemory, RamBlock, SnapshotError
from tests.harness.kernel import memfd
from tests.harness.snapshots import SLOW, ram, save_known

MIB = 1 << 20


@pytest.fixture
def two(disk: Path) -> tuple[Path, dict[str, Any]]:
    """A snapshot of two blocks, and what they hold."""
    memories = {"pc.ram": ram(700, seed=1), "vga.vram": ram(300, seed=2)}
    pyqmigrate.save(disk / "snap", [RamBlock(n, m) for n, m in memories.items()])
    return disk / "snap", memories


def buffers(memories: dict[str, Any]) -> dict[str, Any]:
    return {name: np.full(len(m), 0x77, dtype=np.uint8) for name, m in memories.items()}


def test_blocks_are_matched_by_name_whatever_their_order(two: Any) -> None:
    path, memories = two
    given = dict(reversed(buffers(memories).items()))
    report = pyqmigrate.open_snapshot(path).load(given)
    for name, memory in memories.items():
        assert (given[name] == memory).all()
    pages = [m.reshape(-1, 4096).any(axis=1) for m in memories.values()]
    assert report.data_pages == sum(int(p.sum()) for p in pages)
    assert report.zero_pages == sum(int((~p).sum()) for p in pages)
    assert report.bytes_read >= report.data_pages * 4096
    assert report.seconds > 0


@pytest.mark.parametrize("start", ["method", "function"])
def test_blocks_that_do_not_match_are_refused_before_anything_is_touched(
    two: Any, start: str, same_descriptors: None
) -> None:
    path, memories = two
    given = buffers(memories)
    wrong = [
        {},
        {"pc.ram": given["pc.ram"]},
        {**given, "other": bytearray(4096)},
        {**given, "pc.ram": given["pc.ram"][:-4096]},
        {**given, "pc.ram": bytearray(len(memories["pc.ram"]) + 4096)},
        {**given, "vga.vram": bytearray(len(memories["vga.vram"]) - 1)},
        {**given, "vga.vram": bytearray()},
        {"pc.ram": given["vga.vram"], "vga.vram": given["pc.ram"]},
    ]
    for memories_given in wrong:
        with pytest.raises(BlockMismatch):
            if start == "method":
                with pyqmigrate.open_snapshot(path) as snapshot:
                    snapshot.load(memories_given)
            else:
                pyqmigrate.start_load(path, memories_given)
        assert all((m == 0x77).all() for m in given.values())


def test_a_block_mismatch_names_the_block_and_what_there_is(two: Any) -> None:
    path, memories = two
    with pytest.raises(BlockMismatch, match=r"pc\.ram.*vga\.vram"):
        pyqmigrate.open_snapshot(path).load({"vga.vram": memories["vga.vram"]})


@pytest.mark.parametrize("clear", ["zero", "leave"])
def test_clear_pages_are_zeroed_or_left(two: Any, clear: str) -> None:
    path, memories = two
    given = buffers(memories)
    pyqmigrate.open_snapshot(path).load(given, clear=clear)
    for name, memory in memories.items():
        empty = ~memory.reshape(-1, 4096).any(axis=1)
        assert (given[name].reshape(-1, 4096)[empty] == (0 if clear == "zero" else 0x77)).all()


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"direct_io": "maybe"}, {"clear": "what"}, {"channels": "1"}]
)
def test_wrong_options_are_refused(two: Any, options: dict[str, Any]) -> None:
    path, memories = two
    with pytest.raises(pyqmigrate.UsageError):
        pyqmigrate.open_snapshot(path).load(buffers(memories), **options)


@pytest.mark.parametrize("direct_io", ["on", "off", "auto"])
def test_the_report_shows_direct_io(two: Any, direct_io: str) -> None:
    path, memories = two
    report = pyqmigrate.open_snapshot(path).load(buffers(memories), direct_io=direct_io)
    assert report.direct_io == (direct_io != "off")
    assert report.direct_io_reason


def test_unaligned_memory_is_loaded_and_named(two: Any) -> None:
    path, memories = two
    given = buffers(memories)
    given["pc.ram"] = np.full(len(memories["pc.ram"]) + 8, 0x77, dtype=np.uint8)[8:]
    report = pyqmigrate.open_snapshot(path).load(given)
    assert "pc.ram" in report.unaligned_blocks
    assert (given["pc.ram"] == memories["pc.ram"]).all()


def test_a_load_from_tmpfs_works_and_gives_its_reason(shm: Path) -> None:
    memory = save_known(shm / "snap")
    given = bytearray(len(memory))
    report = pyqmigrate.open_snapshot(shm / "snap").load({"ram": given})
    assert not report.direct_io
    assert "alignment" in report.direct_io_reason
    assert given == memory.tobytes()


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("when", ["before the bitmaps are read", "after the bitmaps were read"])
def test_a_file_that_becomes_shorter_is_a_snapshot_error(
    two: Any, direct_io: str, when: str
) -> None:
    path, memories = two
    with pyqmigrate.open_snapshot(path) as snapshot:
        if when.startswith("after"):
            snapshot.verify()
            cut = snapshot.blocks["vga.vram"].pages_offset
        else:
            cut = snapshot.blocks["pc.ram"].bitmap_offset
        os.truncate(path, cut)
        with pytest.raises(SnapshotError):
            snapshot.load(buffers(memories), direct_io=direct_io)
        with pytest.raises(SnapshotError):
            snapshot.blocks["vga.vram"].read(0, snapshot.blocks["vga.vram"].length)


def test_progress_comes_on_the_waiting_thread(disk: Path) -> None:
    memory = ram(25600, density=1.0)
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)])
    seen: list[tuple[pyqmigrate.Progress, int]] = []
    given = np.zeros(len(memory), dtype=np.uint8)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        job = snapshot.start_load({"ram": given})
        job.set_max_bandwidth(200 * MIB)
        job.result(20, progress=lambda p: seen.append((p, threading.get_ident())))
    assert seen[-1][0].bytes_done == seen[-1][0].bytes_total == len(memory)
    assert {thread for _, thread in seen} == {threading.get_ident()}
    assert (given == memory).all()


def test_what_progress_raises_cancels_the_load(disk: Path, same_descriptors: None) -> None:
    threads = threading.active_count()
    memory = ram(4096, density=1.0)
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)])

    def callback(_: pyqmigrate.Progress) -> None:
        raise LookupError("enough")

    given = bytearray(len(memory))
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot, pytest.raises(LookupError):
        snapshot.load({"ram": given}, progress=callback)
    given.append(0)
    assert threading.active_count() == threads


def test_a_cancelled_load_stops_within_a_tenth_of_a_second(disk: Path) -> None:
    memory = ram(32 * 1024, density=1.0)
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)])
    job = pyqmigrate.start_load(disk / "snap", {"ram": np.zeros(len(memory), dtype=np.uint8)})
    job.set_max_bandwidth(SLOW)
    time.sleep(0.1)
    job.cancel()
    started = time.monotonic()
    with pytest.raises(pyqmigrate.Cancelled):
        job.result(5)
    assert time.monotonic() - started < 0.1


def test_start_load_closes_the_snapshot_when_it_ends(two: Any, same_descriptors: None) -> None:
    path, memories = two
    given = buffers(memories)
    pyqmigrate.start_load(path, given).result(5)
    assert all((given[n] == m).all() for n, m in memories.items())


def test_a_mix_of_buffers_and_files_is_loaded(two: Any) -> None:
    path, memories = two
    given = buffers(memories)
    with memfd(len(memories["pc.ram"])) as fd:
        given["pc.ram"] = FileMemory(fd)
        pyqmigrate.open_snapshot(path).load(given, channels=4)
        assert os.pread(fd, len(memories["pc.ram"]), 0) == memories["pc.ram"].tobytes()
    assert (given["vga.vram"] == memories["vga.vram"]).all()


def test_one_snapshot_serves_several_loads_at_once(two: Any) -> None:
    path, memories = two
    with pyqmigrate.open_snapshot(path) as snapshot:
        given = [buffers(memories) for _ in range(4)]
        for job in [snapshot.start_load(g) for g in given]:
            job.result(10)
    for memory in given:
        assert all((memory[n] == m).all() for n, m in memories.items())
