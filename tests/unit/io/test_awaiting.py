"""Jobs on an event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyqmigrate import Cancelled, RamBlock, TargetError, start_load, start_save
from pyqmigrate.io.awaiting import end_of
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.job import Job
from tests.harness.snapshots import known_memory

SLOW = {"max_bandwidth": 1, "sparse": "dense"}


def blocks() -> list[RamBlock]:
    return [RamBlock("ram", known_memory())]


def job(work: object) -> Job[object]:
    return Job(Channels(1, "test"), 0, work)


def test_awaited_save_gives_its_report(tmp_path: Path) -> None:
    async def main() -> None:
        report = await start_save(tmp_path / "s", blocks())
        assert report.file_size == (tmp_path / "s").stat().st_size
        memory = bytearray(len(known_memory()))
        loaded = await start_load(tmp_path / "s", {"ram": memory})
        assert loaded.data_pages == report.data_pages
        assert memory == bytes(known_memory())

    asyncio.run(main())


def test_loop_goes_on_while_a_job_is_awaited() -> None:
    go = threading.Event()

    async def main() -> object:
        asyncio.get_running_loop().call_later(0.01, go.set)
        return await job(lambda: go.wait(60))

    assert asyncio.run(main()) is True


def test_error_of_the_job_is_raised(tmp_path: Path) -> None:
    async def main() -> None:
        def fail() -> None:
            raise TargetError(5, "x")

        with pytest.raises(TargetError):
            await job(fail)
        started = start_save(tmp_path / "s", blocks(), **SLOW)
        started.cancel()
        with pytest.raises(Cancelled):
            await started

    asyncio.run(main())


def test_job_that_has_ended_can_be_awaited_again_and_by_many() -> None:
    async def main() -> None:
        one = job(lambda: 7)
        one.join()
        assert [await one, await one] == [7, 7]

        async def wait(on: Job[object]) -> object:
            return await on

        other = job(lambda: time.sleep(0.05) or 8)
        assert await asyncio.gather(wait(other), wait(other)) == [8, 8]

    asyncio.run(main())


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_task_cancels_the_save_and_waits_for_its_end(tmp_path: Path, times: int) -> None:
    async def main() -> None:
        started = start_save(tmp_path / "s", blocks(), **SLOW)

        async def wait() -> object:
            return await started

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert started.done()
        assert list(tmp_path.iterdir()) == []

    asyncio.run(main())


def test_cancelled_task_waits_for_what_cannot_be_cancelled() -> None:
    """An fsync ends first."""
    entered, ended = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        time.sleep(0.2)
        ended.set()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await job(work)
        assert ended.is_set()

    asyncio.run(main())
    assert entered.is_set()


def test_loop_that_is_closed_does_not_hurt_the_job(tmp_path: Path) -> None:
    go = threading.Event()
    started = job(lambda: go.wait(60))
    loop = asyncio.new_event_loop()
    task = loop.create_task(end_of(started))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    go.set()
    assert started.wait() is True
    task._log_destroy_pending = False
    task.get_coro().close()


def test_wait_that_is_given_up_cancels_the_save(tmp_path: Path) -> None:
    started = start_save(tmp_path / "s", blocks(), **SLOW)
    loop = asyncio.new_event_loop()
    task = loop.create_task(end_of(started))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    task._log_destroy_pending = False
    task.get_coro().close()
    with pytest.raises(Cancelled):
        started.result(60)
    assert list(tmp_path.iterdir()) == []


def test_job_that_is_not_awaited_imports_no_asyncio(tmp_path: Path) -> None:
    code = (
        "import sys, pyqmigrate\n"
        f"job = pyqmigrate.start_save({str(tmp_path / 's')!r}, "
        "[pyqmigrate.RamBlock('ram', bytearray(8192))])\n"
        "job.wait()\nassert 'asyncio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
