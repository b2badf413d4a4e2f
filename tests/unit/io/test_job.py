"""Jobs without a target."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pyqmigrate.errors import Cancelled, JobTimeout
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.job import Job, Progress


def test_callback_at_the_end_runs_whether_the_job_succeeded_or_not() -> None:
    ran: list[str] = []
    gate = threading.Event()

    def fail() -> int:
        gate.wait(5)
        raise LookupError("bad")

    good: Job[int] = Job(Channels(1, "test"), 0, lambda: (gate.wait(5) and 7) or 0)
    bad: Job[int] = Job(Channels(1, "test"), 0, fail)
    good.at_end(lambda: ran.append("good"))
    bad.at_end(lambda: ran.append("bad"))
    gate.set()
    assert good.result(5) == 7
    with pytest.raises(LookupError):
        bad.result(5)
    good.at_end(lambda: ran.append("late"))
    assert sorted(ran) == ["bad", "good", "late"]


def test_job_of_no_time_has_no_infinite_rate() -> None:
    job: Job[int] = Job(Channels(1, "test"), 0, lambda: 1)
    assert job.result(5) == 1
    assert job.progress.rate == 0
    assert job.progress.bytes_total == 0


def test_result_in_time_is_a_timeout_and_the_job_continues() -> None:
    gate = threading.Event()
    job: Job[int] = Job(Channels(1, "test"), 0, lambda: int(gate.wait(5)))
    with pytest.raises(JobTimeout):
        job.result(0.01)
    assert not job.done()
    assert not job.join(0)
    gate.set()
    assert job.result(5) == 1
    assert job.done() and job.join(0)


def test_error_from_progress_cancels_the_job_and_waits_for_its_end() -> None:
    channels = Channels(1, "test")
    ended = threading.Event()

    def work() -> None:
        while not channels.cancelled:
            ended.wait(0.001)
        ended.set()
        raise Cancelled("cancelled")

    def progress(_: Progress) -> None:
        raise LookupError("from progress")

    job: Job[None] = Job(channels, 0, work)
    with pytest.raises(LookupError, match="from progress"):
        job.result(progress=progress)
    assert ended.is_set() and job.done()


def test_last_progress_is_reported_after_the_end() -> None:
    channels = Channels(1, "test")
    seen: list[int] = []
    job: Job[int] = Job(channels, 10, lambda: channels.core.count_pages(10) or 3)
    assert job.join(5)
    assert job.result(progress=lambda progress: seen.append(progress.bytes_done)) == 3
    assert seen == [10]


def test_error_from_the_last_progress_leaves_what_the_job_made(tmp_path: Path) -> None:
    def progress(_: Progress) -> None:
        raise LookupError("too late")

    job: Job[None] = Job(Channels(1, "test"), 0, (tmp_path / "made").touch)
    assert job.join(5)
    with pytest.raises(LookupError):
        job.wait(progress)
    assert (tmp_path / "made").exists()
