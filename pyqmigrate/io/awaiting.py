"""A job on an event loop: ``report = await start_save(...)``.

It is imported by the first ``await`` of a job; programs without an event loop never import asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pyqmigrate.io.job import Job

__all__ = ["end_of"]

R = TypeVar("R")


async def end_of(job: Job[R]) -> R:
    """Return the job's report, or raise its error, without blocking the loop.

    A task that is cancelled while it waits cancels the job, and ends when the job has.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed before the job ended
            loop.call_soon_threadsafe(ended.set)

    job.at_end(wake)
    try:
        await ended.wait()
    except GeneratorExit:  # the waiter was dropped, and there is no loop to wait on
        job.cancel()
        raise
    except asyncio.CancelledError:
        job.cancel()
        while not job.done():
            # Once more cancelled, it still has to clean up.
            with contextlib.suppress(asyncio.CancelledError):
                await ended.wait()
        raise
    return job.result()
