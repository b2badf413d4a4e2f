"""Page tables and working sets as files: whole or not there, recognised before they are replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import SnapshotError, UsageError, seal
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import TouchedRun, WorkingSet
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.page_digests import DigestTable
from pyqmigrate.io.page_table_file import (
    check_page_table_place,
    page_table_path,
    read_page_table,
    write_page_table,
)
from pyqmigrate.io.working_set_file import (
    check_working_set_place,
    read_working_set,
    working_set_path,
    write_working_set,
)
from tests.harness.examples import some

PAGE = 4096
IDENTITY = SnapshotId(5, 6, bytes(16))
BLOCKS = [BlockSpec("pc.ram", 70_000 * PAGE), BlockSpec("vga.vram", 3 * PAGE)]
RUNS = [TouchedRun(0, 60_000, 10_000), TouchedRun(1, 0, 3), TouchedRun(0, 0, 1)]


def tables() -> dict[str, DigestTable]:
    """A table of more than one piece, and a short one."""
    found = {block.name: DigestTable(block.length // PAGE) for block in BLOCKS}
    for table in found.values():
        table.put(0, os.urandom(table.nbytes))
    return found


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "guest.mapped"


def written_table(snapshot: Path) -> Path:
    write_page_table(check_page_table_place(snapshot), IDENTITY, BLOCKS, tables())
    return page_table_path(snapshot)


def written_set(snapshot: Path) -> Path:
    place = check_working_set_place(snapshot)
    write_working_set(place, IDENTITY, BLOCKS, WorkingSet(RUNS), seconds=3)
    return working_set_path(snapshot)


def test_a_page_table_that_is_written_is_read(snapshot: Path) -> None:
    kept = tables()
    write_page_table(check_page_table_place(snapshot), IDENTITY, BLOCKS, kept)
    assert os.fspath(page_table_path(snapshot)) == f"{snapshot}.pages"
    read = read_page_table(page_table_path(snapshot), BLOCKS)
    assert read is not None
    assert read.snapshot == IDENTITY
    for name, table in kept.items():
        assert b"".join(read.tables[name].pieces()) == b"".join(table.pieces())


def test_a_working_set_that_is_written_is_read(snapshot: Path) -> None:
    read = read_working_set(written_set(snapshot))
    assert read is not None
    assert (read.snapshot, [*read.blocks], read.seconds) == (IDENTITY, BLOCKS, 3.0)
    assert [*read.working_set] == RUNS


def test_without_a_file_there_is_nothing(snapshot: Path) -> None:
    assert read_page_table(page_table_path(snapshot), BLOCKS) is None
    assert read_working_set(working_set_path(snapshot)) is None


@pytest.mark.parametrize("suffix", [".pages", ".workingset"])
def test_a_file_of_the_user_is_not_replaced(snapshot: Path, suffix: str) -> None:
    other = snapshot.with_name(snapshot.name + suffix)
    other.write_text("dear reader")
    check = check_page_table_place if suffix == ".pages" else check_working_set_place
    with pytest.raises(UsageError, match="other content"):
        check(snapshot)
    assert other.read_text() == "dear reader"
    other.unlink()
    other.mkdir()
    with pytest.raises(UsageError, match="a directory"):
        check(snapshot)


def test_each_replaces_its_own_kind_only(snapshot: Path) -> None:
    written_table(written_set(snapshot).rename(snapshot))  # beside any file
    written_table(snapshot)
    written_table(snapshot)
    page_table_path(snapshot).rename(working_set_path(snapshot))
    with pytest.raises(UsageError, match="the working set would replace"):
        written_set(snapshot)


@some
@given(st.data())
def test_damage_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    snapshot = tmp_path_factory.mktemp("damage") / "guest"
    path = data.draw(st.sampled_from([written_table, written_set]))(snapshot)
    whole = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    if kind == "flip":
        place = data.draw(st.integers(0, 100) | st.integers(4096, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole += b"\0"
    path.write_bytes(whole)
    with pytest.raises(SnapshotError):
        read_page_table(path, BLOCKS) if path.suffix == ".pages" else read_working_set(path)
    path.unlink()


def test_holes_and_other_files_are_refused(snapshot: Path, tmp_path: Path) -> None:
    path = written_table(snapshot)
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.truncate(size - 65536)
        file.truncate(size)
    with pytest.raises(SnapshotError, match="hole"):
        read_page_table(path, BLOCKS)
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", tmp_path):
        with pytest.raises(SnapshotError, match="not a regular file"):
            read_working_set(place)


def test_a_table_of_other_blocks_is_refused(snapshot: Path) -> None:
    path = written_table(snapshot)
    with pytest.raises(SnapshotError, match="not those of the snapshot"):
        read_page_table(path, BLOCKS[:1])
    incomplete = {"pc.ram": DigestTable(70_000), "vga.vram": DigestTable(2)}
    with pytest.raises(UsageError, match=r"'vga\.vram' are missing"):
        write_page_table(path, IDENTITY, BLOCKS, incomplete)


def test_a_snapshot_is_identified_with_its_seal_while_that_is_current(make_snapshot: Path) -> None:
    with make_snapshot.open("rb") as file:
        before = identify_snapshot(make_snapshot, file.fileno())
        assert before.seal is None
        seal(make_snapshot)
        sealed = identify_snapshot(make_snapshot, file.fileno())
        assert sealed.seal is not None
        assert len(sealed.seal) == 16
        assert sealed.seal.hex() in Path(f"{make_snapshot}.seal").read_bytes()[:4096].decode(
            "latin-1"
        )
        assert before.differs_from(sealed) is None
        os.utime(make_snapshot)
        assert identify_snapshot(make_snapshot, file.fileno()).seal is None


@pytest.fixture
def make_snapshot(tmp_path: Path) -> Path:
    from pyqmigrate import RamBlock, save

    path = tmp_path / "whole.mapped"
    save(path, [RamBlock("pc.ram", bytes(64 * PAGE))])
    return path
