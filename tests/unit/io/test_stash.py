"""Pages that are kept in memory: exactly those that were to be copied, at their offsets."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import FileMemory, GuestMemoryError, NotSupported, UsageError
from pyqmigrate.errors import Cancelled
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.pagemap import address_of
from pyqmigrate.io.stash import Stash, StashBlock
from pyqmigrate.vm.guest.changed_pages import RestoredBlock, RestoredRam
from tests.harness.examples import few
from tests.harness.processes import PAGE, Holder

NPAGES = 5000  # several parts for the channels
PRIVATE = mmap.MAP_PRIVATE
SOME_FILE = FileId(0, 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.mapped"
    path.write_bytes(b"".join(bytes([n % 251 + 1]) * PAGE for n in range(NPAGES)))
    return path


@contextlib.contextmanager
def changed(
    base: Path, touched: Collection[int], *, scan: bool | None = None, page_size: int = PAGE
) -> Iterator[tuple[Holder, Stash]]:
    with Holder(NPAGES, touched, flags=PRIVATE, path=base) as holder:
        block = RestoredBlock("pc.ram", holder.address, holder.length, 0, page_size)
        with (
            RestoredRam(holder.pid, [block], scan=scan) as ram,
            Stash(
                [StashBlock("pc.ram", holder.memory, page_size, ram.pages_of("pc.ram"))]
            ) as stash,
        ):
            yield holder, stash


def set_pages(bitmap: Bitmap) -> list[int]:
    return [page for page in range(len(bitmap)) if bitmap[page]]


@few
@given(touched=st.sets(st.integers(0, NPAGES - 1), max_size=500), populated=st.booleans())
@pytest.mark.parametrize("scan", [None, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_changed_pages_are_copied_and_no_others(
    base: Path, scan: bool | None, channels: int, touched: set[int], populated: bool
) -> None:
    with changed(base, sorted(touched), scan=scan) as (holder, stash):
        if populated:
            assert stash.prepare(channels=channels) == len(touched) * PAGE
        assert stash.start_copy(channels=channels).wait() == len(touched) * PAGE
        assert set_pages(stash.pages["pc.ram"]) == sorted(touched)
        kept = np.frombuffer(stash.buffer("pc.ram"), dtype=np.uint8).reshape(-1, PAGE)
        content = holder.content.reshape(-1, PAGE)
        assert all((kept[page] == content[page]).all() for page in touched)
        others = np.ones(NPAGES, dtype=bool)
        others[sorted(touched)] = False
        assert not kept[others].any()
        del kept


def test_long_runs_are_copied_whole(base: Path) -> None:
    touched = [*range(10, 1800), *range(2000, 2001), *range(3000, 4999)]
    with changed(base, touched) as (holder, stash):
        stash.start_copy(channels=2).wait()
        memory = stash.memory_of("pc.ram", SOME_FILE)
        expected = np.zeros_like(holder.content).reshape(-1, PAGE)
        expected[touched] = holder.content.reshape(-1, PAGE)[touched]
        assert memory.source.read(0, holder.length) == expected.tobytes()


def test_layers_are_the_whole_memory(base: Path) -> None:
    with changed(base, [0, 7, 8, 4000]) as (holder, stash):
        stash.prepare()
        stash.start_copy().wait()
        content = base.read_bytes()
        from pyqmigrate.io.layered import buffer_memory

        lower = buffer_memory(content, SOME_FILE)
        assert stash.over("pc.ram", lower).source.read(0, holder.length) == holder.content.tobytes()


def test_pages_of_another_size_are_copied_whole(base: Path) -> None:
    with changed(base, [3, 40], page_size=8192) as (holder, stash):
        stash.start_copy().wait()
        assert set_pages(stash.pages["pc.ram"]) == [1, 20]
        start = 2 * PAGE
        kept = bytes(stash.buffer("pc.ram")[start : start + 2 * PAGE])
        assert kept == holder.content[start : start + 2 * PAGE].tobytes()


def test_given_pages_of_a_file_are_copied_and_its_holes_stay_zero(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    with path.open("w+b") as file:
        file.truncate(64 * PAGE)
        os.pwrite(file.fileno(), b"x" * PAGE, 5 * PAGE)
        os.pwrite(file.fileno(), b"y" * PAGE, 9 * PAGE)
        pages = Bitmap(64)
        pages.fill(memoryview(b"\xff\x01" + bytes(6)))
        with Stash([StashBlock("m", FileMemory(file.fileno()), PAGE, pages=pages)]) as stash:
            assert stash.prepare() == 9 * PAGE
            stash.start_copy().wait()
            expected = bytearray(64 * PAGE)
            expected[5 * PAGE : 6 * PAGE] = b"x" * PAGE
            assert bytes(stash.buffer("m")) == expected


def test_more_than_there_is_room_for_takes_no_memory(base: Path) -> None:
    with changed(base, range(1000)) as (_, stash):
        with pytest.raises(NotSupported, match="3 MiB have changed, and 2 MiB"):
            stash.prepare(room=999 * PAGE - (1 << 20))
        assert resident(stash.buffer("pc.ram")) == 0
        assert stash.prepare(room=1000 * PAGE) == 1000 * PAGE
        assert resident(stash.buffer("pc.ram")) == 1000 * PAGE


def resident(memory: mmap.mmap) -> int:
    """Return the bytes of a mapping that are in memory."""
    pages = (ctypes.c_ubyte * (len(memory) // PAGE))()
    address = ctypes.c_void_p(address_of(memory))
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(memory)), pages) == 0
    return sum(state & 1 for state in pages) * PAGE


def test_block_without_a_selection_is_copied_whole(tmp_path: Path) -> None:
    with Holder(3000, [0, 1, 2999], flags=PRIVATE) as holder:
        with Stash([StashBlock("vga", holder.memory)]) as stash:
            assert stash.start_copy().wait() == holder.length
            assert bytes(stash.buffer("vga")) == holder.content.tobytes()
            assert stash.pages["vga"].count() == 3000
        assert holder.present().sum() < 600, "pages that were never touched have come into being"


def test_process_that_ends_is_noticed(base: Path) -> None:
    with changed(base, [5, 6]) as (holder, stash):
        stash.prepare()
        holder.end()
        with pytest.raises(GuestMemoryError):
            stash.start_copy().wait()


def test_memory_that_ends_is_noticed(tmp_path: Path) -> None:
    with (tmp_path / "m").open("w+b") as file:
        file.truncate(64 * PAGE)
        with Stash([StashBlock("m", FileMemory(file.fileno()))]) as stash:
            file.truncate(10 * PAGE)
            with pytest.raises(GuestMemoryError):
                stash.start_copy().wait()


def test_copy_can_be_cancelled(base: Path) -> None:
    with changed(base, range(NPAGES)) as (_, stash):
        job = stash.start_copy()
        job.cancel()
        with contextlib.suppress(Cancelled):  # it may have been too late
            assert job.result() == NPAGES * PAGE


def test_memory_here_cannot_be_a_mapping_of_another_process(base: Path) -> None:
    with Holder(64, [1], flags=PRIVATE, path=base) as holder:
        block = RestoredBlock("pc.ram", holder.address, holder.length, 0)
        with RestoredRam(holder.pid, [block]) as ram:
            with pytest.raises(UsageError, match="another process"):
                Stash([StashBlock("pc.ram", bytearray(64 * PAGE), changed=ram.pages_of("pc.ram"))])
            with pytest.raises(UsageError, match="unknown block"):
                ram.pages_of("vga")
