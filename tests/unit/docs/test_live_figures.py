"""The pauses that docs/vm.md and docs/live.md give for the live methods are those that a save expects."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyqmigrate.vm.plan import (
    live_background,
    live_changed,
    live_converge,
    live_option,
    live_precopy,
)

DOCS = Path(__file__).parents[3] / "docs"
GIB = 1 << 30


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:g} ms"


def row(method: str) -> str:
    """Return the pause in the row of a method in the table of docs/vm.md."""
    [line] = re.findall(rf"^\| `{method}` \|.*$", (DOCS / "vm.md").read_text(), re.MULTILINE)
    return line.split(" | ")[2]


@pytest.mark.parametrize(
    ("method", "figures"),
    [
        ("converge", [ms(live_converge.DEFAULT_PAUSE)]),
        (
            "changed",
            [ms(live_changed._STOP), f"{GIB / live_changed._COPY_RATE:.1f} s a GiB changed"],
        ),
        (
            "background",
            [
                ms(live_background._LEAST),
                f"{ms(live_background._PRIVATE)} a GiB",
                f"{ms(live_background._SHARED)} if it is shared",
                f"{ms(live_background._HUGE)} in huge pages",
            ],
        ),
        (
            "precopy",
            [
                ms(live_precopy._SECONDS),
                f"{live_precopy._SECONDS_PER_GIB:g} s a GiB",
                f"{live_precopy._SECONDS_PER_PRIVATE_GIB:g} s if it is private",
            ],
        ),
    ],
)
def test_table_of_the_methods_has_the_expected_pauses(method: str, figures: list[str]) -> None:
    assert [figure for figure in figures if figure not in row(method)] == []


def test_page_on_live_saves_has_the_expected_pause_of_a_disk() -> None:
    text = " ".join((DOCS / "live.md").read_text().split())
    assert f"expect {ms(live_option._DISK_PAUSE)} a disk" in text


def test_page_on_live_saves_has_the_time_of_comparing_digests() -> None:
    text = " ".join((DOCS / "live.md").read_text().split())
    assert f"about {live_changed._DIGEST_SECONDS_PER_GIB:g} s a GiB" in text
