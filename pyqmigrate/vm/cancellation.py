"""Cancellation: work that it does not break, and places where it is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["check_cancelled", "acquired", "shielded"]

T = TypeVar("T")


async def shielded(work: Awaitable[T]) -> T:
    """The result of ``work``. A cancellation of the caller takes effect when it is done."""
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
        task.exception()  # looked at, so that nobody complains about it
        raise cancelled
    return task.result()


async def acquired(work: Awaitable[T], close: Callable[[T], object]) -> T:
    """The result of ``work``, which the caller owns. If the caller is cancelled it does not get it;
    then it is closed here, by ``close``."""
    task = asyncio.ensure_future(work)
    try:
        return await shielded(task)
    except asyncio.CancelledError:
        if not task.cancelled() and task.exception() is None:
            close(task.result())
        raise


def check_cancelled() -> None:
    """Raise CancelledError if this task was cancelled, also where that has been swallowed.

    ``asyncio.wait_for`` does so, in Python 3.11, when what it waited for came at the same moment.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
