"""Background snapshots that QEMU wrote with mapped-ram: read as they are, and completed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import convert, open_snapshot, seal
from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.format.stream.writer import RAM_SECTION_ID
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.provenance import provenance
from pyqmigrate.snapshot.save.background import complete_background_snapshot
from tests.harness.background import DEVICES, write_background_snapshot
from tests.harness.examples import few
from tests.harness.kernel import Bits, Bytes, guest
from tests.harness.snapshots import load
from tests.harness.strategies import page_bits
from tests.harness.stream_builders import RAM_EOS, part, start

PAGES = 200


def known() -> dict[str, tuple[Bytes, Bits]]:
    bits = np.random.default_rng(1).random(PAGES) < 0.6
    return {"pc.ram": (guest(bits, 4096, 1), bits)}


def complete(path: Path) -> int:
    """Complete the file in place."""
    fd = os.open(path, os.O_RDWR)
    try:
        target = OutputFile.open(Descriptors(fd), DirectIO.OFF, reuse=True)
        os.pwrite(fd, b"QEVM", 0)
        return complete_background_snapshot(target)
    finally:
        os.close(fd)


@few
@given(st.data())
def test_pages_are_found_by_extents_and_stay_when_it_is_completed(
    disk: Path, data: st.DataObject
) -> None:
    path = disk / "snapshot"
    page_size = data.draw(st.sampled_from([1024, 4096, 65536]))
    blocks = {}
    for name in ("pc.ram", "rom")[: data.draw(st.integers(1, 2))]:
        bits = data.draw(page_bits(data.draw(st.integers(1, 300))))
        blocks[name] = guest(bits, page_size, len(bits)), bits
    write_background_snapshot(path, blocks, page_size)

    def check(*, background: bool) -> list[int]:
        with open_snapshot(path) as snapshot:
            snapshot.verify()
            assert snapshot.stream.background is background
            counts = []
            for name, (_, bits) in blocks.items():
                block = snapshot.blocks[name]
                found = np.zeros(len(bits), bool)
                for first, end, is_data in block.runs():
                    found[first:end] = is_data
                assert not (bits & ~found).any(), "a page with data is taken for zeros"
                if page_size >= 4096:
                    assert np.array_equal(found, bits)
                counts.append(block.data_pages)
        loaded = load(path)
        for name, (memory, _) in blocks.items():
            assert np.array_equal(loaded[name], memory)
        return counts

    counts = check(background=True)
    assert complete(path) == sum(counts)
    assert check(background=False) == counts


def test_completed_file_has_an_end_in_place_of_the_last_part(disk: Path) -> None:
    path = disk / "snapshot"
    write_background_snapshot(path, known())
    size = path.stat().st_size
    with open_snapshot(path) as snapshot:
        before = snapshot.stream
    complete(path)
    with open_snapshot(path) as snapshot:
        after = snapshot.stream
        kinds = [section.kind for section in after.sections]
    assert path.stat().st_size == size
    assert after.end == before.end and after.after_ram == before.after_ram
    assert [s.offset for s in after.sections] == [s.offset for s in before.sections]
    assert kinds.count(SectionKind.END) == 1
    with pytest.raises(SnapshotError, match="RAM's END"):
        complete(path)


@pytest.mark.parametrize("to", ["mapped-ram", "stream", "raw"])
def test_uncompleted_file_is_converted(to: str, disk: Path) -> None:
    path, converted = disk / "snapshot", disk / "converted"
    blocks = known()
    write_background_snapshot(path, blocks)
    convert(path, converted, to=to)
    if to == "raw":
        [raw] = [file for file in converted.iterdir() if file.stat().st_size == PAGES * 4096]
        assert raw.read_bytes() == blocks["pc.ram"][0].tobytes()
        return
    assert np.array_equal(load(converted)["pc.ram"], blocks["pc.ram"][0])
    with open_snapshot(converted) as snapshot:
        assert not snapshot.stream.background
        kinds = [s.name for s in snapshot.stream.sections if s.kind is SectionKind.FULL]
    assert kinds == ["timer", "globalstate"]


def test_uncompleted_file_is_not_sealed_and_qemu_would_not_load_it(disk: Path) -> None:
    path = disk / "snapshot"
    write_background_snapshot(path, known())
    with pytest.raises(NotSupported, match="convert it to mapped-ram"):
        seal(path)
    with open_snapshot(path) as snapshot:
        found = provenance(snapshot)
        assert not found.loadable
        assert "convert it to mapped-ram" in found.obstacles[0]


def test_bitmap_with_a_bit_belongs_to_an_unfinished_file(disk: Path) -> None:
    path = disk / "snapshot"
    write_background_snapshot(path, known())
    with open_snapshot(path) as snapshot:
        offset = snapshot.blocks["pc.ram"].layout.bitmap_offset  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\1")
    with open_snapshot(path) as snapshot, pytest.raises(SnapshotError, match="bitmaps"):
        snapshot.verify()


@pytest.mark.parametrize("cut", [1, 40, 200, 400, 700])
def test_file_that_was_cut_short_is_refused(cut: int, disk: Path) -> None:
    path = disk / "snapshot"
    write_background_snapshot(path, known())
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(SnapshotError):
        open_snapshot(path).close()


def test_state_in_several_parts_is_refused(disk: Path) -> None:
    path = disk / "snapshot"
    live = start(9, "dirty-bitmap", 1, b"\0\0\0\1")
    write_background_snapshot(path, known(), devices=live + part(RAM_SECTION_ID, RAM_EOS) + DEVICES)
    with pytest.raises(NotSupported, match="in several parts"):
        complete(path)


def test_last_of_several_parts_becomes_the_end(disk: Path) -> None:
    path = disk / "snapshot"
    write_background_snapshot(path, known(), devices=part(RAM_SECTION_ID, RAM_EOS) + DEVICES)
    assert complete(path) > 0
    with open_snapshot(path) as snapshot:
        sections = [s for s in snapshot.stream.sections if s.name == "ram"]
    assert [s.kind for s in sections][-2:] == [SectionKind.PART, SectionKind.END]
