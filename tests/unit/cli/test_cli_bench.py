"""The bench: every setting measured, the fastest named."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.cli import bench
from pyqmigrate.cli.bench_chart import chart
from pyqmigrate.cli.plot import check_place
from pyqmigrate.format.png import encode_png, is_marked
from tests.harness.command import Command

SVG = "{http://www.w3.org/2000/svg}"


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
        best = ran["best"][work]
        assert (best["channels"], best["direct_io"]) == (fastest["channels"], fastest["direct_io"])


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
    data = picture.read_bytes()
    assert is_marked(data[:64])
    assert data.count(b"tEXtSoftware") == 1
    theirs = tmp_path / "theirs.png"
    theirs.write_bytes(encode_png([b"\xff\0\0"], 1))
    ran = command("bench", "--dir", disk, "--plot", theirs)
    assert ran.code == 2
    assert "which has other content" in ran.err
    check_place(str(picture))  # it replaces its own


def test_plot_is_an_svg_without_matplotlib(
    disk: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "bench.svg"
    ran = command("bench", "--size", "8MiB", "--dir", disk, "--channels", "1,2", "--plot", picture)
    assert f"picture: {picture}" in ran.out
    texts = [text.text for text in ET.parse(picture).getroot().iter(f"{SVG}text")]
    conclusions = [line for line in ran.out.splitlines() if line.startswith("fastest ")]
    assert conclusions == [text for text in texts if text and text.startswith("fastest ")]


@pytest.mark.parametrize("name", ["bench.jpg", "bench"])
def test_picture_of_another_form_is_refused(
    disk: Path, tmp_path: Path, command: Command, name: str
) -> None:
    ran = command("bench", "--dir", disk, "--plot", tmp_path / name)
    assert ran.code == 2
    assert ".png or .svg" in ran.err


def results(*runs: tuple[float, ...]) -> list[dict[str, Any]]:
    """Settings of 1, 2 ... channels with these seconds, as a bench has them."""
    return [
        {
            "channels": number + 1,
            "direct_io": True,
            **{f"{work}_runs": list(seconds) for work in ("save", "load")},
            **{f"{work}_rate": 100 / sorted(seconds)[1] for work in ("save", "load")},
        }
        for number, seconds in enumerate(runs)
    ]


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ((2.0, 2.1, 2.2), False),
        ((3.1, 4.0, 5.0), True),
        ((3.0, 4.0, 5.0), False),
        ((2.2, 2.6, 2.9), False),
    ],
)
def test_ranges_that_overlap_are_no_clear_difference(
    other: tuple[float, ...], differs: bool
) -> None:
    best = bench._fastest(results((1.0, 2.05, 3.0), other), "save")
    equal = [named["channels"] for named in best["no_clear_difference"]]
    assert equal == ([] if differs else [3 - best["channels"]])
    said = bench._conclusion({"save": best}, "save")
    assert ("no clear difference: direct with" in said) is not differs


def test_chart_has_the_range_of_each_setting() -> None:
    runs = results((1.0, 1.5, 2.0), (0.5, 0.5, 0.5))
    root = ET.fromstring(chart(runs, 100 << 20, "t", {"save": "s", "load": "l"}))
    tips = [t.text for circle in root.iter(f"{SVG}circle") for t in circle.iter(f"{SVG}title")]
    assert "1 channel, direct: 0 MiB/s, 50 to 100" in tips
    assert len(tips) == 4


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
