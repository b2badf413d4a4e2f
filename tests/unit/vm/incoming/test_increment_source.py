"""Increments as the source of a restore: which file is mapped, what QEMU loads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import TouchedRun, WorkingSet
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.working_set_file import working_set_path, write_working_set
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.incoming.increment_stream import IncrementStream
from pyqmigrate.vm.incoming.source import RestoreSource, map_source
from pyqmigrate.vm.qemu.command_line import CommandLine
from tests.harness.increment_files import save_base, save_increment

PAGE = 4096
NPAGES = 256


def memory(*pages: int, value: int = 1) -> np.ndarray:
    content = np.zeros((NPAGES, PAGE), dtype=np.uint8)
    content[list(pages)] = value
    return content


@pytest.fixture
def saved(disk: Path) -> Path:
    """An increment in which page 1 changed and page 2 became zero."""
    base, path = disk / "base", disk / "increment"
    save_base(base, {"pc.ram": memory(0, 1, 2), "vga.vram": memory(7)})
    changed = np.zeros(NPAGES, dtype=bool)
    changed[[1, 2]] = True
    now = memory(0, 1)
    now[1] = 9
    save_increment(path, base, {"pc.ram": now, "vga.vram": memory(3)}, {"pc.ram": changed})
    return path


def test_memory_is_mapped_from_the_base(saved: Path) -> None:
    source = RestoreSource(saved, None)
    try:
        assert source.increment is not None
        assert source.mapped.source.place == saved.with_name("base")
        command = CommandLine.parse(["qemu-system-x86_64", "-M", "q35", "-m", "1"])
        mapped = map_source(command, source)
        assert mapped.blocks == ["pc.ram"]
        assert f"/proc/self/fd/{source.mapped_fd}" in str(mapped.command.all("object")[-1])
    finally:
        source.close()


def test_block_that_needs_the_base_must_be_mapped(saved: Path) -> None:
    source = RestoreSource(saved, None)
    try:
        backend = "memory-backend-ram,id=vga.vram,size=1M"
        command = CommandLine.parse(
            ["qemu", "-M", "q35,memory-backend=vga.vram", "-object", backend]
        )
        with pytest.raises(NotSupported, match=r"only the changed pages of block 'pc\.ram'"):
            map_source(command, source)
    finally:
        source.close()


def test_block_saved_whole_has_the_pages_of_both(saved: Path) -> None:
    source = RestoreSource(saved, None)
    try:
        bitmap = source.snapshot.blocks["vga.vram"].bitmap
        assert [page for page in range(NPAGES) if bitmap[page]] == [3, 7]
    finally:
        source.close()


def test_increment_itself_is_loaded(saved: Path) -> None:
    source = RestoreSource(saved, None)
    assert source.increment is not None
    stream = IncrementStream(source.increment, ["pc.ram"])
    try:
        stream.build()
        assert stream.stale_pages == 0
        fd = stream.open_for_reading()
        assert os.path.samestat(os.fstat(fd), saved.stat())
        os.close(fd)
    finally:
        stream.close()
        source.close()


@pytest.mark.parametrize("page, count", [(100, 1), (1, 0), (0, 0)])
def test_stale_page_of_the_base_is_loaded_as_zeros(saved: Path, page: int, count: int) -> None:
    base = saved.with_name("base")
    times = base.stat()
    with MappedRamSnapshot(StreamFile.open(base)) as snapshot:
        offset = snapshot.blocks["pc.ram"].pages_offset + page * PAGE
    with base.open("r+b") as file:
        os.pwrite(file.fileno(), b"old", offset)
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    source = RestoreSource(saved, None)
    assert source.increment is not None
    stream = IncrementStream(source.increment, ["pc.ram"])
    try:
        stream.build()
        assert stream.stale_pages == count
        if count:
            copy = MappedRamSnapshot(
                StreamFile.open(f"/proc/self/fd/{stream.fd}", offset=source.snapshot.offset)
            )
            with copy:
                block = copy.blocks["pc.ram"]
                assert [n for n in range(NPAGES) if block.bitmap[n]] == [1, 2, page]
                assert block.read(PAGE, PAGE) == bytes([9]) * PAGE
                assert block.read(page * PAGE, PAGE) == bytes(PAGE)
    finally:
        stream.close()
        source.close()


def test_base_of_a_whole_snapshot_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="not an increment"):
        RestoreSource(saved.with_name("base"), None, saved)


def test_missing_base_is_named(saved: Path) -> None:
    elsewhere = saved.with_name("elsewhere")
    saved.with_name("base").rename(elsewhere)
    with pytest.raises(TargetError, match="base"):
        RestoreSource(saved, None)
    RestoreSource(saved, None, elsewhere).close()


def test_recorded_working_set_is_read_from_the_base(saved: Path) -> None:
    source = RestoreSource(saved, None)
    try:
        assert source.prefetch() is None
        runs = WorkingSet([TouchedRun(0, 0, 8)])
        specs = [BlockSpec("pc.ram", NPAGES * PAGE)]
        write_working_set(
            working_set_path(saved), source.identify(), specs, runs, seconds=1, sync_name=False
        )
        prefetch = source.prefetch()
        assert prefetch is not None
        assert prefetch is source.prefetch()
        state = prefetch.join()
        assert (state.recorded_pages, state.requested, state.reason) == (8, 8 * PAGE, None)
    finally:
        source.close()


def test_working_set_of_other_content_is_not_used(saved: Path) -> None:
    source = RestoreSource(saved, None)
    try:
        runs = WorkingSet([TouchedRun(0, 0, 8)])
        specs = [BlockSpec("pc.ram", NPAGES * PAGE)]
        write_working_set(
            working_set_path(saved), SnapshotId(1, 2), specs, runs, seconds=1, sync_name=False
        )
        prefetch = source.prefetch()
        assert prefetch is not None
        state = prefetch.join()
        assert state.requested == 0
        assert state.reason is not None
        assert "not of this snapshot" in state.reason
    finally:
        source.close()
