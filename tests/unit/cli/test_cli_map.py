"""The verb map."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.analysis import Extent
from pyqmigrate.cli.map import read_extent
from pyqmigrate.format.png import encode_png
from tests.harness.command import Command, make_snapshot, pages


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def test_in_a_pipe_it_is_plain_text_of_80_columns(snapshot: Path, command: Command) -> None:
    ran = command("map", snapshot, "--by", "block")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "pc.ram" in ran.out
    assert max(map(len, ran.out.splitlines()[1:-6])) <= 80
    assert "█" in ran.out


def test_colours_can_be_asked_for(snapshot: Path, command: Command) -> None:
    assert "\x1b[38;2;" in command("map", snapshot, "--colours", "true").out
    assert "\x1b[38;5;" in command("map", snapshot, "--colours", "256").out


def test_its_width_is_that_of_the_terminal(
    snapshot: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    rows = [line for line in command("map", snapshot).out.splitlines() if " 0x" in line]
    assert max(map(len, rows)) <= 30


@pytest.mark.parametrize(
    ("form", "head"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("html", b"<!DOCTYPE html>")]
)
def test_a_picture_is_written_whole_and_for_its_owner_only(
    form: str, head: bytes, snapshot: Path, command: Command, tmp_path: Path
) -> None:
    target = tmp_path / "picture"
    ran = command("map", snapshot, f"--{form}", target, "--json")
    assert ran.code == 0
    assert ran.json["picture"] == str(target)
    assert "areas" not in ran.json
    assert target.read_bytes().startswith(head)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert command("map", snapshot, f"--{form}", target).code == 0  # it replaces its own


@pytest.mark.parametrize("form", ["png", "svg", "html"])
def test_a_file_of_another_kind_is_not_replaced(
    form: str, snapshot: Path, command: Command, tmp_path: Path
) -> None:
    target = tmp_path / "notes"
    target.write_text("not a picture")
    assert command("map", snapshot, f"--{form}", target).code == 2
    assert command("map", snapshot, f"--{form}", snapshot).code == 2
    assert target.read_text() == "not a picture"
    with open_snapshot(snapshot) as opened:
        opened.verify()


@pytest.mark.parametrize(
    ("form", "theirs"),
    [
        ("png", encode_png([b"\xff\0\0"], 1)),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="1"></svg>'),
        ("html", b"<!DOCTYPE html>\n<html><body>notes</body></html>"),
    ],
)
def test_pictures_and_pages_of_others_are_not_replaced(
    form: str, theirs: bytes, snapshot: Path, command: Command, tmp_path: Path
) -> None:
    target = tmp_path / f"index.{form}"
    target.write_bytes(theirs)
    ran = command("map", snapshot, f"--{form}", target)
    assert ran.code == 2
    assert "which has other content: move that file, or choose another name" in ran.err
    assert target.read_bytes() == theirs


def test_changed_pages_are_marked(snapshot: Path, command: Command, tmp_path: Path) -> None:
    blocks = {"pc.ram": pages(9, 7), "vga.vram": pages(6, 2)}
    make_snapshot(tmp_path / "other", blocks, machine="pc-q35-10.0")
    ran = command("map", snapshot, tmp_path / "other", "--by", "block")
    assert ran.code == 0
    assert "x" in ran.out
    assert f"changed against {tmp_path / 'other'}" in ran.out


def test_a_range_is_all_that_is_shown(snapshot: Path, command: Command) -> None:
    ran = command("map", snapshot, "--range", "vga.vram:4096+8192", "--json")
    assert [area["block"] for area in ran.json["areas"]] == ["vga.vram"]
    assert ran.json["length"] == 8192
    assert command("map", snapshot, "--range", "nothing", "--json").code == 2


def test_bytes_are_for_a_page_of_html(snapshot: Path, command: Command) -> None:
    ran = command("map", snapshot, "--bytes", "pc.ram")
    assert ran.code == 2
    assert "--html" in ran.err


@pytest.mark.parametrize(
    ("text", "extent"),
    [
        ("0x1000-0x2000", Extent(0x1000, 0x2000)),
        ("1M+4K", Extent(1 << 20, (1 << 20) + 4096)),
        ("pc.ram", Extent(0, 1 << 64, "pc.ram")),
        ("pc.ram:0-1M", Extent(0, 1 << 20, "pc.ram")),
        ("0000:00:01.0/vga.vram", Extent(0, 1 << 64, "0000:00:01.0/vga.vram")),
        ("0000:00:01.0/vga.vram:0+4096", Extent(0, 4096, "0000:00:01.0/vga.vram")),
        ("ram-node0", Extent(0, 1 << 64, "ram-node0")),
    ],
)
def test_a_range_is_of_addresses_or_of_a_block(text: str, extent: Extent) -> None:
    assert read_extent(text) == extent


def test_a_range_that_ends_before_it_starts_is_refused(snapshot: Path, command: Command) -> None:
    assert command("map", snapshot, "--range", "2M-1M").code == 2


def test_it_says_what_is_missing_for_an_image(
    snapshot: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    ran = command("map", snapshot, "--png", tmp_path / "picture.png")
    assert ran.code == 5
    assert "pip install pillow" in ran.err
