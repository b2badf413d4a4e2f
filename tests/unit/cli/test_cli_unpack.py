"""A snapshot into raw files, with untrusted names."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import NoSpace, open_snapshot
from pyqmigrate.export import raw
from tests.harness.command import PAGE, Command, make_snapshot, pages


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_raw_files_hold_the_memory_of_the_blocks(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    assert command("unpack", snapshot, tmp_path / "out").code == 0
    assert (tmp_path / "out/pc.ram.raw").read_bytes() == pages(9, 1)
    assert (tmp_path / "out/vga.vram.raw").read_bytes() == pages(6, 2)
    assert names(tmp_path / "out") == ["blocks.json", "pc.ram.raw", "vga.vram.raw"]


def test_packed_and_unpacked_file_is_the_file(tmp_path: Path, command: Command) -> None:
    (tmp_path / "memory").write_bytes(pages(300, 3))
    command("pack", tmp_path / "s", f"ram={tmp_path}/memory", "--offset", "1MiB")
    command("unpack", tmp_path / "s", tmp_path / "out", "--offset", "1MiB")
    assert (tmp_path / "out/ram.raw").read_bytes() == pages(300, 3)


def test_clear_pages_become_holes(disk: Path, command: Command) -> None:
    make_snapshot(disk / "s", {"ram": pages(1) + bytes(8 << 20)})
    ran = command("unpack", disk / "s", disk / "out", "--json")
    info = (disk / "out/ram.raw").stat()
    assert info.st_size == PAGE + (8 << 20)
    assert info.st_blocks * 512 == ran.json["bytes_allocated"] < 1 << 20


def test_index_lists_what_was_written(tmp_path: Path, snapshot: Path, command: Command) -> None:
    ran = command("unpack", snapshot, tmp_path / "out", "--json")
    index = json.loads((tmp_path / "out/blocks.json").read_text())
    assert index["machine"] == "pc-q35-10.0"
    assert index["blocks"] == ran.json["blocks"]
    assert index["blocks"][0] == {
        "name": "pc.ram",
        "file": "pc.ram.raw",
        "length": 9 * PAGE,
        "page_size": PAGE,
        "data_pages": 6,
        "zero_pages": 3,
    }


def test_one_block_can_be_chosen(tmp_path: Path, snapshot: Path, command: Command) -> None:
    assert command("unpack", snapshot, tmp_path / "out", "--block", "vga.vram").code == 0
    assert names(tmp_path / "out") == ["blocks.json", "vga.vram.raw"]


def test_unknown_block_is_wrong_usage_and_makes_no_directory(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    ran = command("unpack", snapshot, tmp_path / "out", "--block", "nope")
    assert ran.code == 2
    assert "vga.vram" in ran.err
    assert not (tmp_path / "out").exists()


HOSTILE = [
    "../../etc/passwd",
    "/dev/mem",
    "..",
    ".",
    ".hidden",
    "a/b",
    "\x1b[2Jgone",
    "a b\n",
    "%2E",
    "\udcff\udc80",
    "-rf",
    "é" * 127,
    "blocks.json",
    "[red]x",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_name_stays_in_the_directory_and_off_the_terminal(
    name: str, tmp_path: Path, command: Command
) -> None:
    make_snapshot(tmp_path / "s", {name: pages(3)})
    ran = command("unpack", tmp_path / "s", tmp_path / "out")
    assert ran.code == 0
    assert names(tmp_path) == ["out", "s"]
    [index, file] = sorted((tmp_path / "out").iterdir(), key=lambda path: path.suffix)
    assert re.fullmatch(r"[A-Za-z0-9_%-][A-Za-z0-9._%-]*\.raw", file.name)
    assert file.read_bytes() == pages(3)
    assert json.loads(index.read_text())["blocks"][0]["name"] == name
    assert all(line.isprintable() for line in ran.out.splitlines())
    assert command("unpack", tmp_path / "s", tmp_path / "one", f"--block={name}").code == 0


def test_names_are_percent_encoded() -> None:
    assert raw.raw_name("0000:00:02.0/é") == "0000%3A00%3A02.0%2F%C3%A9.raw"
    assert raw.raw_name("..x") == "%2E.x.raw"


@given(st.lists(st.binary(min_size=1, max_size=255), min_size=2, max_size=2, unique=True))
def test_two_blocks_never_share_a_file(pair: list[bytes]) -> None:
    one, other = (raw.raw_name(name.decode("utf-8", "surrogateescape")) for name in pair)
    assert one != other
    assert len(one) <= 255
    assert not one.startswith(".")


def test_symbolic_link_is_replaced_and_not_followed(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    for name in ("pc.ram.raw", "blocks.json"):
        (tmp_path / "out" / name).symlink_to(victim)
    assert command("unpack", snapshot, tmp_path / "out").code == 0
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out/pc.ram.raw").is_symlink()
    assert (tmp_path / "out/pc.ram.raw").read_bytes() == pages(9, 1)


def test_files_and_directory_are_for_their_owner_only(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    command("unpack", snapshot, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out/pc.ram.raw").stat().st_mode) == 0o600


def test_failed_unpack_leaves_old_files_and_nothing_new(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "pc.ram.raw").write_text("old")
    with open_snapshot(snapshot) as opened:
        last = opened.blocks["vga.vram"].pages_offset
    os.truncate(snapshot, last + PAGE)
    assert command("unpack", snapshot, out).code == 1
    assert names(out) == ["pc.ram.raw"]
    assert (out / "pc.ram.raw").read_text() == "old"


def test_interrupted_unpack_leaves_nothing(tmp_path: Path, snapshot: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with open_snapshot(snapshot) as opened, pytest.raises(KeyboardInterrupt):
        raw.unpack(opened, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_lack_of_space_is_found_before_anything_is_written(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "free_bytes", lambda fd: PAGE)
    with open_snapshot(snapshot) as opened, pytest.raises(NoSpace):
        raw.unpack(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directory_in_the_way_of_a_raw_file_is_refused(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    (tmp_path / "out/pc.ram.raw").mkdir(parents=True)
    assert command("unpack", snapshot, tmp_path / "out").code == 2
    assert names(tmp_path / "out") == ["pc.ram.raw"]


def test_file_instead_of_a_directory_is_refused(
    tmp_path: Path, snapshot: Path, command: Command
) -> None:
    (tmp_path / "file").touch()
    assert command("unpack", snapshot, tmp_path / "file").code == 3
    assert command("unpack", snapshot, snapshot).code == 2


def test_unpack_leaves_no_descriptor_open(tmp_path: Path, snapshot: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with open_snapshot(snapshot) as opened:
        raw.unpack(opened, tmp_path / "out")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("twice", [False, True])
def test_files_appear_where_there_are_no_unnamed_ones(
    snapshot: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # refused with the same errno
    for _ in range(1 + twice):
        assert command("unpack", snapshot, tmp_path / "out").code == 0
    assert names(tmp_path / "out") == ["blocks.json", "pc.ram.raw", "vga.vram.raw"]
    assert (tmp_path / "out" / "pc.ram.raw").read_bytes() == pages(9, 1)
