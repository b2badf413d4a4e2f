"""A pass of digests over guest memory, and one that finds what changed since."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import Cancelled, GuestMemoryError, UsageError
from pyqmigrate.io import page_digests
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Range, split_ranges
from pyqmigrate.io.memory import FileMemory, RamBlock
from pyqmigrate.io.page_digests import DigestTable, PageDigests
from tests.harness.examples import some
from tests.harness.processes import Holder

PAGE = 4096
NPAGES = (40 << 20) // PAGE  # more than one range of a channel
SMALL = 9


@pytest.fixture
def memories() -> Iterator[tuple[bytearray, bytearray]]:
    yield bytearray(NPAGES * PAGE), bytearray(os.urandom(SMALL * PAGE))


def blocks_of(memories: tuple[bytearray, bytearray]) -> list[RamBlock]:
    return [RamBlock("pc.ram", memories[0]), RamBlock("vga.vram", memories[1])]


def bitmaps(digests: PageDigests) -> dict[str, Bitmap]:
    return {name: Bitmap(table.npages) for name, table in digests.tables.items()}


def pages_of(bitmap: Bitmap) -> list[int]:
    return [page for page in range(bitmap.npages) if bitmap[page]]


def test_changed_pages_are_found_once(memories: tuple[bytearray, bytearray]) -> None:
    with PageDigests(blocks_of(memories)) as digests:
        report = digests.start_compute(channels=2).wait()
        assert (report.pages, report.zero_pages) == (NPAGES + SMALL, NPAGES)
        memories[0][5 * PAGE + 7] = 1
        memories[0][NPAGES * PAGE - 1] = 1
        memories[1][8 * PAGE] ^= 1
        changed = bitmaps(digests)
        report = digests.start_compare(changed, channels=2).wait()
        assert report.changed_pages == 3
        assert pages_of(changed["pc.ram"]) == [5, NPAGES - 1]
        assert pages_of(changed["vga.vram"]) == [8]
        assert digests.start_compare(bitmaps(digests)).wait().changed_pages == 0


def test_without_update_the_table_stays(memories: tuple[bytearray, bytearray]) -> None:
    with PageDigests(blocks_of(memories)) as digests:
        digests.start_compute().wait()
        memories[0][0] = 1
        for _ in range(2):
            changed = bitmaps(digests)
            assert digests.start_compare(changed, update=False).wait().changed_pages == 1
        digests.tables["pc.ram"].enter(0, bytes(memories[0][:PAGE]), PAGE)
        assert digests.start_compare(bitmaps(digests)).wait().changed_pages == 0


def test_only_selected_pages_of_selected_blocks_are_read(
    memories: tuple[bytearray, bytearray],
) -> None:
    with PageDigests(blocks_of(memories)) as digests:
        selection = {"pc.ram": Bitmap(NPAGES)}
        selection["pc.ram"].fill(memoryview(bytes([0b101]).ljust(NPAGES // 8, b"\0")))
        report = digests.start_compute(selection=selection).wait()
        assert report.pages == 2
        zero = xxhash.xxh3_128_digest(bytes(PAGE))
        table = digests.tables["pc.ram"]
        assert [table[page] for page in range(4)] == [zero, bytes(16), zero, bytes(16)]
        assert digests.tables["vga.vram"][0] == bytes(16)


def test_tables_outlive_the_memory(memories: tuple[bytearray, bytearray]) -> None:
    with PageDigests(blocks_of(memories)) as first:
        first.start_compute().wait()
    with PageDigests(blocks_of(memories), first.tables) as second:
        assert second.start_compare(bitmaps(second)).wait().changed_pages == 0


def test_another_process_and_a_file_are_digested(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(64 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    with Holder(64, [3, 7], flags=mmap.MAP_PRIVATE, path=path) as holder:
        blocks = [RamBlock("a", FileMemory(fd)), RamBlock("b", holder.memory)]
        with PageDigests(blocks) as digests:
            digests.start_compute().wait()
            entries = [digests.tables[name] for name in "ab"]
            differ = [page for page in range(64) if entries[0][page] != entries[1][page]]
            assert differ == [3, 7]
            holder.end()
            with pytest.raises(GuestMemoryError, match="block 'b'"):
                digests.start_compute().wait()
    os.close(fd)


def test_a_cancelled_pass_ends(
    memories: tuple[bytearray, bytearray], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = threading.Event()

    def ranges(block: int, npages: int, page_size: int) -> Iterator[Range]:
        assert cancelled.wait(60)
        return split_ranges(block, npages, page_size)

    monkeypatch.setattr(page_digests, "split_ranges", ranges)
    with PageDigests(blocks_of(memories)) as digests:
        job = digests.start_compute(channels=1)
        job.cancel()
        cancelled.set()
        with pytest.raises(Cancelled):
            job.result()
        assert job.progress.bytes_done == 0


@pytest.mark.parametrize("npages", [1, SMALL + 1])
def test_a_table_or_bitmap_of_another_size_is_refused(
    memories: tuple[bytearray, bytearray], npages: int
) -> None:
    blocks = blocks_of(memories)[1:]
    with pytest.raises(UsageError, match=f"digests of block 'vga.vram' are of {npages} pages"):
        PageDigests(blocks, {"vga.vram": DigestTable(npages)})
    with PageDigests(blocks) as digests:
        with pytest.raises(UsageError, match="a bitmap of block"):
            digests.start_compare({"vga.vram": Bitmap(npages)})
        with pytest.raises(UsageError, match=r"bitmap for .* block .* is missing"):
            digests.start_compare({})
        with pytest.raises(UsageError, match="unknown block 'other'"):
            digests.start_compute(selection={"other": Bitmap(1)})


@some
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 99))
def test_what_is_entered_is_what_the_library_says(first: int, npages: int, seed: int) -> None:
    table, content = DigestTable(12), np.random.default_rng(seed).bytes(npages * PAGE)
    if first + npages > 12:
        with pytest.raises(UsageError, match="not whole pages"):
            table.enter(first, content, PAGE)
        return
    table.enter(first, content, PAGE)
    twin = [bytes(16)] * 12
    for page in range(npages):
        data = content[page * PAGE : (page + 1) * PAGE]
        twin[first + page] = xxhash.xxh3_128_digest(data)
    assert [table[page] for page in range(12)] == twin
    assert b"".join(table.pieces()) == b"".join(twin)
    copy = DigestTable(12)
    copy.put(0, b"".join(twin[:5]))
    copy.put(5 * 16, b"".join(twin[5:]))
    with pytest.raises(UsageError, match="no room"):
        copy.put(5 * 16, b"".join(twin))
    assert [copy[page] for page in range(12)] == twin
    copy.forget(first, npages)
    assert all(copy[page] == bytes(16) for page in range(first, first + npages))
    table.close()
    table.close()
