"""The sizes of large stores in docs/internals/store-format.md are those that follow from the format."""

from __future__ import annotations

import re
from array import array
from pathlib import Path

import pytest

from pyqmigrate.format.store.config import FRAME_PAGES_MAX
from pyqmigrate.format.store.pack import PACK_MAX, TRAILER_SIZE, footer_size
from pyqmigrate.format.store.snapshot import BODY_MAX, PageRuns

PAGE = (Path(__file__).parents[4] / "docs/internals/store-format.md").read_text()
GIB = 1 << 30
DATA_PAGES = 96_000_000  # of a guest of 1 TiB
STORED = 165.4 * 1024 * (1 << 20)  # bytes: 1,024 times the first snapshot
PACKS = STORED / PACK_MAX


def documented(pattern: str) -> list[float]:
    found = re.search(pattern, PAGE)
    assert found, pattern
    return [float(number.replace(",", "")) for number in found.groups()]


def test_packs_and_footers_of_a_tib() -> None:
    size, count = documented(r"packs \| ([\d.]+) GiB in ([\d,]+) objects")
    assert size * GIB == pytest.approx(STORED, rel=0.05)
    assert count == pytest.approx(PACKS, rel=0.05)
    pages = int(DATA_PAGES / PACKS)
    footers = PACKS * (footer_size(pages // FRAME_PAGES_MAX, pages, 0, 0) + TRAILER_SIZE)
    (documented_size,) = documented(r"footers of all packs \| ([\d.]+) GiB")
    assert documented_size * GIB == pytest.approx(footers, rel=0.1)


def test_memory_of_the_adder_of_a_tib() -> None:
    low, high = documented(r"memory of the adder \| ([\d.]+) to ([\d.]+) GiB")
    # 24 to 32 bytes a page
    assert low * GIB == pytest.approx(24 * DATA_PAGES, rel=0.1)
    assert high * GIB == pytest.approx(32 * DATA_PAGES, rel=0.1)


def test_runs_that_a_document_can_have() -> None:
    """The body is at most 1 GiB, and has four numbers for each run."""
    runs = PageRuns(array("Q"), array("I"), array("I"), array("I"))
    columns = (runs.firsts, runs.counts, runs.packs, runs.pages)
    (millions,) = documented(r"reached at (\d+) million runs")
    assert millions * 1e6 == pytest.approx(
        BODY_MAX / sum(column.itemsize for column in columns), rel=0.1
    )
