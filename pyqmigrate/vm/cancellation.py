"""Helpers for asyncio cancellation: shield work, check for a pending cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["acquired", "check_cancelled", "shielded"]

T = TypeVar("T")


async def shielded(work: Awaitable[T]) -> T:
    """Return the result of ``work``. A cancellation of the caller takes effect once it is done."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        task.exception()  # retrieved, so that asyncio does not log it
        raise cancelled
    return task.result()


async def acquired(work: Awaitable[T], close: Callable[[T], object]) -> T:
    """Return the result of ``work``, a resource that the caller owns.

    If the caller is cancelled before that, the resource is closed with ``close``.
    """
    task = asyncio.ensure_future(work)
    try:
        return await shielded(task)
    except asyncio.CancelledError:
        if not task.cancelled() and task.exception() is None:
            close(task.result())
        raise


def check_cancelled() -> None:
    """Raise CancelledError if this task was cancelled, even if the error was swallowed.

    Python 3.11's ``asyncio.wait_for`` swallows it if its awaitable finishes at the same moment.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
