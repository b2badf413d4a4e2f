"""What a map says of a snapshot, of every kind."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate import Cancelled, FileMemory, NotSupported, RamBlock, SnapshotError, UsageError
from pyqmigrate.analysis import By, Extent, MemoryMap, memory_map
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import TouchedRun, WorkingSet
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.page_map import Counts
from pyqmigrate.io.working_set_file import working_set_path, write_working_set
from pyqmigrate.snapshot.save.sequential import SequentialWriter
from pyqmigrate.snapshot.save.writer import SaveOptions
from tests.harness.increment_files import MACHINE, save_base, save_increment
from tests.harness.snapshots import Bytes
from tests.harness.views import Views, make_store

PAGE = 4096


@pytest.fixture
def memory() -> Bytes:
    """64 pages: 8 random, 8 of two values, 8 filled, then zeros."""
    rng = np.random.default_rng(1)
    pages = np.zeros((64, PAGE), dtype=np.uint8)
    pages[:8] = rng.integers(0, 256, (8, PAGE))
    pages[8:16] = rng.integers(0, 2, (8, PAGE))
    pages[16:24] = 0xAA
    return pages.reshape(-1)


def sequential(path: Path, memory: Bytes) -> Path:
    SequentialWriter(str(path), [RamBlock("ram", memory)], SaveOptions(machine=MACHINE)).run(
        b"", None
    )
    return path


def mapped(path: Path, memory: Bytes) -> Path:
    save_base(path, {"ram": memory})
    return path


def compressed(path: Path, memory: Bytes) -> Path:
    sequential(path, memory)
    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def compact(path: Path, memory: Bytes) -> Path:
    mapped(path.with_name("whole"), memory)
    pyqmigrate.compact(path.with_name("whole"), path)
    return path


def increment(path: Path, memory: Bytes) -> Path:
    base = path.with_name("base")
    save_base(base, {"ram": np.where(np.arange(len(memory)) < PAGE, 1, memory).astype(np.uint8)})
    bits = np.arange(len(memory) // PAGE) < 1
    save_increment(path, base, {"ram": memory}, {"ram": bits}, direct_io=DirectIO.OFF, channels=1)
    return path


def kinds(found: MemoryMap) -> list[str]:
    names = []
    for area in found.areas:
        for number in range(len(area)):
            cell = area.cell(number)
            shares = {"data": cell.data, "filled": cell.filled, "zero": cell.zero}
            names.append(next((name for name, share in shares.items() if share), "hole"))
    return names


EXPECTED = ["data"] * 16 + ["filled"] * 8 + ["hole"] * 40


@pytest.mark.parametrize("make", [mapped, sequential, compressed, compact, increment])
def test_every_kind_of_snapshot_has_the_map_of_its_memory(
    make: Callable[[Path, Bytes], Path], tmp_path: Path, memory: Bytes
) -> None:
    found = memory_map(make(tmp_path / "guest", memory), by="block", cells=64)
    assert kinds(found) == EXPECTED
    assert found.cell_size == PAGE
    assert found.pages.all == 64
    assert (found.pages.data, found.pages.filled) == (16, 8)
    assert found.areas[0].cell(0).entropy > 7.5
    assert 0.9 < found.areas[0].cell(8).entropy < 1.1
    assert sum(found.levels[15:]) == 8


def test_a_snapshot_of_a_store_has_the_map_of_its_file(
    tmp_path: Path, memory: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shown").mkdir()
    path = mapped(tmp_path / "shown" / "monday", memory)
    Views(path.parent).install(monkeypatch)
    stored = f"{make_store(tmp_path / 'store')}#monday"
    found = memory_map(stored, by="block", cells=64)
    assert found.snapshot == stored
    assert kinds(found) == EXPECTED


def test_cells_have_the_shares_of_their_pages(tmp_path: Path, memory: Bytes) -> None:
    found = memory_map(mapped(tmp_path / "guest", memory), by="block", cells=4)
    assert found.cell_size == 16 * PAGE
    first, second, third, _ = (found.areas[0].cell(number) for number in range(4))
    assert first.data == 1
    assert second.filled == pytest.approx(0.5, abs=0.01)
    assert (third.data, third.filled, third.zero, third.mapped) == (0, 0, 0, True)
    with pytest.raises(IndexError):
        found.areas[0].cell(4)


def test_stored_zeros_are_not_holes(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    pyqmigrate.save(path, [RamBlock("ram", bytearray(8 * PAGE))], sparse="dense")
    with pyqmigrate.open_snapshot(path) as snapshot:
        stored = snapshot.blocks["ram"].data_pages
    found = memory_map(path)
    assert (found.pages.zero, found.pages.hole) == (stored, 8 - stored)


@pytest.mark.parametrize("make", [mapped, sequential])
def test_changed_pages_are_those_that_differ_from_the_other(
    make: Callable[[Path, Bytes], Path], tmp_path: Path, memory: Bytes
) -> None:
    other = memory.copy()
    other[3 * PAGE] ^= 1
    other[60 * PAGE + 7] = 9
    a, b = make(tmp_path / "a", memory), mapped(tmp_path / "b", other)
    found = memory_map(a, b, by="block", cells=64)
    assert [n for n in range(64) if found.areas[0].cell(n).changed] == [3, 60]
    assert found.pages.changed == 2
    assert found.against == str(b)


def test_pages_that_the_other_does_not_have_are_changed(tmp_path: Path, memory: Bytes) -> None:
    a, b = mapped(tmp_path / "a", memory), mapped(tmp_path / "b", memory[: 60 * PAGE])
    found = memory_map(a, b, by="block", cells=64)
    assert [n for n in range(64) if found.areas[0].cell(n).changed] == [60, 61, 62, 63]


def test_a_block_that_the_other_does_not_have_is_a_note(tmp_path: Path, memory: Bytes) -> None:
    a = tmp_path / "a"
    save_base(a, {"ram": memory, "vga.vram": memory})
    found = memory_map(a, mapped(tmp_path / "b", memory), by="block")
    assert found.pages.changed == 0
    assert any("vga.vram" in note for note in found.notes)


def test_of_an_increment_the_pages_that_it_has_are_changed(tmp_path: Path, memory: Bytes) -> None:
    found = memory_map(increment(tmp_path / "guest", memory), by="block", cells=64)
    assert [n for n in range(64) if found.areas[0].cell(n).changed] == [0]
    assert found.against == str(tmp_path / "base")


def test_with_equal_seals_nothing_is_compared(tmp_path: Path, memory: Bytes) -> None:
    a, b = mapped(tmp_path / "a", memory), mapped(tmp_path / "b", memory)
    pyqmigrate.seal(a)
    pyqmigrate.seal(b)
    times = b.stat().st_mtime_ns
    with b.open("r+b") as file:  # what a comparison would find
        file.seek(pages_offset(b))
        file.write(b"other")
    os.utime(b, ns=(times, times))
    assert memory_map(a, b).pages.changed == 0
    assert memory_map(a, b, seals=False).pages.changed == 1


def pages_offset(path: Path) -> int:
    with pyqmigrate.open_snapshot(path) as snapshot:
        layout = snapshot.blocks["ram"].layout
        assert layout is not None
        return layout.pages_offset


def record(path: Path, npages: int, runs: list[TouchedRun]) -> None:
    with pyqmigrate.open_snapshot(path) as snapshot:
        identity = identify_snapshot(path, snapshot.source.fd)
    specs = [BlockSpec("ram", npages * PAGE)]
    place = working_set_path(path)
    write_working_set(place, identity, specs, WorkingSet(runs), seconds=1, sync_name=False)


def test_touched_pages_are_those_of_the_working_set(tmp_path: Path, memory: Bytes) -> None:
    path = mapped(tmp_path / "guest", memory)
    record(path, 64, [TouchedRun(0, 5, 3), TouchedRun(0, 6, 4)])
    found = memory_map(path, by="block", cells=64)
    assert [n for n in range(64) if found.areas[0].cell(n).touched] == [5, 6, 7, 8, 9]
    assert found.working_set
    assert not memory_map(path, working_set=False).working_set


def test_a_working_set_of_another_snapshot_is_a_note(tmp_path: Path, memory: Bytes) -> None:
    path = mapped(tmp_path / "guest", memory)
    record(path, 64, [TouchedRun(0, 5, 3)])
    os.utime(path, ns=(1, 1))
    found = memory_map(path)
    assert not found.working_set
    assert found.pages.touched == 0
    assert any("working set" in note for note in found.notes)


def test_an_extent_of_a_block_is_whole_pages_of_it(tmp_path: Path, memory: Bytes) -> None:
    path = mapped(tmp_path / "guest", memory)
    found = memory_map(path, extent=Extent(15 * PAGE + 1, 17 * PAGE, "ram"))
    assert kinds(found) == ["data", "filled"]
    assert (found.areas[0].area.start, found.length) == (15 * PAGE, 2 * PAGE)


@pytest.mark.parametrize(
    "extent", [Extent(1 << 40, 2 << 40, "ram"), Extent(0, PAGE, "nothing")], ids=["far", "unknown"]
)
def test_an_extent_without_memory_is_refused(extent: Extent, tmp_path: Path, memory: Bytes) -> None:
    with pytest.raises(UsageError, match="no memory is at"):
        memory_map(mapped(tmp_path / "guest", memory), extent=extent)


def test_unknown_addresses_are_a_note_or_refused(tmp_path: Path, memory: Bytes) -> None:
    path = tmp_path / "guest"
    pyqmigrate.save(path, [RamBlock("ram", memory)])
    found = memory_map(path)
    assert found.by is By.BLOCK
    assert any("addresses" in note for note in found.notes)
    with pytest.raises(NotSupported, match="--by block"):
        memory_map(path, by="address")


def test_a_sparse_guest_of_a_tebibyte_takes_the_time_of_its_data(tmp_path: Path) -> None:
    fd = os.memfd_create("memory")
    os.truncate(fd, 1 << 40)
    os.pwrite(fd, bytes(range(256)) * 16, 700 << 30)
    path = tmp_path / "guest"
    try:
        pyqmigrate.save(path, [RamBlock("ram", FileMemory(fd))])
    finally:
        os.close(fd)
    found = memory_map(path, cells=1024)
    assert found.pages.all == 1 << 28
    assert [n for n in range(1024) if found.areas[0].cell(n).data] == [700]
    assert found.bytes_read < 1 << 20


def test_an_open_snapshot_stays_open(tmp_path: Path, memory: Bytes) -> None:
    with pyqmigrate.open_snapshot(mapped(tmp_path / "guest", memory)) as snapshot:
        assert memory_map(snapshot, snapshot).pages.changed == 0
        assert snapshot.blocks["ram"].read(0, 4) == memory[:4].tobytes()


def test_a_truncated_file_is_named(tmp_path: Path, memory: Bytes) -> None:
    path = mapped(tmp_path / "guest", memory)
    with pyqmigrate.open_snapshot(path) as snapshot:
        os.truncate(path, pages_offset(path) + PAGE)
        with pytest.raises(SnapshotError) as caught:
            memory_map(snapshot, by="block")
    assert str(path) in str(caught.value.__notes__)


def test_an_exception_of_progress_ends_the_scan(tmp_path: Path, memory: Bytes) -> None:
    def stop(_: object) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        memory_map(mapped(tmp_path / "guest", memory), progress=stop)


@pytest.mark.parametrize(
    "options",
    [{"cells": 0}, {"cells": 1 << 22}, {"by": "name"}, {"extent": "0-1"}, {"channels": 0}],
    ids=str,
)
def test_bad_arguments_are_refused(
    options: dict[str, object], tmp_path: Path, memory: Bytes
) -> None:
    with pytest.raises(UsageError):
        memory_map(mapped(tmp_path / "guest", memory), **options)  # type: ignore[arg-type]


def test_counts_are_added() -> None:
    assert Counts(1, 2, 3, 4, 5, 6) + Counts(1, 1, 1, 1, 1, 1) == Counts(2, 3, 4, 5, 6, 7)
