"""A save that seals: the digests are of the bytes as they were written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import Algorithm, Descriptors, FileMemory, RamBlock, UsageError
from pyqmigrate.integrity.digests import Digests
from pyqmigrate.integrity.save_seal import SaveSeal
from pyqmigrate.integrity.seal import stale_pages
from pyqmigrate.integrity.verify import current_seal, verify_seal
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.place import seal_path
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions
from tests.harness.examples import few, some
from tests.harness.kernel import PAGE_SIZES
from tests.harness.snapshots import Bytes, load, ram, save_known

MIB = 1 << 20


def check(path: Path) -> None:
    """The seal is that of the file, and current."""
    found = verify_seal(path)
    assert found is not None
    assert found.damages == ()
    assert found.clear_pages_zero
    assert current_seal(path) is not None


@some
@given(st.data())
def test_seal_is_that_of_the_file(disk: Path, data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    density = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    blocks, fds = [], []
    for n in range(data.draw(st.integers(1, 3))):
        npages = data.draw(st.integers(1, (7 << 20) // page_size))
        shift = data.draw(st.sampled_from([0, 0, 8]))
        memory = ram(npages, density=density, page_size=page_size, seed=n, shift=shift)
        if data.draw(st.booleans()):
            fds.append(os.memfd_create("guest"))
            os.write(fds[-1], memory.tobytes())
            blocks.append(RamBlock(f"ram{n}", FileMemory(fds[-1]), page_size))
        else:
            blocks.append(RamBlock(f"ram{n}", memory, page_size))
    offset = data.draw(st.sampled_from([0, 0, 1, 4096, MIB - 2, 3 * MIB]))
    target = f"file:{disk}/snap,offset={offset}" if offset else disk / "snap"
    algorithm = data.draw(st.sampled_from(Algorithm))
    report = pyqmigrate.save(
        target,
        blocks,
        seal=algorithm,
        reuse=data.draw(st.booleans()),
        channels=data.draw(st.integers(1, 4)),
        direct_io=data.draw(st.sampled_from(["auto", "on", "off"])),
        sparse=data.draw(st.sampled_from(["auto", "exact", "dense"])),
    )
    for fd in fds:
        os.close(fd)
    assert report.seal is algorithm
    check(disk / "snap")
    with pyqmigrate.open_snapshot(target) as snapshot:
        snapshot.verify()
        assert stale_pages(snapshot) == {}


@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
def test_seal_is_that_of_the_file_though_memory_changed_during_the_save(
    disk: Path, sparse: str
) -> None:
    memory = ram(8000, density=0.5)
    stop = threading.Event()
    writer = threading.Thread(target=scribble, args=(memory, stop))
    writer.start()
    try:
        for _ in range(3):
            blocks = [RamBlock("ram", memory)]
            pyqmigrate.save(disk / "snap", blocks, seal="xxh3-128", sparse=sparse)
            check(disk / "snap")
            with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
                assert stale_pages(snapshot) == {}
    finally:
        stop.set()
        writer.join()


def scribble(memory: Bytes, stop: threading.Event) -> None:
    """Lets pages come and go, and change."""
    pages, rng = memory.reshape(-1, 4096), np.random.default_rng(5)
    while not stop.is_set():
        chosen = rng.integers(0, len(pages), 500)
        pages[chosen] = rng.integers(0, 3, len(chosen), dtype=np.uint8)[:, None] * 0x55


def read_while_sealing(monkeypatch: pytest.MonkeyPatch) -> list[Digests]:
    """The digests of every save from here on, when all that was not known has been read."""
    found: list[Digests] = []
    whole = Digests.read_rest

    def read_rest(self: Digests, fd: int, name: str, channels: Channels) -> None:
        whole(self, fd, name, channels)
        found.append(self)

    monkeypatch.setattr(Digests, "read_rest", read_rest)
    return found


def test_pages_are_not_read_again(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_while_sealing(monkeypatch)
    blocks = [RamBlock("ram", ram(5000, density=0.7)), RamBlock("rom", ram(300, seed=2))]
    for sparse in ("auto", "exact", "dense"):
        pyqmigrate.save(disk / "snap", blocks, seal="xxh3-128", sparse=sparse)
        # Head and bitmap; what stands between the blocks; and the end.
        assert found[-1].bytes_read <= 5 * MIB


def passes(path: Path, memory: Bytes, changes: list[list[int]], seal: str | None) -> None:
    """A save whose memory changes between its passes, all by pages of 4 KiB."""
    writer = Writer(
        path,
        [RamBlock("ram", memory)],
        SaveOptions(),
        observer=None if seal is None else SaveSeal(Algorithm(seal), 0, seal_path(path)),
    )
    try:
        writer.begin()
        writer.write_pages()
        pages = memory.reshape(-1, 4096)
        for n, numbers in enumerate(changes):
            selection = Bitmap(len(pages))
            for number in numbers:
                pages[number] = (number + n) % 3  # some become zero
                selection.core[number // 64] |= 1 << number % 64
            writer.write_pages([selection])
            selection.close()
        writer.finish()
    finally:
        writer.close()


@few
@given(st.lists(st.lists(st.integers(0, 2999), max_size=30), max_size=3))
def test_pages_of_later_passes_are_in_the_seal(disk: Path, changes: list[list[int]]) -> None:
    memory = ram(3000, density=0.6)
    passes(disk / "snap", memory, changes, "xxh3-128")
    check(disk / "snap")
    assert (load(disk / "snap")["ram"] == memory).all()
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        assert stale_pages(snapshot) == {}


def test_a_live_save_without_a_seal_has_old_bytes(disk: Path) -> None:
    passes(disk / "snap", ram(3000, density=1.0), [[3, 6, 9], [30, 60]], None)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        assert stale_pages(snapshot), "the test above proves nothing"


@pytest.mark.parametrize("how", ["replace", "reuse", "offset"])
def test_a_save_without_a_seal_removes_the_one_of_what_it_replaces(disk: Path, how: str) -> None:
    path = disk / "snap"
    save_known(path, seed=1, seal="xxh3-128")
    assert (disk / "snap.seal").exists()
    if how == "offset":
        pyqmigrate.save(f"file:{path},offset=4096", [RamBlock("ram", ram(50))])
    else:
        save_known(path, seed=2, reuse=how == "reuse")
    assert [entry.name for entry in disk.iterdir()] == ["snap"]


def test_converting_over_a_sealed_file_removes_its_seal(disk: Path) -> None:
    save_known(disk / "one", seed=1)
    save_known(disk / "snap", seed=2, seal="xxh3-128")
    with pyqmigrate.open_snapshot(disk / "one") as snapshot:
        pyqmigrate.convert(snapshot, disk / "snap", to="stream")
    assert not (disk / "snap.seal").exists()


def test_a_save_that_fails_leaves_the_seal_of_what_is_there(disk: Path) -> None:
    memory = save_known(disk / "snap", seal="xxh3-128")
    job = pyqmigrate.start_save(
        disk / "snap", [RamBlock("ram", memory)], max_bandwidth=MIB, seal="blake3"
    )
    job.cancel()
    with pytest.raises(pyqmigrate.Cancelled):
        job.result()
    check(disk / "snap")


def test_a_file_that_is_not_a_seal_is_left_alone(disk: Path) -> None:
    save_known(disk / "snap")
    (disk / "snap.seal").write_text("wax")
    save_known(disk / "snap", seed=2)
    assert (disk / "snap.seal").read_text() == "wax"


@pytest.mark.parametrize("how", ["replace", "reuse", "offset"])
def test_a_file_where_the_seal_would_be_is_refused_before_anything_is_touched(
    disk: Path, how: str
) -> None:
    path = disk / "snap"
    before = save_known(path)
    (disk / "snap.seal").write_text("wax")
    with pytest.raises(UsageError, match=r"move (it|that file), or choose"):
        if how == "offset":
            blocks = [RamBlock("ram", ram(50))]
            pyqmigrate.save(f"file:{path},offset=4096", blocks, seal="xxh3-128")
        else:
            save_known(path, seed=2, seal="xxh3-128", reuse=how == "reuse")
    assert (disk / "snap.seal").read_text() == "wax"
    assert (load(path)["ram"] == before).all()


def test_a_name_that_leaves_no_room_for_the_seals_is_refused_before_work_begins(disk: Path) -> None:
    with pytest.raises(UsageError, match=r"255 is the limit.*at least 3 bytes shorter"):
        save_known(disk / ("n" * 253), seal="xxh3-128")
    assert list(disk.iterdir()) == []
    save_known(disk / ("n" * 253))
    assert load(disk / ("n" * 253))


def test_descriptors_are_refused_before_anything_is_touched(disk: Path) -> None:
    (disk / "file").write_bytes(b"as it was")
    fd = os.open(disk / "file", os.O_RDWR)
    try:
        with pytest.raises(UsageError, match="path"):
            pyqmigrate.save(Descriptors(fd), [RamBlock("ram", ram(4))], seal="xxh3-128")
    finally:
        os.close(fd)
    assert (disk / "file").read_bytes() == b"as it was"


def test_an_unknown_algorithm_is_refused_before_anything_is_touched(disk: Path) -> None:
    with pytest.raises(UsageError):
        save_known(disk / "snap", seal="md5")
    assert [*disk.iterdir()] == []


@pytest.mark.usefixtures("same_descriptors")
def test_no_descriptor_is_left_open(disk: Path) -> None:
    save_known(disk / "snap", seal="xxh3-128")
    save_known(disk / "snap", seal="sha256", reuse=True)
