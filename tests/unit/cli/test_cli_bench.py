"""The bench: every setting measured, the fastest named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.harness.command import Command


def test_bench_measures_every_setting_three_times(disk: Path, command: Command) -> None:
    ran = command("bench", "--size", "8MiB", "--dir", disk, "--channels", "2,1", "--json").json
    settings = [(result["channels"], result["direct_io"]) for result in ran["results"]]
    assert settings == [(1, True), (1, False), (2, True), (2, False)]
    for result in ran["results"]:
        assert len(result["save_runs"]) == len(result["load_runs"]) == 3
    assert list(disk.iterdir()) == []


def test_fastest_has_the_largest_rate(disk: Path, command: Command) -> None:
    ran = command("bench", "--size", "8MiB", "--dir", disk, "--channels", "1,4", "--json").json
    for work in ("save", "load"):
        fastest = max(ran["results"], key=lambda r: r[f"{work}_rate"])
        assert ran["best"][work].items() <= fastest.items()


def test_table_marks_the_fastest(shm: Path, command: Command) -> None:
    ran = command("bench", "--size", "8MiB", "--dir", shm, "--channels", "1")
    assert ran.code == 0
    [row] = [line.split() for line in ran.out.splitlines() if line.startswith("1 ")]
    assert row[1] == "buffered"
    assert row.count("*") == 2
    assert "fastest save: 1 channel, buffered" in ran.out


def test_plot_is_a_picture(disk: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    ran = command(
        "bench", "--size", "8MiB", "--dir", disk, "--channels", "1,2", "--plot", picture, "--json"
    )
    assert ran.json["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_not_supported(
    disk: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = command("bench", "--dir", disk, "--plot", tmp_path / "bench.png")
    assert ran.code == 5
    assert "pip install" in ran.err


def test_picture_that_cannot_be_written_is_refused_before_measuring(
    disk: Path, tmp_path: Path, command: Command
) -> None:
    pytest.importorskip("matplotlib")
    assert command("bench", "--dir", disk, "--plot", tmp_path / "no/bench.png").code == 3


def test_missing_directory_is_refused_by_the_system(tmp_path: Path, command: Command) -> None:
    assert command("bench", "--dir", tmp_path / "no").code == 3
