"""The verbs of ``fleet``: what they print, their JSON and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate.store import Store
from tests.harness.command import Command
from tests.harness.fleet import make_fleet
from tests.harness.increment_files import save_base
from tests.harness.json_page import assert_as_documented
from tests.harness.snapshots import ram, save_known


@pytest.fixture
def snaps(tmp_path: Path) -> Path:
    """Three snapshots, one of them damaged, and another file."""
    make_fleet(tmp_path / "snaps", 3, 1)
    (tmp_path / "snaps" / "notes").write_text("notes")
    return tmp_path / "snaps"


def test_verify_names_what_is_damaged_and_what_is_skipped(snaps: Path, command: Command) -> None:
    ran = command("fleet", "verify", snaps)
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"damaged   {snaps}/guest-001.mapped: MiB 1, file offset 0x100000")
    assert lines[1] == f"skipped   {snaps}/notes: not a snapshot"
    assert lines[2].startswith("3 snapshots: 2 good, 1 damaged, 1 other file skipped; ")


def test_a_second_run_says_so_and_the_exit_code_stays(
    snaps: Path, tmp_path: Path, command: Command
) -> None:
    arguments = ("fleet", "verify", snaps, "--table", tmp_path / "t.db")
    assert command(*arguments).code == 1
    ran = command(*arguments)
    assert ran.code == 1
    assert "4 done before" in ran.out


def test_all_that_is_good_is_exit_code_0(tmp_path: Path, command: Command) -> None:
    save_known(tmp_path / "guest")
    ran = command("fleet", "verify", tmp_path / "guest")
    assert (ran.code, ran.out.split(";")[0]) == (0, "1 snapshot: 1 good")


def test_what_cannot_be_read_is_exit_code_3(tmp_path: Path, command: Command) -> None:
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(100))
    ran = command("fleet", "verify", tmp_path / "disk")
    assert ran.code == 3
    assert ran.out.startswith(f"failed    {tmp_path}/disk: ")


def test_info_prints_a_line_for_each(tmp_path: Path, command: Command) -> None:
    save_base(tmp_path / "guest", {"ram": ram(64)})
    out = command("fleet", "info", tmp_path).out.splitlines()
    assert out[0].split()[:3] == ["snapshot", "kind", "machine"]
    assert out[1].split()[:3] == [str(tmp_path / "guest"), "mapped-ram", "pc-q35-10.0"]


def test_a_name_with_control_characters_is_shown_safely(tmp_path: Path, command: Command) -> None:
    (tmp_path / "a\x1b[2J\nb").write_text("no snapshot")
    out = command("fleet", "verify", tmp_path).out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("verb", ["verify", "info", "seal", "add", "table"])
def test_json_has_the_documented_keys(
    verb: str, snaps: Path, tmp_path: Path, command: Command
) -> None:
    table, store = tmp_path / "t.db", tmp_path / "store"
    arguments: list[str | Path] = [snaps, "--table", table]
    if verb == "add":
        Store.create(store).close()
        arguments += ["--store", store]
    if verb == "table":
        command("fleet", "verify", snaps, "--table", table)
        arguments = [table]
    ran = command("fleet", verb, *arguments, "--json")
    assert ran.code in (0, 1), ran.err
    assert_as_documented(f"fleet {verb}", ran.json)


def test_table_prints_the_results_that_are_asked_for(
    snaps: Path, tmp_path: Path, command: Command
) -> None:
    table = tmp_path / "t.db"
    command("fleet", "verify", snaps, "--table", table)
    command("fleet", "info", snaps, "--table", table)
    assert command("fleet", "table", table).out.splitlines()[-1] == "8 results"
    ran = command("fleet", "table", table, "--verb", "verify", "--verdict", "damaged")
    assert ran.out.splitlines()[1].split()[:3] == [f"{snaps}/guest-001.mapped", "verify", "damaged"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",),
        ("verify", "{missing}"),
        ("verify", "{snaps}", "--jobs", "0"),
        ("verify", "{snaps}", "--again"),
        ("verify", "{snaps}", "--scheduler", "nonsense"),
        ("verify", "{snaps}", "--table", "{snaps}/notes"),
        ("add", "{snaps}"),
        ("add", "{snaps}", "--store", "{snaps}"),
        ("seal", "memory://x/"),
        ("table", "{missing}"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused_before_anything_is_done(
    arguments: tuple[str, ...], snaps: Path, tmp_path: Path, command: Command
) -> None:
    words = [word.format(snaps=snaps, missing=tmp_path / "missing") for word in arguments]
    before = sorted(tmp_path.rglob("*"))
    ran = command("fleet", *words)
    assert ran.code in (2, 3)
    assert ran.err
    assert sorted(tmp_path.rglob("*")) == before
