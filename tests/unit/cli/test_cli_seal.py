"""Sealing and verifying from the command line."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate import RamBlock, save, verify_seal
from pyqmigrate.integrity import seal as sealing
from pyqmigrate.io.channels import Channels
from pyqmigrate.snapshot.sequential import SequentialSnapshot
from tests.harness.command import PAGE, Command, make_snapshot, pages
from tests.harness.sealed import MIB, Sealed
from tests.harness.snapshots import ram, turn_bitmaps
from tests.harness.stream_builders import page_records, sequential_stream


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    return Sealed.make(tmp_path / "guest")


def test_seal_writes_one_and_reports_it(snapshot: Path, command: Command) -> None:
    ran = command("seal", snapshot, "--json")
    assert (ran.code, ran.err) == (0, "")
    report = ran.json
    size = snapshot.stat().st_size
    assert report["snapshot"] == str(snapshot)
    assert report["seal"] == {"path": f"{snapshot}.seal", "algorithm": "xxh3-128"}
    assert (report["file_size"], report["channels"], report["cleared_pages"]) == (size, 4, 0)
    assert report["clear_pages_zero"] is True
    assert Path(report["seal"]["path"]).is_file()


def test_seal_for_people_names_the_file_and_the_algorithm(snapshot: Path, command: Command) -> None:
    out = command("seal", snapshot, "--algorithm", "blake3").out
    assert out.startswith(f"{snapshot}.seal: blake3 of ")


def test_clear_pages_with_old_bytes_are_reported(sealed: Sealed, command: Command) -> None:
    sealed.stale("small", 2)
    ran = command("verify", sealed.path)
    assert ran.code == 1  # it was sealed without them
    sealed.seal.unlink()
    deep = command("verify", sealed.path, "--deep", "--json")
    assert (deep.code, deep.json["stale_blocks"]) == (0, {"small": 2})
    assert "2 clear pages" in command("seal", sealed.path).out
    deep = command("verify", sealed.path, "--deep", "--json")
    assert (deep.code, deep.json["stale_blocks"]) == (0, {})


def test_file_of_a_big_endian_host_is_noted_and_sealed_when_it_is_said(
    disk: Path, command: Command
) -> None:
    path = disk / "s"
    save(path, [RamBlock("ram", ram(1024))], sparse="exact")
    turn_bitmaps(path)
    ran = command("verify", path, "--json")
    assert (ran.code, ran.json["bitmap_order"]) == (0, "little")
    assert "--bitmap-order big" in ran.json["notes"][0]
    assert "note      the bitmaps fit" in command("verify", path).out
    info = command("info", path, "--json").json
    assert info["bitmap_order"] == "little"
    assert any("--bitmap-order big" in remark for remark in info["remarks"])
    ran = command("seal", path, "--json")
    assert ran.code == 2
    assert "--bitmap-order big" in ran.json["error"]["message"]
    ran = command("seal", path, "--bitmap-order", "big", "--json")
    assert (ran.code, ran.json["bitmap_order"], ran.json["cleared_pages"]) == (0, "big", 0)
    ran = command("verify", path, "--bitmap-order", "big", "--json")
    assert (ran.code, ran.json["bitmap_order"], ran.json["notes"]) == (0, "big", [])


def test_verify_of_an_intact_file_exits_0(sealed: Sealed, command: Command) -> None:
    ran = command("verify", sealed.path, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["valid"] is True
    seal = ran.json["seal"]
    assert (seal["intact"], seal["damages"], seal["notes"]) == (True, [], [])
    assert seal["path"] == str(sealed.seal)
    assert "nothing has changed" in command("verify", sealed.path).out


def test_verify_names_the_block_mib_and_file_offset_and_exits_1(
    sealed: Sealed, command: Command
) -> None:
    _, at = sealed.block("big")
    sealed.write(at + MIB + 99, b"????")
    ran = command("verify", sealed.path, "--json")
    assert (ran.code, ran.err) == (1, "")
    assert ran.json["valid"] is False
    [found] = ran.json["seal"]["damages"]
    assert (found["mib"], found["offset"], found["length"]) == (at // MIB + 1, at + MIB, MIB)
    [part] = found["parts"]
    assert (part["block"], part["first_page"], part["end_page"]) == ("big", 256, 512)
    out = command("verify", sealed.path).out
    assert f"MiB {at // MIB + 1}, file offset {at + MIB:#x}" in out
    assert "block 'big', pages 256 to 511" in out


def test_cut_file_is_recognized_by_the_seal(sealed: Sealed, command: Command) -> None:
    os.truncate(sealed.path, MIB)
    ran = command("verify", sealed.path)
    assert ran.code == 1
    assert "missing" in ran.out
    assert "block 'big'" in ran.out


def test_verify_of_a_damaged_seal_is_an_error(sealed: Sealed, command: Command) -> None:
    os.truncate(sealed.seal, 100)
    ran = command("verify", sealed.path, "--json")
    assert ran.code == 1
    assert ran.json["error"]["field"] == "seal"


def test_hostile_names_in_a_seal_are_shown_escaped(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "s"
    make_snapshot(path, {"\x1b]0;owned\x07": pages(3)}, seal="xxh3-128")
    os.truncate(path, MIB + 5)
    out = command("verify", path).out
    assert r"\x1b]0;owned\x07" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_verify_deep_decodes_device_state(snapshot: Path, command: Command) -> None:
    ran = command("verify", snapshot, "--deep", "--json")
    assert (ran.code, ran.json["device_count"]) == (0, 0)
    assert "device state" in command("verify", snapshot, "--deep").out


def test_verify_deep_looks_at_the_snapshot_as_it_was_opened(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd"
    path.write_bytes(sequential_stream(page_records(1024), description=None))
    assert command("verify", path, "--deep").code == 1, "its page size can be guessed"
    passes, channels = [], []
    walk, find = SequentialSnapshot._walk, sealing.find_stale

    def noted_walk(self: SequentialSnapshot, *arguments: Any) -> Any:
        passes.append(self)
        return walk(self, *arguments)

    def noted_find(snapshot: Any, workers: Channels) -> dict[str, int]:
        channels.append(workers.count)
        return find(snapshot, workers)

    monkeypatch.setattr(SequentialSnapshot, "_walk", noted_walk)
    monkeypatch.setattr(sealing, "find_stale", noted_find)
    deep = ["verify", "--deep", "--json"]
    index = tmp_path / "index"
    ran = command(*deep, path, "--page-size", "1KiB", "--index", index)
    assert (ran.code, ran.json["device_count"]) == (0, 0)
    assert index.exists()
    assert len(passes) == 1
    channels.clear()
    make_snapshot(tmp_path / "mapped", {"ram": pages(8)})
    assert command(*deep, tmp_path / "mapped", "--channels", "3").code == 0
    assert channels == [3]


@pytest.mark.parametrize(
    ("option", "algorithm"),
    [("--seal", "xxh3-128"), ("--seal=blake3", "blake3"), ("--seal=sha256", "sha256")],
)
@pytest.mark.parametrize("first", [True, False])
def test_pack_seals_what_it_writes(
    tmp_path: Path, command: Command, option: str, algorithm: str, first: bool
) -> None:
    (tmp_path / "raw").write_bytes(pages(9))
    arguments = [tmp_path / "guest", f"ram={tmp_path}/raw"]
    ran = command("pack", "--json", *([option, *arguments] if first else [*arguments, option]))
    assert (ran.code, ran.json["seal"]["algorithm"]) == (0, algorithm)
    check = verify_seal(tmp_path / "guest")
    assert check is not None
    assert (check.intact, check.algorithm) == (True, algorithm)


def test_pack_without_seal_says_so_and_writes_none(tmp_path: Path, command: Command) -> None:
    (tmp_path / "--seal").write_bytes(bytes(PAGE))
    ran = command("pack", tmp_path / "guest", "--json", "--", f"ram={tmp_path}/--seal")
    assert (ran.code, ran.json["seal"]) == (0, None)
    assert not (tmp_path / "guest.seal").exists()


def test_snapshot_that_a_guest_runs_from_and_has_to_be_changed_is_refused(
    sealed: Sealed, command: Command
) -> None:
    sealed.stale("big", 1)
    with sealed.path.open("rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        ran = command("seal", sealed.path, "--json")
    assert ran.code == 3
    assert "a guest runs from it" in ran.json["error"]["message"]


def test_missing_blake3_is_not_supported(
    snapshot: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    assert command("seal", snapshot, "--algorithm", "blake3").code == 5
    assert not Path(f"{snapshot}.seal").exists()


def test_offset_is_where_the_stream_starts(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "s"
    make_snapshot(f"file:{path},offset=8192", {"ram": pages(3)})
    assert command("seal", path).code == 1
    assert command("seal", path, "--offset", "8KiB").code == 0
    assert command("verify", path, "--offset", "8KiB").code == 0


def test_sequential_stream_is_sealed(tmp_path: Path, snapshot: Path, command: Command) -> None:
    with pyqmigrate.open_snapshot(snapshot) as opened:
        pyqmigrate.convert(opened, tmp_path / "stream", to="stream")
    assert command("seal", tmp_path / "stream", "--json").json["clear_pages_zero"] is False
    assert command("verify", tmp_path / "stream", "--deep").code == 0
