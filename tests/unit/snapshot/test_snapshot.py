"""A finished file, opened: blocks, reads, verify, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import RamBlock, SnapshotError, UsageError, open_snapshot
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some
from tests.harness.snapshots import Bytes, known_memory, ram, save_known


def test_a_block_shows_where_it_is_and_what_it_holds(disk: Path) -> None:
    memory = save_known(disk / "snap", machine="pc-q35-10.0")
    with open_snapshot(disk / "snap") as snapshot:
        assert snapshot.machine == "pc-q35-10.0"
        assert list(snapshot.blocks) == ["ram"]
        block = snapshot.blocks["ram"]
        pages = memory.reshape(-1, 4096).any(axis=1)
        assert (block.name, block.length, block.page_size) == ("ram", len(memory), 4096)
        assert (block.data_pages, block.zero_pages) == (pages.sum(), (~pages).sum())
        assert block.pages_offset == 1 << 20
        assert not block.external
        assert snapshot.offset == 0
        info = (disk / "snap").stat()
        assert (snapshot.size, snapshot.allocated) == (info.st_size, info.st_blocks * 512)
        with pytest.raises(TypeError):
            snapshot.blocks["new"] = block  # type: ignore[index]


@pytest.fixture(scope="module")
def known() -> Iterator[tuple[Path, Bytes]]:
    """A snapshot of known memory for many examples, and that memory."""
    with directory_on_disk() as directory:
        yield directory / "snap", save_known(directory / "snap")


@some
@given(st.integers(0, 512 * 4096), st.integers(0, 300000))
def test_read_gives_the_bytes_of_the_guest(known: tuple[Path, Bytes], at: int, length: int) -> None:
    path, memory = known
    length = min(length, len(memory) - at)
    with open_snapshot(path) as snapshot:
        assert snapshot.blocks["ram"].read(at, length) == memory[at : at + length].tobytes()


def test_clear_pages_are_zero_whatever_the_file_has_there(disk: Path) -> None:
    """Live saves of QEMU leave old bytes there."""
    memory = save_known(disk / "snap")
    fd = os.open(disk / "snap", os.O_RDWR)
    with open_snapshot(disk / "snap") as snapshot:
        block = snapshot.blocks["ram"]
        for page in np.flatnonzero(~memory.reshape(-1, 4096).any(axis=1)).tolist():
            os.pwrite(fd, b"\xee" * 4096, block.pages_offset + page * 4096)
        snapshot.verify()
        assert block.read(0, block.length) == memory.tobytes()
        loaded = np.full(block.length, 0x77, dtype=np.uint8)
        snapshot.load({"ram": loaded})
        assert (loaded == memory).all()
    os.close(fd)


@pytest.mark.parametrize(
    ("at", "length"), [(-1, 1), (0, -1), (0, 512 * 4096 + 1), (512 * 4096, 1), (1 << 70, 0)]
)
def test_reads_outside_the_block_are_refused(disk: Path, at: int, length: int) -> None:
    save_known(disk / "snap")
    with open_snapshot(disk / "snap") as snapshot, pytest.raises(UsageError):
        snapshot.blocks["ram"].read(at, length)


def test_a_read_of_nothing_is_nothing(disk: Path) -> None:
    memory = save_known(disk / "snap")
    with open_snapshot(disk / "snap") as snapshot:
        assert snapshot.blocks["ram"].read(0, 0) == b""
        assert snapshot.blocks["ram"].read(len(memory), 0) == b""


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.load({}),
        lambda s: s.start_load({}),
        lambda s: s.verify(),
        lambda s: s.blocks["ram"].read(0, 1),
        lambda s: s.blocks["ram"].data_pages,
        lambda s: s.size,
        lambda s: s.offset,
        lambda s: s.allocated,
    ],
    ids=["load", "start_load", "verify", "read", "data_pages", "size", "offset", "allocated"],
)
@pytest.mark.parametrize("looked", [False, True])
def test_a_closed_snapshot_says_so(disk: Path, use: Any, looked: bool) -> None:
    save_known(disk / "snap")
    snapshot = open_snapshot(disk / "snap")
    if looked:
        assert snapshot.blocks["ram"].data_pages
    snapshot.close()
    snapshot.close()
    with pytest.raises(UsageError, match="closed"):
        use(snapshot)


def test_what_was_known_at_opening_is_known_after_closing(disk: Path) -> None:
    save_known(disk / "snap", machine="virt")
    with open_snapshot(disk / "snap") as snapshot:
        pass
    assert snapshot.machine == "virt"
    assert snapshot.blocks["ram"].length == 512 * 4096


def test_closing_during_a_load_does_not_kill_the_process(
    disk: Path, child_environment: dict[str, str]
) -> None:
    memory = ram(16384, density=1.0)
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)])
    script = (
        "import sys, time, pyqmigrate\n"
        "for _ in range(10):\n"
        "    snapshot = pyqmigrate.open_snapshot(sys.argv[1])\n"
        "    job = snapshot.start_load({'ram': bytearray(snapshot.blocks['ram'].length)},\n"
        "                              channels=4)\n"
        "    snapshot.close()\n"
        "    try:\n"
        "        job.result(20)\n"
        "    except pyqmigrate.PyqmigrateError:\n"
        "        pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, disk / "snap"],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unused_snapshot_is_not_changed_by_looking(disk: Path) -> None:
    save_known(disk / "snap")
    before = (disk / "snap").read_bytes()
    with open_snapshot(disk / "snap") as snapshot:
        snapshot.verify()
        snapshot.load({"ram": bytearray(512 * 4096)})
    assert (disk / "snap").read_bytes() == before


def test_the_offset_is_given_once(disk: Path) -> None:
    save_known(disk / "snap")
    fd = os.open(disk / "snap", os.O_RDONLY)
    for target in (f"file:{disk}/snap,offset=4096", pyqmigrate.Descriptors(fd)):
        with pytest.raises(UsageError, match="twice"):
            open_snapshot(target, offset=4096)
    for offset in (-1, 1 << 63):
        with pytest.raises(UsageError):
            open_snapshot(disk / "snap", offset=offset)
    os.close(fd)


def test_a_wrong_bitmap_order_is_refused(disk: Path) -> None:
    save_known(disk / "snap")
    with pytest.raises(UsageError):
        open_snapshot(disk / "snap", bitmap_order="middle")  # type: ignore[arg-type]


def test_a_bitmap_of_a_big_endian_host_is_turned(disk: Path) -> None:
    memory = known_memory()
    pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)])
    with open_snapshot(disk / "snap") as snapshot:
        at = snapshot.blocks["ram"].bitmap_offset
    fd = os.open(disk / "snap", os.O_RDWR)
    words = np.frombuffer(os.pread(fd, 64, at), dtype="<u8")
    os.pwrite(fd, words.astype(">u8").tobytes(), at)
    os.close(fd)
    loaded = bytearray(len(memory))
    with open_snapshot(disk / "snap", bitmap_order="big") as snapshot:
        snapshot.load({"ram": loaded})
    assert loaded == memory.tobytes()


# ---- damage --------------------------------------------------------------------------------------


def test_bits_past_the_end_of_a_block_are_found(disk: Path) -> None:
    pyqmigrate.save(disk / "snap", [RamBlock("ram", ram(70))])
    with open_snapshot(disk / "snap") as snapshot:
        at = snapshot.blocks["ram"].bitmap_offset
    fd = os.open(disk / "snap", os.O_RDWR)
    os.pwrite(fd, b"\x80", at + 15)
    os.close(fd)
    with open_snapshot(disk / "snap") as snapshot:
        with pytest.raises(SnapshotError) as caught:
            snapshot.verify()
        assert caught.value.block == "ram"
        assert caught.value.field == "bitmap"
        with pytest.raises(SnapshotError):
            snapshot.load({"ram": bytearray(70 * 4096)})


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.999])
def test_a_file_cut_short_is_not_opened(disk: Path, share: float) -> None:
    save_known(disk / "snap")
    os.truncate(disk / "snap", int((disk / "snap").stat().st_size * share))
    with pytest.raises(SnapshotError):
        open_snapshot(disk / "snap")


def test_a_file_without_its_last_byte_is_not_verified(disk: Path) -> None:
    save_known(disk / "snap")
    os.truncate(disk / "snap", (disk / "snap").stat().st_size - 1)
    with pytest.raises(SnapshotError), open_snapshot(disk / "snap") as snapshot:
        snapshot.verify()


@some
@given(st.integers(0, 250), st.integers(0, 255))
def test_a_damaged_head_never_gives_more_than_an_error(
    known: tuple[Path, Bytes], at: int, value: int
) -> None:
    path, _ = known
    fd = os.open(path, os.O_RDWR)
    was = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([value]), at)
    try:
        with open_snapshot(path) as snapshot:
            snapshot.verify()
            for block in snapshot.blocks.values():
                block.read(0, min(block.length, 8192))
    except (SnapshotError, pyqmigrate.NotSupported):
        pass
    finally:
        os.pwrite(fd, was, at)
        os.close(fd)


@pytest.mark.parametrize("content", [b"", b"Q", b"QEVM", b"QEVM\0\0\0\3", bytes(1 << 20)])
def test_what_is_not_a_snapshot_is_a_snapshot_error(disk: Path, content: bytes) -> None:
    (disk / "snap").write_bytes(content)
    with pytest.raises(SnapshotError):
        open_snapshot(disk / "snap")
