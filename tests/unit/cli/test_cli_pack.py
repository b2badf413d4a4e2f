"""Raw memory files into a snapshot."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.command import PAGE, Command, child, pages


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "memory.raw"
    path.write_bytes(pages(9))
    return path


def test_packed_file_holds_the_bytes_of_the_raw_file(
    tmp_path: Path, raw: Path, command: Command
) -> None:
    target = tmp_path / "guest.mapped"
    ran = command("pack", target, f"pc.ram={raw}", "--machine", "pc-q35-10.0")
    assert ran.code == 0
    with open_snapshot(target) as snapshot:
        assert snapshot.machine == "pc-q35-10.0"
        assert snapshot.blocks["pc.ram"].read(0, 9 * PAGE) == pages(9)


def test_json_shows_what_was_written(tmp_path: Path, raw: Path, command: Command) -> None:
    target = tmp_path / "guest.mapped"
    ran = command(
        "pack",
        target,
        f"pc.ram={raw}",
        "--json",
        "--channels",
        "3",
        "--direct-io",
        "off",
        "--sparse",
        "exact",
    )
    assert ran.err == ""
    report = ran.json
    assert (report["data_pages"], report["zero_pages"]) == (6, 3)
    assert report["file_size"] == target.stat().st_size
    assert (report["channels"], report["direct_io"], report["sparse"]) == (3, False, "exact")
    assert report["direct_io_reason"] == "switched off"


def test_block_name_may_contain_equals_signs(tmp_path: Path, raw: Path, command: Command) -> None:
    target = tmp_path / "guest.mapped"
    assert command("pack", target, f"a=b=c={raw}").code == 0
    with open_snapshot(target) as snapshot:
        assert list(snapshot.blocks) == ["a=b=c"]


def test_snapshot_at_an_offset_leaves_what_is_before_it(
    tmp_path: Path, raw: Path, command: Command
) -> None:
    target = tmp_path / "guest.mapped"
    target.write_bytes(b"X" * 4096)
    assert command("pack", target, f"pc.ram={raw}", "--offset", "4KiB").code == 0
    assert target.read_bytes()[:4096] == b"X" * 4096
    assert command("verify", target, "--offset", "4KiB").code == 0
    assert command("verify", target).code == 1


def test_memory_that_is_to_be_overwritten_in_place_is_left_alone(
    raw: Path, command: Command
) -> None:
    ran = command("pack", raw, f"pc.ram={raw}", "--offset", "4KiB")
    assert ran.code == 2
    assert raw.read_bytes() == pages(9)


def test_half_a_page_is_wrong_usage_and_leaves_nothing(tmp_path: Path, command: Command) -> None:
    (tmp_path / "memory.raw").write_bytes(b"x" * 100)
    ran = command("pack", tmp_path / "guest.mapped", f"pc.ram={tmp_path}/memory.raw")
    assert ran.code == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "memory.raw"]


def test_missing_memory_file_is_refused_by_the_system(tmp_path: Path, command: Command) -> None:
    assert command("pack", tmp_path / "guest.mapped", f"a={tmp_path}/nowhere").code == 3
    assert list(tmp_path.iterdir()) == []


def test_fifo_as_memory_is_wrong_usage_and_does_not_hang(tmp_path: Path, command: Command) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert command("pack", tmp_path / "guest.mapped", f"a={tmp_path}/fifo").code == 2


def test_file_is_for_its_owner_only(tmp_path: Path, raw: Path, command: Command) -> None:
    command("pack", tmp_path / "guest.mapped", f"pc.ram={raw}")
    assert stat.S_IMODE((tmp_path / "guest.mapped").stat().st_mode) == 0o600


def test_name_of_undecodable_bytes_goes_through_the_shell(
    tmp_path: Path, raw: Path, child_environment: dict[str, str]
) -> None:
    name = os.fsdecode(b"ram\xff")
    ran = child("pack", tmp_path / "g", f"{name}={raw}", environment=child_environment)
    assert ran.returncode == 0
    ran = child("info", tmp_path / "g", environment=child_environment)
    assert r"ram\udcff" in ran.stdout
