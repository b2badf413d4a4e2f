"""When a live save by converge is given up, by what QEMU reports of its rounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyqmigrate.vm.outgoing.converge import Convergence

GIB = 1 << 30
DISK = 1.0 * GIB  # bytes/s
STEP = 0.01  # seconds between two looks


def states(ram: float, working_set: float, rate: float) -> Iterator[tuple[float, dict[str, int]]]:
    """What QEMU reports, every STEP, of a guest that writes ``rate`` bytes a second all over its
    working set; ends when the rest would fit into 20 ms."""
    now, number, rest, written = 100.0, 1, ram, 0.0
    while True:
        began_at, left = now, rest
        while left > 0:
            yield now, round_state(number, left, written)
            now += STEP
            moved = min(DISK * STEP, left)
            left, written = left - moved, written + moved
        rest = min(working_set, rate * (now - began_at))
        number += 1
        if rest <= DISK * 0.02:
            return


def round_state(number: int, rest: float, written: float) -> dict[str, int]:
    return {"dirty-sync-count": number, "remaining": int(rest), "transferred": int(written)}


def outcome(ram: float, working_set: float, rate: float) -> tuple[str | None, float, int]:
    """Why it was given up, or None, after how many seconds, in which round."""
    convergence = Convergence(0.02)
    now = number = 0
    for now, state in states(ram, working_set, rate):
        number = state["dirty-sync-count"]
        if (why := convergence.observe(now, state)) is not None:
            return why, now - 100, number
    return None, now - 100, number


@pytest.mark.parametrize("rate", [0, 0.05, 0.2, 0.4, 0.6])
def test_guest_that_writes_slower_than_the_disk_converges(rate: float) -> None:
    why, _, _ = outcome(4 * GIB, 4 * GIB, rate * GIB)
    assert why is None


@pytest.mark.parametrize("rate", [1.0, 1.5, 10])
@pytest.mark.parametrize("ram", [GIB // 8, GIB, 4 * GIB])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_guest_that_writes_faster_is_given_up_within_three_rounds_time(
    rate: float, ram: int, share: float
) -> None:
    why, seconds, _ = outcome(ram, ram * share, rate * GIB)
    assert why is not None
    assert seconds <= max(3 * ram / DISK, 1.0) + 2 * STEP


def test_it_is_given_up_as_soon_as_the_rest_does_not_shrink() -> None:
    _, seconds, number = outcome(4 * GIB, 4 * GIB, 2 * GIB)
    assert number == 3
    assert seconds == pytest.approx(8, abs=0.1)


def test_rest_that_shrinks_too_slowly_is_given_up() -> None:
    why, seconds, _ = outcome(4 * GIB, 4 * GIB, 0.9 * GIB)
    assert why is not None and seconds < 12


def test_small_working_set_is_waited_for_half_a_second_at_least() -> None:
    """Rounds of some milliseconds say little: the guest may write in bursts."""
    why, seconds, number = outcome(4 * GIB, GIB // 16, 2 * GIB)
    assert why is not None and number > 5
    assert 4.5 < seconds < 5.5


def test_burst_does_not_end_a_save_that_converges() -> None:
    convergence = Convergence(0.02)
    now, written = 0.0, 0.0
    rests = [GIB, GIB // 8, GIB // 8, GIB // 8, GIB // 64]
    for number, rest in enumerate(rests, 1):
        assert convergence.observe(now, round_state(number, rest, written)) is None
        now, written = now + rest / DISK, written + rest


def test_first_round_takes_as_long_as_it_takes() -> None:
    convergence = Convergence(0.02)
    for second in range(1000):
        state = round_state(1, GIB, second * 1000)
        assert convergence.observe(float(second), state) is None


def test_second_round_that_never_ends_is_given_up() -> None:
    convergence = Convergence(0.02)
    assert convergence.observe(0, round_state(1, GIB, 0)) is None
    assert convergence.observe(2, round_state(2, GIB, GIB)) is None
    assert convergence.observe(5.9, round_state(2, GIB // 2, GIB)) is None
    assert convergence.observe(6.1, round_state(2, GIB // 2, GIB)) is not None


def test_migration_that_has_not_begun_is_waited_for() -> None:
    convergence = Convergence(0.02)
    assert convergence.observe(0, {}) is None
    assert convergence.observe(9, {"dirty-sync-count": 0, "remaining": 0}) is None


def test_reason_has_the_figures() -> None:
    why, _, _ = outcome(GIB, GIB // 2, 2 * GIB)
    assert why is not None
    assert "512 MiB were left at the second round" in why
    assert "a pause of 20 ms has time for 20 MiB" in why


def test_guest_that_writes_nothing_is_saved_in_one_round() -> None:
    assert outcome(GIB, GIB, 0) == (None, pytest.approx(1.02, abs=0.05), 1)
