"""The small stream for a QEMU whose memory is mapped from the snapshot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate.errors import Cancelled
from pyqmigrate.vm.incoming.companion import IncomingStream
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some
from tests.harness.snapshots import Bytes, data_bytes, ram

PAGE = 4096
PAGES = 1100  # of the big block: more than one chunk, and no whole number of them


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with directory_on_disk() as found:
        yield found


@dataclass
class Made:
    """A snapshot with blocks ``big`` and ``small``, and the companion that maps ``mapped``."""

    path: Path
    offset: int
    big: Bytes
    small: Bytes

    def dirty(self, pages: list[int]) -> list[int]:
        """Puts old bytes under the clear bits among ``pages``; returns which had one."""
        with pyqmigrate.MappedRamSnapshot(self.path, offset=self.offset) as snapshot:
            block = snapshot.blocks["big"]
            clear = [page for page in pages if not block.bitmap[page]]
            with self.path.open("r+b") as file:
                for page in clear:
                    file.seek(block.pages_offset + page * PAGE + page % PAGE)
                    file.write(b"\1")
        return clear

    def companion(self, *mapped: str) -> IncomingStream:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            with pyqmigrate.MappedRamSnapshot(self.path, offset=self.offset) as snapshot:
                made = IncomingStream(snapshot, fd, mapped)
                made.build()
                return made
        finally:
            os.close(fd)

    def bits(self, made: IncomingStream, name: str) -> list[int]:
        """The pages whose bits are set in the companion."""
        target = pyqmigrate.Descriptors(made.fd, offset=self.offset)
        with pyqmigrate.MappedRamSnapshot(target) as snapshot:
            bitmap = snapshot.blocks[name].bitmap
            return [page for page in range(len(bitmap)) if bitmap[page]]


def make(directory: Path, *, offset: int = 0, density: float = 0.5) -> Made:
    path = directory / "guest.mapped"
    path.unlink(missing_ok=True)
    big, small = ram(PAGES, density=density), ram(20, seed=1)
    pyqmigrate.save(
        f"file:{path},offset={offset}",
        [pyqmigrate.RamBlock("big", big), pyqmigrate.RamBlock("small", small)],
        machine="pc-q35-10.0",
    )
    return Made(path, offset, big, small)


@pytest.mark.parametrize("offset", [0, 5000, 1 << 20])
def test_companion_is_a_whole_stream_at_the_same_place(directory: Path, offset: int) -> None:
    made = make(directory, offset=offset)
    companion = made.companion("big")
    with (
        pyqmigrate.MappedRamSnapshot(made.path, offset=offset) as snapshot,
        pyqmigrate.MappedRamSnapshot(pyqmigrate.Descriptors(companion.fd, offset=offset)) as copy,
    ):
        copy.verify()
        assert copy.stream == snapshot.stream
    companion.close()


def test_mapped_block_is_all_clear_and_all_hole(directory: Path) -> None:
    made = make(directory)
    companion = made.companion("big")
    assert made.bits(companion, "big") == []
    with pyqmigrate.MappedRamSnapshot(pyqmigrate.Descriptors(companion.fd)) as copy:
        block = copy.blocks["big"]
        path = Path(f"/proc/self/fd/{companion.fd}")
        assert data_bytes(path, block.pages_offset, block.pages_offset + block.length) == 0
    assert companion.stale_pages == 0
    companion.close()


def test_other_blocks_are_carried_along(directory: Path) -> None:
    made = make(directory)
    companion = made.companion("big")
    with pyqmigrate.MappedRamSnapshot(pyqmigrate.Descriptors(companion.fd)) as copy:
        small = copy.blocks["small"]
        assert small.read(0, small.length) == made.small.tobytes()
    companion.close()


@some
@given(st.lists(st.integers(0, PAGES - 1), max_size=60), st.sampled_from([0.0, 0.02, 0.5, 0.98]))
def test_exactly_the_stale_pages_are_marked(
    directory: Path, pages: list[int], density: float
) -> None:
    made = make(directory, density=density)
    stale = sorted(set(made.dirty(pages)))
    companion = made.companion("big")
    assert made.bits(companion, "big") == stale
    assert companion.stale_pages == len(stale)
    companion.close()


def test_stale_pages_read_as_zeros_in_the_companion(directory: Path) -> None:
    made = make(directory)
    stale = made.dirty(list(range(PAGES)))
    assert stale, "no page is clear: the test proves nothing"
    companion = made.companion("big")
    with pyqmigrate.MappedRamSnapshot(pyqmigrate.Descriptors(companion.fd)) as copy:
        block = copy.blocks["big"]
        assert block.read(0, block.length) == bytes(block.length)
    companion.close()


def test_snapshot_is_not_changed(directory: Path) -> None:
    made = make(directory)
    made.dirty(list(range(0, PAGES, 7)))
    before = made.path.read_bytes()
    made.companion("big").close()
    assert made.path.read_bytes() == before


def test_zero_pages_that_were_written_are_not_stale(directory: Path) -> None:
    """Short gaps are written along with their neighbours: bytes under clear bits, all zero."""
    path = directory / "bridged.mapped"
    memory = np.zeros(2000 * PAGE, dtype=np.uint8)
    memory[:: 2 * PAGE] = 1
    pyqmigrate.save(path, [pyqmigrate.RamBlock("big", memory)], sparse="dense")
    companion = Made(path, 0, memory, memory).companion("big")
    assert companion.stale_pages == 0
    companion.close()


def test_readers_have_positions_of_their_own(directory: Path) -> None:
    companion = make(directory).companion("big")
    first, second = companion.open_for_reading(), companion.open_for_reading()
    companion.close()
    assert os.read(first, 4) == os.read(second, 4) == b"QEVM"
    os.close(first)
    os.close(second)


def test_cancelled_search_ends(directory: Path) -> None:
    made = make(directory)
    fd = os.open(made.path, os.O_RDONLY)
    with pyqmigrate.MappedRamSnapshot(made.path) as snapshot:
        companion = IncomingStream(snapshot, fd, ["big"])
        companion.cancel()
        with pytest.raises(Cancelled):
            companion.build()
    companion.close()
    os.close(fd)


def test_sealed_snapshot_is_not_searched(directory: Path) -> None:
    made = make(directory)
    assert made.dirty(list(range(PAGES)))
    fd = os.open(made.path, os.O_RDONLY)
    with pyqmigrate.MappedRamSnapshot(made.path) as snapshot:
        companion = IncomingStream(snapshot, fd, ["big"], sealed=True)
        companion.build()
    os.close(fd)
    assert (companion.stale_pages, made.bits(companion, "big")) == (0, [])
    companion.close()
