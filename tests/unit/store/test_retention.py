"""What ``--keep`` keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.store.retention import Dated, Retention


@pytest.fixture(autouse=True, scope="module")
def _utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def at(text: str, name: str | None = None, group: str = "guest") -> Dated:
    when = datetime.fromisoformat(text + "+00:00")
    return Dated(name or text, group, int(when.timestamp()) * 10**9)


def kept(rules: str, *snapshots: Dated) -> list[str]:
    return sorted(Retention.parse(rules).kept(snapshots))


def test_the_newest_snapshot_of_each_of_the_last_days_is_kept() -> None:
    days = [at(f"2026-03-0{day}T{hour:02}:00") for day in (1, 2, 3, 5) for hour in (3, 20)]
    assert kept("3d", *days) == ["2026-03-02T20:00", "2026-03-03T20:00", "2026-03-05T20:00"]


def test_days_without_a_snapshot_do_not_count() -> None:
    assert kept("2d", at("2020-01-01T00:00"), at("2026-01-01T00:00")) == [
        "2020-01-01T00:00",
        "2026-01-01T00:00",
    ]


def test_a_week_begins_on_monday() -> None:
    sunday, monday, tuesday = (at(f"2026-03-0{day}T12:00") for day in (1, 2, 3))
    assert kept("2w", sunday, monday, tuesday) == [sunday.name, tuesday.name]


def test_weeks_at_the_turn_of_a_year_are_one_week() -> None:
    assert kept("5w", at("2025-12-30T00:00"), at("2026-01-02T00:00")) == ["2026-01-02T00:00"]


def test_months_years_and_hours() -> None:
    snapshots = [at("2025-05-05T00:00"), at("2026-05-05T00:00"), at("2026-05-05T00:30")]
    assert kept("9m", *snapshots) == ["2025-05-05T00:00", "2026-05-05T00:30"]
    assert kept("1y", *snapshots) == ["2026-05-05T00:30"]
    assert kept("9h", *snapshots) == ["2025-05-05T00:00", "2026-05-05T00:30"]


def test_a_snapshot_that_one_rule_keeps_is_kept() -> None:
    start = datetime(2026, 1, 1)
    days = [at((start + timedelta(days=n)).isoformat()) for n in range(90)]
    found = kept("7d/4w/2m", *days)
    assert found[-7:] == [day.name for day in days[-7:]]
    assert "2026-02-28T00:00:00" in found  # the newest of its month
    assert len(found) == 7 + 2 + 1  # two weeks and a month are those of kept days


def test_each_guest_is_for_itself() -> None:
    assert kept("1d", at("2026-01-01T00:00", "a", "1"), at("2026-01-02T00:00", "b", "2")) == [
        "a",
        "b",
    ]


def test_of_two_at_the_same_instant_one_is_kept() -> None:
    assert kept("1d", at("2026-01-01T00:00", "a"), at("2026-01-01T00:00", "b")) == ["b"]


def test_times_that_no_calendar_has_are_kept_apart() -> None:
    far = [Dated("a", "g", 2**62), Dated("b", "g", -(2**62)), Dated("c", "g", 2**63 - 1)]
    assert len(Retention.parse("3d").kept(far)) == 3


@pytest.mark.parametrize(
    "text", ["", "7", "d", "7x", "0d", "-1d", "7d/", "7d//4w", "7d/3d", "1.5d", "7 d", "7d,4w"]
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="7d/4w/12m"):
        Retention.parse(text)


@given(
    st.lists(st.integers(0, 3 * 10**18), max_size=40), st.integers(1, 9), st.sampled_from("hdwmy")
)
def test_the_newest_is_always_kept_and_more_rules_keep_more(
    times: list[int], number: int, unit: str
) -> None:
    snapshots = [Dated(str(n), "g", when) for n, when in enumerate(times)]
    found = Retention.parse(f"{number}{unit}").kept(snapshots)
    assert len(found) <= number
    if times:
        newest = max(snapshots, key=lambda snapshot: (snapshot.time_ns, snapshot.name))
        assert newest.name in found
    assert found <= Retention.parse(f"{number + 1}{unit}").kept(snapshots)
