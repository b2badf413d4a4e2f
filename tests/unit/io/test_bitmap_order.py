"""In which byte order the bitmaps of a file are, as far as it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import RamBlock, open_snapshot, provenance, save
from pyqmigrate.io import bitmap_order
from pyqmigrate.io.bitmap_order import better_order
from tests.harness.snapshots import Bytes, load, ram, turn_bitmaps

S390 = "s390-ccw-virtio-10.0"


def make(path: Path, memory: Bytes, machine: str, *, big: bool) -> None:
    save(path, [RamBlock("ram", memory)], machine=machine, sparse="exact")
    if big:
        turn_bitmaps(path)


def shown(path: Path, machine: str = S390, *, big: bool, memory: Bytes | None = None) -> str:
    """The order that is found; with it, the memory is what it was."""
    memory = ram(1100) if memory is None else memory
    make(path, memory, machine, big=big)
    with open_snapshot(path) as snapshot:
        order = snapshot.bitmap_order
    if (order == "big") == big:
        assert (load(path)["ram"] == memory).all()
    return order


@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize("npages", [1100, 1024, 20])
def test_file_of_an_s390_guest_shows_the_order(disk: Path, big: bool, npages: int) -> None:
    assert shown(disk / "s", big=big, memory=ram(npages)) == ("big" if big else "little")


def test_file_of_another_guest_is_little_without_a_look(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmap_order, "_fit", None)
    assert shown(disk / "s", "pc-q35-10.0", big=False) == "little"


def test_file_without_holes_is_little(disk: Path) -> None:
    make(disk / "holes", ram(1024), S390, big=True)
    (disk / "s").write_bytes((disk / "holes").read_bytes())
    with open_snapshot(disk / "s") as snapshot:
        assert snapshot.bitmap_order == "little"


def test_memory_that_is_all_data_reads_alike(disk: Path) -> None:
    memory = np.full(128 * 4096, 7, np.uint8)
    assert shown(disk / "s", big=True, memory=memory) == "little"
    assert (load(disk / "s")["ram"] == memory).all()


def test_big_with_a_bit_over_a_hole_is_not_believed(disk: Path) -> None:
    memory = ram(1024, density=0.2)
    make(disk / "s", memory, S390, big=True)
    page = int(np.flatnonzero(~memory.reshape(-1, 4096).any(axis=1))[10])
    with open_snapshot(disk / "s") as snapshot, (disk / "s").open("r+b") as file:
        at = snapshot.blocks["ram"].bitmap_offset + page // 64 * 8 + 7 - page % 64 // 8
        file.seek(at)
        bits = file.read(1)[0]
        file.seek(at)
        file.write(bytes([bits | 1 << page % 8]))
    with open_snapshot(disk / "s") as snapshot:
        assert snapshot.bitmap_order == "little"


@pytest.mark.parametrize("big", [True, False])
def test_the_order_that_fits_better_is_reported(disk: Path, big: bool) -> None:
    make(disk / "s", ram(1024), "pc-q35-10.0", big=big)
    right, wrong = ("big", "little") if big else ("little", "big")
    for order, better in ((right, None), (wrong, right)):
        with open_snapshot(disk / "s", bitmap_order=order) as snapshot:  # type: ignore[arg-type]
            found = better_order(snapshot.source, snapshot.stream.blocks, snapshot.bitmap_order)
            assert found == better
            remarks = [text for text in provenance(snapshot).remarks if "fit the file" in text]
            assert len(remarks) == (better is not None)


def test_bits_over_old_bytes_are_no_reason_for_the_other_order(disk: Path) -> None:
    memory = ram(1024, density=0.3)
    make(disk / "s", memory, "pc-q35-10.0", big=False)
    with open_snapshot(disk / "s") as snapshot, (disk / "s").open("r+b") as file:
        for page in np.flatnonzero(~memory.reshape(-1, 4096).any(axis=1))[::2]:
            file.seek(snapshot.blocks["ram"].pages_offset + int(page) * 4096)
            file.write(b"old")
    with open_snapshot(disk / "s") as snapshot:
        assert better_order(snapshot.source, snapshot.stream.blocks, "little") is None


def test_only_so_many_stretches_of_data_are_looked_at(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmap_order, "_EXTENTS", 10)
    assert shown(disk / "s", big=True) == "big"
    assert shown(disk / "s", big=False) == "little"
