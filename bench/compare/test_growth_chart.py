"""The chart of time and memory by size, which bench/compare draws."""

from __future__ import annotations

from pathlib import Path

from bench.compare.growth import GROWTH_WORK, SIZES, draw_growth
from bench.results import OURS, Results, Sample


def test_every_size_that_was_measured_is_in_the_chart(tmp_path: Path) -> None:
    results, picture = Results(), tmp_path / "growth.svg"
    for gib in SIZES:
        sample = Sample(gib / 7, facts={"memory_bytes": gib << 20})
        results.add(GROWTH_WORK, OURS, f"verify, {gib} GiB", sample)
    assert draw_growth(results, picture)
    drawn = picture.read_text()
    for gib in SIZES:
        assert f"verify: {gib / 7:.3g}<" in drawn
        assert f"verify: {gib:.3g}<" in drawn


def test_nothing_is_drawn_without_measurements(tmp_path: Path) -> None:
    assert not draw_growth(Results(), tmp_path / "growth.svg")
    assert not (tmp_path / "growth.svg").exists()
