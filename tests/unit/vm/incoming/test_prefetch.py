"""Reading ahead what was recorded: these ranges, in their order, and never a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.working_set import TouchedRun, WorkingSet
from pyqmigrate.io import threads
from pyqmigrate.io.page_cache import cached_bytes, drop_cached
from pyqmigrate.io.working_set_file import RecordedWorkingSet
from pyqmigrate.vm.incoming import prefetch
from pyqmigrate.vm.incoming.prefetch import Prefetch, file_ranges
from tests.harness.examples import some

MIB = 1 << 20
PAGE = 4096
BLOCKS = (BlockSpec("pc.ram", 64 * MIB), BlockSpec("vga.vram", 16 * MIB, 65536))
LAYOUTS = {
    "pc.ram": BlockLayout("pc.ram", 64 * MIB, PAGE, 100, 200, MIB),
    "vga.vram": BlockLayout("vga.vram", 16 * MIB, 65536, 65 * MIB, 65 * MIB + 100, 66 * MIB),
}
SIZE = 82 * MIB


def recorded(
    *runs: tuple[int, int, int], blocks: tuple[BlockSpec, ...] = BLOCKS
) -> RecordedWorkingSet:
    working_set = WorkingSet(TouchedRun(*run) for run in runs)
    return RecordedWorkingSet(SnapshotId(SIZE, 0), blocks, working_set, 1.0)


@pytest.fixture
def cold(disk: Path) -> int:
    """A file that is not in the page cache."""
    path = disk / "snapshot"
    path.write_bytes(os.urandom(MIB) * 82)
    fd = os.open(path, os.O_RDWR)
    drop_cached(fd)
    if cached_bytes(fd) > MIB:
        pytest.skip("this file system keeps its page cache")
    return fd


@some
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(0), st.integers(0, 10_000), st.integers(1, 6000)),
            st.tuples(st.just(1), st.integers(0, 100), st.integers(1, 150)),
        ),
        max_size=20,
    )
)
def test_ranges_are_the_runs_in_their_order(runs: list[tuple[int, int, int]]) -> None:
    twin: list[int] = []
    for block, first, npages in runs:
        layout = LAYOUTS[BLOCKS[block].name]
        start = layout.pages_offset + first * layout.page_size
        twin += range(start, start + npages * layout.page_size, PAGE)
    ranges = [*file_ranges(LAYOUTS, recorded(*runs))]
    assert [page for start, length in ranges for page in range(start, start + length, PAGE)] == twin
    assert all(0 < length <= 4 * MIB for _, length in ranges)


def test_runs_that_follow_one_another_are_one_range() -> None:
    ranges = [*file_ranges(LAYOUTS, recorded((0, 0, 10), (0, 10, 5), (0, 20, 1)))]
    assert ranges == [(MIB, 15 * PAGE), (MIB + 20 * PAGE, PAGE)]


@pytest.mark.parametrize(
    "block",
    [
        BlockSpec("other", 64 * MIB),
        BlockSpec("pc.ram", 32 * MIB),
        BlockSpec("pc.ram", 64 * MIB, 8192),
    ],
)
def test_blocks_that_the_snapshot_has_otherwise_are_left_out(block: BlockSpec) -> None:
    other = recorded((0, 0, 10), (1, 0, 1), blocks=(block, BLOCKS[1]))
    assert [*file_ranges(LAYOUTS, other)] == [(66 * MIB, 65536)]
    external = LAYOUTS | {"vga.vram": BlockLayout("vga.vram", 16 * MIB, 65536, 0, 0, 0)}
    assert [*file_ranges(external, other)] == []


def test_what_was_recorded_comes_into_the_page_cache_and_nothing_else(cold: int) -> None:
    report = Prefetch(cold, LAYOUTS, lambda: recorded((0, 5000, 3000), (1, 16, 32))).join()
    wanted = 3000 * PAGE + 32 * 65536
    assert (report.requested, report.reason) == (wanted, None)
    for offset, length in ((MIB + 5000 * PAGE, 3000 * PAGE), (67 * MIB, 2 * MIB)):
        os.pread(cold, length, offset)  # waits for what is under way
    assert wanted <= cached_bytes(cold) <= wanted + 4 * MIB
    os.close(cold)


def test_the_descriptor_is_borrowed_for_the_call_only(cold: int) -> None:
    reading = Prefetch(cold, LAYOUTS, lambda: recorded((0, 0, 10_000)))
    os.close(cold)
    assert reading.join().requested == 10_000 * PAGE
    assert reading.done()


def test_a_cancelled_one_asks_for_no_more(cold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        asked.append(offset)
        reading.cancel()

    monkeypatch.setattr(prefetch.os, "posix_fadvise", advise)
    reading = Prefetch.__new__(Prefetch)
    reading.__init__(cold, LAYOUTS, lambda: recorded((0, 0, 16_384)))  # type: ignore[misc]
    report = reading.join()
    assert report.reason == "cancelled"
    assert len(asked) < 16
    os.close(cold)


def test_no_more_is_read_than_would_stay_in_memory(cold: int) -> None:
    report = Prefetch(cold, LAYOUTS, lambda: recorded((0, 0, 16_384)), limit=9 * MIB).join()
    assert report.requested == 8 * MIB
    assert report.reason == "the working set exceeds the limit of 9 MiB"
    os.close(cold)


def test_nothing_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Prefetch(-1, LAYOUTS, lambda: recorded((0, 0, 1))).join()
    assert report.requested == 0
    assert report.reason is not None
    reader, writer = os.pipe()
    report = Prefetch(reader, LAYOUTS, lambda: recorded((0, 0, 1))).join()
    assert report.reason is not None
    assert "Illegal seek" in report.reason
    monkeypatch.setattr(threads.threading.Thread, "start", _refuse)
    report = Prefetch(reader, LAYOUTS, lambda: recorded((0, 0, 1))).join()
    assert report.reason is not None
    assert "cannot start a thread" in report.reason
    os.close(reader)
    os.close(writer)


def _refuse(_: object) -> None:
    raise RuntimeError("can't start new thread")
