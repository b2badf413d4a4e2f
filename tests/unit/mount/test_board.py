"""The shared board: what a keeper reads of a worker, whatever became of it."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.mount.board import LOG_MAX, SLOTS, Activity, Board, LoggedRead

ACTIVITY = Activity(10, 2, 4096, 123456789, 15, 8192, 77, 1000)


def test_what_begins_is_seen_until_it_ends() -> None:
    board = Board()
    board.begin(3, ACTIVITY)
    assert board.activities() == [ACTIVITY]
    assert not board.is_idle()
    board.end(3, read=8192)
    assert board.activities() == []
    assert board.is_idle()


@given(st.lists(st.integers(1, 1 << 40), min_size=SLOTS, max_size=SLOTS))
def test_all_slots_are_seen_the_oldest_first(times: list[int]) -> None:
    board = Board()
    for slot, started_ns in enumerate(times):
        board.begin(slot, ACTIVITY._replace(unique=slot, started_ns=started_ns))
    assert [activity.started_ns for activity in board.activities()] == sorted(times)


def test_totals_are_sums_over_the_slots() -> None:
    board = Board()
    for slot in (0, 1, 1, SLOTS - 1):
        board.begin(slot, ACTIVITY)
        board.end(slot, read=100)
    board.begin(5, ACTIVITY)
    board.end(5, failed=True)
    assert board.totals() == (5, 4, 400, 1)


def test_another_process_sees_it_and_its_death_leaves_what_it_did() -> None:
    board = Board(logging=True)
    pid = os.fork()
    if pid == 0:
        board.begin(0, ACTIVITY)
        board.log(2, 4096, 8192)
        os._exit(0)
    os.waitpid(pid, 0)
    assert board.activities() == [ACTIVITY]
    assert list(board.logged_reads()) == [LoggedRead(2, 4096, 8192)]
    assert board.clear() == {10: 123456789}
    assert board.activities() == []
    assert board.totals().requests == 0


def test_death_in_the_middle_of_a_change_hides_one_slot_only() -> None:
    board = Board()
    board.begin(0, ACTIVITY)
    board.begin(1, ACTIVITY._replace(unique=11))
    board._memory[4096] |= 1  # the sequence of the first slot: being written
    assert [activity.unique for activity in board.activities()] == [11]
    board.clear()
    board.begin(0, ACTIVITY)
    assert board.activities() == [ACTIVITY]


def test_log_is_off_unless_it_is_wanted_and_ends_when_it_is_full() -> None:
    silent = Board()
    silent.log(1, 2, 3)
    assert silent.logged == 0
    board = Board(logging=True)
    for number in range(LOG_MAX + 5):
        board.log(2, number, 1)
    assert board.logged == LOG_MAX
    assert [read.offset for read in board.logged_reads()] == list(range(LOG_MAX))
