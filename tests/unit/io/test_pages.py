"""The loop that moves pages, between memory and a file."""

from __future__ import annotations

import errno
import os

import pytest

from pyqmigrate.core import CHUNK, File, Policy
from pyqmigrate.errors import Cancelled, TargetError
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range
from pyqmigrate.io.memory import OpenMemory
from pyqmigrate.io.pages import BlockPages, count_pages, ranges_of, read_pages, write_pages

PAGE = 4096
PLACES = (1 << 20, 2 << 20)  # of the pages of two blocks


def block(number: int, memory: bytearray, selection: Bitmap | None = None) -> BlockPages:
    name, place = f"block {number}", PLACES[number]
    layout = BlockLayout(name, len(memory), PAGE, place - 4128, place - 4096, place)
    bitmap = Bitmap(len(memory) // PAGE)
    return BlockPages(layout, bitmap, OpenMemory(name, memory, writable=True), selection)


def page(fill: int) -> bytes:
    return bytes([fill]) * PAGE


def set_pages(bitmap: Bitmap) -> list[int]:
    return [number for number in range(bitmap.npages) if bitmap[number]]


def select(npages: int, *pages: int) -> Bitmap:
    bitmap = Bitmap(npages)
    for number in pages:
        bitmap.core[number // 64] |= 1 << number % 64
    return bitmap


@pytest.fixture(params=[1, 3])
def channels(request: pytest.FixtureRequest) -> Channels:
    return Channels(request.param, "test")


def test_written_pages_are_read_back(fd: int, channels: Channels) -> None:
    first, second = page(1) + page(0) + page(2), page(0) + page(3)
    written = [block(0, bytearray(first)), block(1, bytearray(second))]
    write_pages(written, File(fd), Policy(), channels, "file")
    assert [set_pages(item.data) for item in written] == [[0, 2], [1]]
    assert os.pread(fd, len(first), PLACES[0]) == first
    memories = [bytearray(len(first)), bytearray(len(second))]
    loaded = [
        BlockPages(item.layout, item.data, OpenMemory("memory", memory, writable=True))
        for item, memory in zip(written, memories, strict=True)
    ]
    read_pages(loaded, File(fd), Policy(), Channels(2, "test"), "file", ranges_of(loaded))
    assert memories == [first, second]


def test_only_selected_pages_are_written(fd: int, channels: Channels) -> None:
    pages = block(0, bytearray(page(1) * 4), select(4, 1, 3))
    write_pages([pages], File(fd), Policy(), channels, "file")
    assert set_pages(pages.data) == [1, 3]
    assert os.pread(fd, 4 * PAGE, PLACES[0]) == page(0) + page(1) + page(0) + page(1)


def test_counting_needs_no_file(channels: Channels) -> None:
    pages = block(0, bytearray(page(0) + page(7) + page(0) + page(7)))
    count_pages([pages], channels, "nothing")
    assert set_pages(pages.data) == [1, 3]
    totals = channels.totals()
    assert (totals.data_pages, totals.zero_pages, totals.bytes_moved) == (2, 2, 0)


def test_counting_stays_within_its_ranges(channels: Channels) -> None:
    pages = block(0, bytearray(page(7) * (2 * CHUNK // PAGE)))
    count_pages([pages], channels, "nothing", [Range(0, CHUNK // PAGE, 2)])
    assert set_pages(pages.data) == [CHUNK // PAGE, CHUNK // PAGE + 1]


def test_failure_names_the_block_and_the_file(channels: Channels) -> None:
    with open(os.devnull, "rb") as file, pytest.raises(TargetError, match="'block 1'") as caught:
        write_pages(
            [block(0, bytearray(PAGE)), block(1, bytearray(page(1)))],
            File(file.fileno()),
            Policy(),
            channels,
            "the file",
        )
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, "the file")


def test_cancelled_channels_move_nothing(fd: int, channels: Channels) -> None:
    channels.cancel()
    with pytest.raises(Cancelled):
        write_pages([block(0, bytearray(page(1)))], File(fd), Policy(), channels, "file")
    assert os.pread(fd, PAGE, PLACES[0]) == bytes(PAGE)
