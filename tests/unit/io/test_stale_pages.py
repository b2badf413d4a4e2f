"""Old bytes where a file has no page."""

from __future__ import annotations

import os

from pyqmigrate.core import File
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range
from pyqmigrate.io.stale_pages import StoredPages, find_stale, punch_stale, punch_stale_in_turn

PAGE = 4096
PLACE = 1 << 20
OLD = bytes([9]) * PAGE


def test_stale_pages_are_found_and_punched(fd: int) -> None:
    channels = Channels(2, "stale")
    layout = BlockLayout("block", 4 * PAGE, PAGE, PLACE - 4128, PLACE - 4096, PLACE)
    pages, stale = StoredPages(layout, Bitmap(4)), Bitmap(4)
    os.pwrite(fd, OLD, PLACE + PAGE)
    find_stale(pages, stale, File(fd), channels)
    assert [number for number in range(4) if stale[number]] == [1]
    punch_stale(pages, File(fd), channels)
    assert os.pread(fd, 4 * PAGE, PLACE) == bytes(4 * PAGE)
    os.pwrite(fd, OLD, PLACE + 2 * PAGE)
    found = list(punch_stale_in_turn(pages, File(fd), channels, "file"))
    assert found == [(Range(0, 0, 4), 1)]
    assert os.pread(fd, 4 * PAGE, PLACE) == bytes(4 * PAGE)
