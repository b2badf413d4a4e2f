"""What info and verify say about a snapshot."""

from __future__ import annotations

from pathlib import Path

from pyqmigrate import open_snapshot
from tests.harness.command import PAGE, Command, make_snapshot, pages


def test_info_shows_machine_blocks_and_sections(snapshot: Path, command: Command) -> None:
    lines = command("info", snapshot).out.splitlines()
    assert lines[0].split() == ["machine", "pc-q35-10.0"]
    [ram] = [line.split() for line in lines if line.startswith("pc.ram")]
    assert ram[:7] == ["pc.ram", "36.0", "KiB", "4.0", "KiB", "6", "3"]
    kinds = [line.split()[1] for line in lines if line.startswith("ram ")]
    assert kinds == ["start", "part", "end"]


def test_info_json_has_every_documented_key(snapshot: Path, command: Command) -> None:
    info = command("info", snapshot, "--json").json
    assert set(info) == {
        "schema",
        "snapshot",
        "kind",
        "machine",
        "capabilities",
        "target_page_bits",
        "uuid",
        "offset",
        "end",
        "file_size",
        "bytes_allocated",
        "total_ram",
        "complete",
        "opaque_tail",
        "blocks",
        "sections",
        "background",
        "increment",
        "libvirt",
        "written_by",
        "run_state",
        "loadable",
        "obstacles",
        "remarks",
        "bitmap_order",
    }
    assert info["capabilities"] == ["mapped-ram"]
    assert info["total_ram"] == 15 * PAGE
    assert info["file_size"] == info["end"] == snapshot.stat().st_size
    assert info["bytes_allocated"] == snapshot.stat().st_blocks * 512
    assert info["complete"] is True
    with open_snapshot(snapshot) as opened:
        layout = opened.blocks["vga.vram"].layout
    assert info["blocks"][1] == {
        "name": "vga.vram",
        "length": 6 * PAGE,
        "page_size": PAGE,
        "pages": 6,
        "data_pages": 4,
        "zero_pages": 2,
        "bitmap_offset": layout.bitmap_offset,
        "pages_offset": layout.pages_offset,
        "external": False,
    }
    assert info["sections"][0]["kind"] == "start"
    assert info["sections"][0]["name"] == "ram"


def test_info_shows_where_the_stream_starts(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "s"
    make_snapshot(f"file:{path},offset=8192", {"ram": pages(3)})
    assert command("info", path).code == 1
    info = command("info", path, "--offset", "8KiB", "--json").json
    assert info["offset"] == 8192


def test_offset_that_is_given_twice_is_wrong_usage(snapshot: Path, command: Command) -> None:
    uri = f"file:{snapshot},offset=4096"
    assert command("info", uri, "--offset", "4096").code == 2


def test_hostile_names_are_shown_escaped(tmp_path: Path, command: Command) -> None:
    make_snapshot(tmp_path / "s", {"\x1b]0;owned\x07\udcff\u202e": pages(3)}, machine="\x1b[2J")
    out = command("info", tmp_path / "s").out
    assert r"\x1b]0;owned\x07\udcff\u202e" in out
    assert r"\x1b[2J" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_bitmap_of_a_big_endian_host_is_read(tmp_path: Path, command: Command) -> None:
    path, memory = tmp_path / "s", pages(128)
    make_snapshot(path, {"ram": memory})
    with open_snapshot(path) as opened:
        at = opened.blocks["ram"].bitmap_offset
    data = path.read_bytes()
    turned = data[at : at + 8][::-1] + data[at + 8 : at + 16][::-1]
    path.write_bytes(data[:at] + turned + data[at + 16 :])
    for order, equal in (("big", True), ("little", False)):
        raw = tmp_path / order
        assert command("unpack", path, raw, "--bitmap-order", order).code == 0
        assert ((raw / "ram.raw").read_bytes() == memory) is equal


def test_verify_accepts_a_whole_snapshot(snapshot: Path, command: Command) -> None:
    ran = command("verify", snapshot, "--json")
    assert ran.code == 0
    assert ran.json == {
        "schema": 1,
        "snapshot": str(snapshot),
        "valid": True,
        "seal": None,
        "block_count": 2,
        "data_pages": 10,
        "zero_pages": 5,
        "bitmap_order": "little",
        "notes": [],
    }


def test_verify_refuses_a_truncated_snapshot(snapshot: Path, command: Command) -> None:
    with snapshot.open("r+b") as file:
        file.truncate(snapshot.stat().st_size // 2)
    assert command("verify", snapshot).code == 1


def test_verify_refuses_bits_past_the_end_of_a_block(snapshot: Path, command: Command) -> None:
    with open_snapshot(snapshot) as opened:
        at = opened.blocks["pc.ram"].bitmap_offset
    with snapshot.open("r+b") as file:
        file.seek(at + 7)
        file.write(b"\x80")
    ran = command("verify", snapshot, "--json")
    assert ran.code == 1
    assert ran.json["error"]["block"] == "pc.ram"
    assert ran.json["error"]["field"] == "bitmap"


def test_channel_of_multifd_is_not_supported(tmp_path: Path, command: Command) -> None:
    (tmp_path / "channel").write_bytes(bytes.fromhex("11223344") + bytes(100))
    assert command("verify", tmp_path / "channel").code == 5
