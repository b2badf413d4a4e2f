"""Termination signals, handled by an event loop.

A KeyboardInterrupt raised inside the loop would break the loop and the QMP sessions that are needed
for the rollback, and QEMU would keep its changed settings. So the loop handles the signal, cancels the
work, and waits for its rollback.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["ending_signals", "run_interruptible"]

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this command: those that are not ignored (nohup)."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` in an event loop of its own; a signal cancels it and waits for its cleanup.

    Raises KeyboardInterrupt if it was cancelled. ``work`` may install its own handlers later.
    """
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    early: list[int] = []

    async def cancelled_by_signal() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError, ValueError):  # only in the main thread
            for number in handlers:
                loop.add_signal_handler(number, task.cancel)
        if early:
            task.cancel()
        return await work

    try:
        with contextlib.suppress(ValueError):
            # An exception during the creation of the loop would leave it half made and open.
            for number in handlers:
                signal.signal(number, lambda number, _: early.append(number))
        return asyncio.run(cancelled_by_signal())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
