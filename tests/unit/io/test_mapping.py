"""A mapping that is closed while a traceback still has a view of it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from pyqmigrate import FileMemory, NoSpace, RamBlock, open_snapshot, save
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.memory import OpenMemory

PAGE = 4096
FAR = 160 << 20  # bytes: its bitmap has a second page


class Full:
    """A file on a disk that is full."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        raise NoSpace("cannot write", position=offset)


def test_a_mapping_with_views_is_closed_without_an_error() -> None:
    memory = mmap.mmap(-1, PAGE)
    view = memoryview(memory)[:10]
    unmap(memory)
    assert bytes(view) == bytes(10)
    view.release()
    unmap(memory)
    unmap(memory)
    assert memory.closed


@pytest.mark.parametrize("everything", [True, False])
def test_a_bitmap_is_closed_after_its_writing_failed(everything: bool) -> None:
    bitmap = Bitmap(64)
    bitmap.core[0] = 1
    with pytest.raises(NoSpace) as caught:
        try:
            bitmap.write_to(Full(), 0, everything=everything)
        finally:
            bitmap.close()
    assert caught.value.errno == errno.ENOSPC
    bitmap.close()


def test_attached_memory_is_closed_while_it_is_looked_at() -> None:
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.truncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # only then is it mapped
    attached = OpenMemory("ram", FileMemory(fd), writable=False)
    assert attached._mapping is not None
    view = memoryview(attached._mapping)
    attached.close()
    os.close(fd)
    assert view[0] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_write_that_is_refused_is_the_error_of_the_save(
    number: int, disk: Path, monkeypatch: pytest.MonkeyPatch, same_descriptors: None
) -> None:
    """The bitmap's writes among them, whose views are in the traceback."""
    ram = disk / "ram"
    with ram.open("wb") as file:
        file.write(b"\1" * PAGE)
        file.seek(150 << 20)
        file.write(b"\2" * PAGE)
        file.truncate(FAR)
    wrote = 0
    pwrite = os.pwrite

    def refuse(fd: int, data: bytes, at: int) -> int:
        nonlocal left, wrote
        wrote += 1
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number))
        return pwrite(fd, data, at)

    call = 0
    while True:
        left = call
        before = wrote
        with ram.open("rb") as file, monkeypatch.context() as patch:
            patch.setattr("pyqmigrate.io.output.os.pwrite", refuse)
            try:
                save(disk / "snap", [RamBlock("ram", FileMemory(file.fileno()))], sparse="exact")
            except OSError as error:
                assert isinstance(error, NoSpace) == (number != errno.EIO)
                assert error.errno == number
                assert [path.name for path in disk.iterdir()] == ["ram"]
            else:
                break
        assert wrote == before + call + 1
        call += 1
    assert call >= 5  # head, two pages of the bitmap, tail, magic
    with open_snapshot(disk / "snap") as snapshot:
        assert snapshot.blocks["ram"].data_pages == 2
