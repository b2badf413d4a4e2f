"""A save: what comes back when it is loaded, what is reported, and how it is waited for."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import FileMemory, JobTimeout, Progress, RamBlock
from pyqmigrate.io.output import OutputFile
from tests.harness.examples import some
from tests.harness.kernel import PAGE_SIZES, guest, memfd
from tests.harness.snapshots import SLOW, data_bytes, known_memory, load, ram
from tests.harness.strategies import page_bits

MIB = 1 << 20

names = st.one_of(
    st.sampled_from(["pc.ram", "/rom@etc/acpi/tables", "0000:00:02.0/vga.vram", "ü", "a" * 255]),
    st.text(min_size=1, max_size=20).filter(
        lambda t: (
            1 <= len(t.encode("utf-8", "surrogatepass")) <= 255
            and not any(0xD800 <= ord(c) <= 0xDFFF for c in t)
        )
    ),
)


@some
@given(st.data())
def test_what_is_saved_is_loaded(disk: Path, data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    wanted: dict[str, Any] = {}
    blocks, fds = [], []
    for name in data.draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        npages = data.draw(st.one_of(st.integers(1, 70), st.integers(1, (6 << 20) // page_size)))
        memory = guest(
            data.draw(page_bits(npages)),
            page_size,
            seed=npages,
            shift=data.draw(st.sampled_from([0, 0, 1, 512])),
        )
        wanted[name] = memory
        if data.draw(st.booleans()):
            fd = os.memfd_create("guest")
            fds.append(fd)
            os.write(fd, memory.tobytes())
            blocks.append(RamBlock(name, FileMemory(fd), page_size))
        else:
            blocks.append(RamBlock(name, memory, page_size))
    offset = data.draw(st.sampled_from([0, 0, 1, 4096, 1 << 20]))
    machine = data.draw(st.sampled_from(["", "pc-i440fx-10.0", "virt"]))
    target = f"file:{disk}/snap,offset={offset}" if offset else str(disk / "snap")
    reuse = data.draw(st.booleans())

    report = pyqmigrate.save(
        target,
        blocks,
        machine=machine,
        reuse=reuse,
        channels=data.draw(st.integers(1, 4)),
        direct_io=data.draw(st.sampled_from(["auto", "on", "off"])),
        sparse=data.draw(st.sampled_from(["auto", "exact", "dense"])),
    )
    for fd in fds:
        os.close(fd)

    pages = {name: m.reshape(-1, page_size).any(axis=1) for name, m in wanted.items()}
    assert report.data_pages == sum(int(p.sum()) for p in pages.values())
    assert report.zero_pages == sum(int((~p).sum()) for p in pages.values())
    loaded = load(
        target,
        channels=data.draw(st.integers(1, 4)),
        direct_io=data.draw(st.sampled_from(["auto", "on", "off"])),
    )
    assert list(loaded) == list(wanted), "the order of the blocks was not kept"
    for name, memory in wanted.items():
        assert (loaded[name] == memory).all()
    with pyqmigrate.open_snapshot(target) as snapshot:
        assert snapshot.machine == machine
        for name, bits in pages.items():
            block = snapshot.blocks[name]
            assert (block.length, block.page_size) == (len(wanted[name]), page_size)
            assert [block.bitmap[k] for k in range(len(bits))] == bits.tolist()
            at = data.draw(st.integers(0, block.length))
            length = data.draw(st.integers(0, min(block.length - at, 300000)))
            assert block.read(at, length) == wanted[name][at : at + length].tobytes()


@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
def test_the_bits_of_zero_pages_are_clear_under_every_policy(disk: Path, sparse: str) -> None:
    memory = ram(600, density=0.5)
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)], sparse=sparse)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        block = snapshot.blocks["ram"]
        data = data_bytes(disk / "snap", block.pages_offset, block.pages_offset + block.length)
        assert block.data_pages == memory.reshape(-1, 4096).any(axis=1).sum()
        if sparse == "exact":
            assert data == block.data_pages * 4096
        elif sparse == "dense":
            assert data == block.length
        else:
            assert block.data_pages * 4096 <= data <= block.data_pages * 4096 * 1.5


# ---- report --------------------------------------------------------------------------------------


def written_by_this_process(field: str) -> int:
    """Bytes so far, whatever the descriptor: ``wchar`` what was given to write calls,
    ``write_bytes`` what went, or will go, to a disk, in whole pages."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[field])


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_report_counts_every_byte_that_was_written(
    disk: Path, direct_io: str, sparse: str, channels: int
) -> None:
    if not os.access("/proc/self/io", os.R_OK):
        pytest.skip("this kernel does not count the bytes of a process")
    # A partial last unit, so that both descriptors have pages.
    blocks = [
        RamBlock("a", ram(1027, page_size=1024), 1024),
        RamBlock("b", ram(5000, page_size=1024), 1024),
    ]
    # Queued direct writes are no write calls; the kernel counts them as they go to the disk.
    field = "write_bytes" if direct_io == "on" else "wchar"
    before = written_by_this_process(field)
    report = pyqmigrate.save(
        disk / "snap", blocks, direct_io=direct_io, sparse=sparse, channels=channels
    )
    written = written_by_this_process(field) - before
    if direct_io == "off":
        assert report.bytes_written == written
    else:
        # The trial of direct I/O, and the buffered pieces (heads, bitmaps, tails) as whole pages.
        assert report.bytes_written <= written <= report.bytes_written + 20 * 4096
    info = (disk / "snap").stat()
    assert report.bytes_allocated == info.st_blocks * 512
    assert report.file_size == info.st_size
    assert report.channels == channels
    assert report.sparse == sparse


def test_the_seconds_of_a_report_are_wall_time(disk: Path) -> None:
    started = time.monotonic()
    report = pyqmigrate.save(
        disk / "snap", [RamBlock("ram", ram(256, density=1.0))], max_bandwidth=2 * MIB
    )
    took = time.monotonic() - started
    assert 0.3 < report.seconds <= took
    assert took - report.seconds < 0.1


def test_the_seconds_of_a_report_include_the_fsync(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def slow(fd: int) -> None:
        time.sleep(0.3)
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)
    report = pyqmigrate.save(disk / "snap", [RamBlock("ram", known_memory())])
    assert report.seconds > 0.3


# ---- waiting -------------------------------------------------------------------------------------


def slow_blocks() -> list[RamBlock]:
    return [RamBlock("ram", ram(512, density=1.0))]


def test_progress_comes_on_the_waiting_thread_at_most_ten_times_a_second(disk: Path) -> None:
    seen: list[tuple[Progress, int, float]] = []

    def callback(progress: Progress) -> None:
        seen.append((progress, threading.get_ident(), time.monotonic()))

    started = time.monotonic()
    report = pyqmigrate.save(disk / "snap", slow_blocks(), max_bandwidth=2 * MIB, progress=callback)
    took = time.monotonic() - started
    assert 3 <= len(seen) <= took * 10 + 1
    assert {thread for _, thread, _ in seen} == {threading.get_ident()}
    done = [progress.bytes_done for progress, _, _ in seen]
    assert done == sorted(done)
    last = seen[-1][0]
    assert last.bytes_done == last.bytes_total == 2 * MIB
    assert last.data_pages == report.data_pages
    assert last.zero_pages == report.zero_pages
    assert 0 < last.rate < 20 * MIB
    times = [when for _, _, when in seen[:-1]]  # the last comes when the job has ended
    assert all(b - a >= 0.09 for a, b in itertools.pairwise(times))


def test_progress_cannot_be_changed(disk: Path) -> None:
    job = pyqmigrate.start_save(disk / "snap", slow_blocks())
    with pytest.raises(AttributeError):
        job.progress.bytes_done = 5  # type: ignore[misc]
    job.result(5)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_progress_raises_cancels_and_is_raised(
    disk: Path, kind: type[BaseException], same_descriptors: None
) -> None:
    threads = threading.active_count()

    def callback(_: Progress) -> None:
        raise kind("enough")

    with pytest.raises(kind, match="enough"):
        pyqmigrate.save(disk / "snap", slow_blocks(), max_bandwidth=SLOW, progress=callback)
    assert list(disk.iterdir()) == []
    assert threading.active_count() == threads


def test_an_interrupt_cancels_and_leaves_nothing(disk: Path, same_descriptors: None) -> None:
    threads = threading.active_count()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pyqmigrate.save(disk / "snap", slow_blocks(), max_bandwidth=SLOW // 4)
    assert time.monotonic() - started < 1
    timer.join()
    assert list(disk.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("bandwidth", [4096, SLOW])
def test_a_cancelled_save_stops_within_a_tenth_of_a_second(
    disk: Path, channels: int, bandwidth: int
) -> None:
    memory = ram(channels * 9000, density=1.0)
    job = pyqmigrate.start_save(
        disk / "snap", [RamBlock("ram", memory)], channels=channels, max_bandwidth=bandwidth
    )
    time.sleep(0.15)
    job.cancel()
    started = time.monotonic()
    with pytest.raises(pyqmigrate.Cancelled):
        job.result(5)
    assert time.monotonic() - started < 0.1
    assert job.done()


def test_a_save_that_only_counts_can_be_cancelled_too(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where space is in doubt pages are counted first, which takes long in a large guest."""
    monkeypatch.setattr(OutputFile, "free_bytes", lambda self: 0)
    with memfd(4 << 30) as fd, mmap.mmap(fd, 4 << 30, mmap.MAP_PRIVATE) as m:
        job = pyqmigrate.start_save(disk / "snap", [RamBlock("ram", m)], channels=1)
        time.sleep(0.05)
        assert not job.done()
        job.cancel()
        started = time.monotonic()
        with pytest.raises(pyqmigrate.Cancelled):
            job.result(60)
        assert time.monotonic() - started < 0.15


def test_a_timeout_leaves_the_job_running(disk: Path) -> None:
    job = pyqmigrate.start_save(disk / "snap", slow_blocks(), max_bandwidth=SLOW)
    started = time.monotonic()
    with pytest.raises(JobTimeout):
        job.result(0.2)
    assert 0.19 < time.monotonic() - started < 0.5
    assert not job.done()
    job.set_max_bandwidth(0)
    report = job.result(5)
    assert job.done()
    assert job.result() == report, "a result can be asked for again"


def test_a_failure_can_be_asked_for_again(disk: Path) -> None:
    job = pyqmigrate.start_save(disk / "snap", slow_blocks(), max_bandwidth=SLOW)
    job.cancel()
    for _ in range(2):
        with pytest.raises(pyqmigrate.Cancelled):
            job.result(5)


def test_cancel_after_the_end_changes_nothing(disk: Path) -> None:
    job = pyqmigrate.start_save(disk / "snap", slow_blocks())
    report = job.result(5)
    job.cancel()
    assert job.result() == report
    assert (disk / "snap").exists()


def test_several_saves_run_side_by_side(disk: Path) -> None:
    memories = [ram(1000, seed=n) for n in range(4)]
    jobs = [
        pyqmigrate.start_save(disk / str(n), [RamBlock("ram", memory)])
        for n, memory in enumerate(memories)
    ]
    for job in jobs:
        job.result(10)
    for n, memory in enumerate(memories):
        assert (load(disk / str(n))["ram"] == memory).all()


def test_more_channels_than_ranges_are_harmless(disk: Path) -> None:
    memory = known_memory()
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)], channels=255)
    assert (load(disk / "snap", channels=255)["ram"] == memory).all()


@pytest.mark.parametrize("channels", [0, -1, 256, 1.5, "2", True, None])
def test_channels_are_1_to_255(disk: Path, channels: Any) -> None:
    with pytest.raises(pyqmigrate.UsageError):
        pyqmigrate.save(disk / "snap", slow_blocks(), channels=channels)
    assert list(disk.iterdir()) == []


def test_no_blocks_are_refused(disk: Path) -> None:
    with pytest.raises(pyqmigrate.UsageError):
        pyqmigrate.save(disk / "snap", [])


def test_target_page_bits_are_written(disk: Path) -> None:
    pyqmigrate.save(disk / "snap", slow_blocks(), target_page_bits=12)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        assert snapshot.stream.target_page_bits == 12


def test_the_bandwidth_of_a_save_is_held(disk: Path) -> None:
    report = pyqmigrate.save(disk / "snap", slow_blocks(), max_bandwidth=4 * MIB, channels=3)
    assert 0.35 < report.seconds < 1


def test_memory_that_changes_during_a_save_gives_a_whole_snapshot(disk: Path) -> None:
    with memfd(8 << 20) as fd:
        stop = threading.Event()

        def write() -> None:
            rng = np.random.default_rng(0)
            while not stop.is_set():
                at = int(rng.integers((8 << 20) - 5000))
                os.pwrite(fd, bytes([rng.integers(256)]) * 5000, at)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            pyqmigrate.save(disk / "snap", [RamBlock("ram", FileMemory(fd, 0, 8 << 20))])
        finally:
            stop.set()
            thread.join()
    load(disk / "snap")
