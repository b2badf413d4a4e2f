"""How long a guest stood still, by the events that QEMU sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator
from typing import Any, cast

import pytest
from qemu.qmp import EventListener, Message

from pyqmigrate.vm.qemu.event_log import EventLog
from pyqmigrate.vm.qemu.monitor import Monitor


class Reporter:
    """A monitor that reports what it is told to."""

    def __init__(self) -> None:
        self.queue: EventListener | None = None

    @contextlib.contextmanager
    def listener(self, names: Collection[str]) -> Iterator[EventListener]:
        self.queue = EventListener(names)
        yield self.queue
        self.queue = None

    async def report(self, name: str, milliseconds: int, **data: Any) -> None:
        seconds, rest = divmod(milliseconds, 1000)
        timestamp = {"seconds": 1_700_000_000 + seconds, "microseconds": rest * 1000}
        assert self.queue is not None
        await self.queue.put(Message({"event": name, "timestamp": timestamp, "data": data}))


def downtime(*events: tuple[str, int], at_most: float = 10.0) -> float | None:
    async def run() -> float | None:
        reporter = Reporter()
        log = EventLog(cast("Monitor", reporter))
        for name, milliseconds in events:
            await reporter.report(name, milliseconds)
        found = log.downtime(at_most)
        log.close()
        assert reporter.queue is None
        return found

    return asyncio.run(run())


def test_downtime_is_from_the_stop_to_the_resume() -> None:
    assert downtime(("STOP", 900), ("RESUME", 1400)) == pytest.approx(0.5)


def test_only_the_last_stop_counts() -> None:
    events = ("STOP", 100), ("RESUME", 200), ("STOP", 900), ("RESUME", 930)
    assert downtime(*events) == pytest.approx(0.03)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [("STOP", 100)],
        [("RESUME", 100)],
        [("STOP", 5), ("RESUME", 6), ("STOP", 100)],
        [("STOP", 100), ("RESUME", 50)],
        [("STOP", 0), ("RESUME", 20_000)],
    ],
    ids=["none", "still-stands", "never-stopped", "stands-again", "clock-back", "clock-forward"],
)
def test_downtime_that_was_not_reported_is_not_known(events: list[tuple[str, int]]) -> None:
    assert downtime(*events) is None


@pytest.mark.parametrize(
    ("before", "after", "resumed"),
    [
        (["STOP"], [], False),
        (["STOP"], ["RESUME"], True),
        (["STOP"], ["RESUME", "STOP"], True),
        (["STOP", "RESUME", "STOP"], [], False),
        (["STOP", "RESUME"], [], True),
        ([], [], False),
        ([], ["RESUME"], True),
        (["RESUME"], [], False),
    ],
)
def test_guest_that_another_process_lets_run_is_noticed(
    before: list[str], after: list[str], resumed: bool
) -> None:
    async def run() -> bool:
        reporter = Reporter()
        log = EventLog(cast("Monitor", reporter))
        for number, name in enumerate(before):
            await reporter.report(name, number)
        log.mark_stopped()
        for number, name in enumerate(after, len(before)):
            await reporter.report(name, number)
        return log.resumed()

    assert asyncio.run(run()) is resumed


def test_migration_is_waited_for_and_stops_on_the_way_are_kept() -> None:
    async def run() -> None:
        reporter = Reporter()
        log = EventLog(cast("Monitor", reporter))
        await reporter.report("STOP", 0)
        waiting = asyncio.create_task(log.migration(30))
        await asyncio.sleep(0)
        await reporter.report("RESUME", 10)
        await reporter.report("MIGRATION", 20, status="completed")
        assert await waiting == "completed"
        assert await log.migration(0.001) is None
        assert log.downtime(1) == pytest.approx(0.01)
        log.close()

    asyncio.run(run())
