"""The share of its processor time that a guest lost, by a clock and a thread of the test's own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyqmigrate.vm.guest import processor_time
from pyqmigrate.vm.guest.processor_time import ProcessorClock
from tests.harness.guest_info import guest

SECOND = 1_000_000_000


class Threads:
    """Two threads of a guest, whose times the test sets; ``now`` is the time of the clock."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._used = 100.0, [0.0, 0.0]
        self.files = [root / "1", root / "2"]
        self.run(0, 0, 0)
        monkeypatch.setattr(processor_time, "host_threads", lambda pid, own: [1, 2])
        clock = ProcessorClock(self.guest(), now=lambda: self.now)
        clock._threads = self.files
        clock._first = clock._read()
        self.clock = clock

    @staticmethod
    def guest(**changes: Any) -> Any:
        return guest(process=SimpleNamespace(pid=1), **changes)  # type: ignore[arg-type]

    def run(self, seconds: float, *used: float) -> None:
        """So much time goes by, of which the threads were on a processor for ``used``."""
        self.now += seconds
        for number, path in enumerate(self.files):
            self._used[number] += used[number]
            path.write_text(f"{int(self._used[number] * SECOND)} 17 3\n")


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(tmp_path, monkeypatch)


def test_guest_that_gets_half_as_much_lost_half(threads: Threads) -> None:
    threads.run(2, 2, 1)
    threads.clock.begin()
    threads.run(4, 2, 1)
    assert threads.clock.slowdown() == pytest.approx(0.5)


def test_guest_that_goes_on_as_before_lost_nothing(threads: Threads) -> None:
    threads.run(2, 1, 1)
    threads.clock.begin()
    threads.run(1, 0.7, 0.7)
    assert threads.clock.slowdown() == 0


def test_guest_that_stands_still_lost_everything(threads: Threads) -> None:
    threads.run(1, 1, 0)
    threads.clock.begin()
    threads.run(1, 0, 0)
    assert threads.clock.slowdown() == 1


def test_idle_guest_has_no_speed_to_lose(threads: Threads) -> None:
    threads.run(2, 0.05, 0.05)
    threads.clock.begin()
    threads.run(2, 0, 0)
    assert threads.clock.slowdown() is None


@pytest.mark.parametrize(("before", "during"), [(0.01, 1), (1, 0.01)])
def test_short_times_tell_nothing(threads: Threads, before: float, during: float) -> None:
    threads.run(before, before, 0)
    threads.clock.begin()
    threads.run(during, during, 0)
    assert threads.clock.slowdown() is None


def test_short_time_before_the_save_is_made_longer(threads: Threads) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        threads.run(seconds, seconds, 0)

    threads.run(0.04, 0.04, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor_time.asyncio, "sleep", sleep)
        asyncio.run(threads.clock.settle())
        threads.clock.begin()
        threads.run(1, 0.5, 0)
        asyncio.run(threads.clock.settle())
    assert waited == [pytest.approx(0.06)]
    assert threads.clock.slowdown() == pytest.approx(0.5)


def test_second_attempt_is_compared_with_the_time_before_the_first(threads: Threads) -> None:
    threads.run(1, 1, 0)
    threads.clock.begin()
    threads.run(1, 0.1, 0)
    threads.clock.begin()
    threads.run(1, 0.75, 0)
    assert threads.clock.slowdown() == pytest.approx(0.25)


def test_thread_that_ended_makes_it_unknown(threads: Threads) -> None:
    threads.run(1, 1, 1)
    threads.clock.begin()
    threads.run(1, 1, 1)
    threads.files[1].unlink()
    assert threads.clock.slowdown() is None


def test_save_that_never_began_is_unknown(threads: Threads) -> None:
    threads.run(1, 1, 1)
    assert threads.clock.slowdown() is None


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process
        process.kill()


def test_time_of_a_real_thread_is_read(busy: subprocess.Popen[bytes]) -> None:
    found = guest(process=SimpleNamespace(pid=busy.pid), processor_threads=frozenset({busy.pid}))
    clock = ProcessorClock(found)
    time.sleep(0.3)
    clock.begin()
    busy.send_signal(19)  # SIGSTOP
    time.sleep(0.3)
    slowdown = clock.slowdown()
    assert slowdown is not None and slowdown > 0.8


def test_thread_of_another_process_is_not_read(busy: subprocess.Popen[bytes]) -> None:
    found = guest(process=SimpleNamespace(pid=busy.pid), processor_threads=frozenset({busy.pid, 1}))
    clock = ProcessorClock(found)
    time.sleep(0.1)
    clock.begin()
    time.sleep(0.1)
    assert clock.slowdown() is None


def test_guest_that_does_not_run_is_not_measured(busy: subprocess.Popen[bytes]) -> None:
    found = guest(
        process=SimpleNamespace(pid=busy.pid),
        processor_threads=frozenset({busy.pid}),
        running=False,
    )
    clock = ProcessorClock(found)
    time.sleep(0.1)
    clock.begin()
    time.sleep(0.1)
    assert clock.slowdown() is None
