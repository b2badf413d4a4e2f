"""When a worker is started again."""

from __future__ import annotations

import pytest

from pyqmigrate.mount.restarts import Restarts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)


def test_worker_that_answered_is_started_again_at_once(clock: None) -> None:
    ended = Restarts()
    ended.worker_ended(5)
    ended.worker_ended(6)
    assert (ended.count, ended.start_at) == (2, 100.0)


def test_workers_that_answer_nothing_are_started_later_and_later(clock: None) -> None:
    ended = Restarts()
    pauses = []
    for _ in range(12):
        ended.worker_ended(0)
        pauses.append(ended.start_at - 100.0)
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < 0.1
    assert pauses[-1] == 2.0
    ended.worker_ended(1)
    assert ended.start_at == 100.0


def test_worker_that_cannot_be_started_is_put_off_and_not_counted(clock: None) -> None:
    ended = Restarts()
    ended.not_started()
    assert (ended.count, ended.start_at) == (0, 102.0)


def test_worker_that_is_still_half_ended_after_a_moment_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    looked_at = Restarts()
    assert not looked_at.is_stuck(True)
    now = 100.1
    assert not looked_at.is_stuck(True)
    assert not looked_at.is_stuck(False)
    now = 101.0
    assert not looked_at.is_stuck(True)
    now = 101.6
    assert looked_at.is_stuck(True)
    looked_at.worker_ended(0)
    assert not looked_at.is_stuck(True)
