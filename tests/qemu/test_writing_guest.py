"""The guest that snapshots of a running machine are proven with, and the recorder of its pauses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.harness import verbs
from tests.harness.gaps import GapRecorder
from tests.harness.writing_guest import PAGE, GuestSetup, Instant, check_snapshot, restore, start

pytestmark = pytest.mark.qemu

MIB = 1 << 20
RATE = 20e6
SETUP = GuestSetup(working_set=8 * MIB, filled=8 * MIB)
KINDS = [
    ("q35", "memfd"),
    ("pc", "private"),
    ("microvm", "tmpfs"),
    ("q35", "hugetlb"),
    ("microvm", "instant"),
]


@pytest.mark.parametrize("machine, memory", KINDS)
def test_guest_writes_its_pattern_at_the_set_rate(machine: str, memory: str, disk: Path) -> None:
    setup = GuestSetup(machine, working_set=8 * MIB, filled=8 * MIB)
    with start(setup, disk, memory=memory, rate=RATE) as guest:
        with GapRecorder(guest) as gaps:
            guest.wait_for_writes(2 * setup.working_pages)
        assert 0.3 * RATE < gaps.rate < 1.3 * RATE  # the host may be busy
        guest.execute("stop")
        assert at(guest.check_ram()) == at(guest.position())
        guest.assert_memory_held()


@pytest.mark.parametrize("machine, low", [("pc", 3 << 30), ("q35", 2 << 30), ("microvm", 3 << 30)])
def test_working_set_may_lie_across_4_gib(machine: str, low: int, disk: Path) -> None:
    """The last RAM below 4 GiB and the first above."""
    first = low - 4 * MIB
    setup = GuestSetup(machine, ram=4 << 30, first=first, working_set=8 * MIB, filled=4 * MIB)
    with start(setup, disk) as guest:
        guest.wait_for_writes()
        guest.execute("stop")
        assert at(guest.check_ram()) == at(guest.position())
        guest.assert_memory_held()


def test_pause_is_measured_with_its_time_and_place(disk: Path) -> None:
    with start(SETUP, disk, rate=RATE) as guest, GapRecorder(guest) as gaps:
        time.sleep(0.1)
        before = time.monotonic()
        time.sleep(0.05)  # a gap starts at the last progress, which must be after `before`
        guest.execute("stop")
        time.sleep(0.2)
        position = guest.position()
        guest.execute("cont")
        after = time.monotonic()
        guest.wait_until_running()
    assert 0.2 <= gaps.longest.seconds <= gaps.longest.at_most
    assert before < gaps.longest.started_at < after - 0.2
    assert gaps.longest.position == position
    assert gaps.longest in gaps.between(before, after)


def test_pause_that_has_not_ended_counts(disk: Path) -> None:
    with start(SETUP, disk) as guest, GapRecorder(guest) as gaps:
        guest.execute("stop")
        time.sleep(0.1)
    assert gaps.longest.seconds >= 0.1


def test_live_snapshot_is_an_instant_that_the_guest_goes_on_from(disk: Path) -> None:
    path = disk / "guest.mapped"
    with start(SETUP, disk, rate=RATE) as guest:
        before = guest.position()
        verbs.save(guest.socket, path)
        assert before <= (saved := check_snapshot(path, SETUP)) <= guest.position()
    for mode in ("instant", "load"):
        with restore(SETUP, path, disk, mode=mode) as guest:
            guest.wait_for_writes()
            assert guest.position().generation in range(saved.generation + 2, saved.generation + 9)
            guest.assert_memory_held()


def test_changed_page_is_found_by_the_guest_and_from_outside(disk: Path) -> None:
    with start(SETUP, disk, rate=RATE) as guest:
        guest.execute("stop")
        page = SETUP.first_page + SETUP.working_pages - 3
        guest.write_ram(page * PAGE + 512, b"changed!")
        with pytest.raises(AssertionError, match=f"first at pages .*{page}"):
            guest.check_ram()
        guest.assert_memory_held()
        guest.execute("cont")
        guest.wait_for_writes()
        with pytest.raises(AssertionError, match=f"wrong pages, the first of them {page:#x}"):
            guest.assert_memory_held()


def at(instant: Instant) -> tuple[int, int]:
    return instant.generation, instant.written
