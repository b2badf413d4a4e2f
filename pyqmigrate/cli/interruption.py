"""Termination signals, handled by an event loop.

A KeyboardInterrupt raised inside the loop would break the loop and the QMP sessions that are needed
for the rollback, and QEMU would keep its changed settings. So the loop handles the signal, cancels the
work, and waits for its rollback.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["ending_signals", "run_interruptible"]

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this command: those that are not ignored (nohup)."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def run_interruptible(
    work: Coroutine[Any, Any, T], forward: Callable[[int], object] | None = None
) -> T:
    """Run ``work`` in an event loop of its own; a signal cancels it and waits for its cleanup.

    With ``forward``, a signal is given to that instead. Raises KeyboardInterrupt if the work was cancelled. It
    may install its own handlers later.
    """
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    early: list[int] = []
    note = early.append if forward is None else forward
    try:
        with contextlib.suppress(ValueError):  # only in the main thread
            # An exception during the creation of the loop would leave it half made and open, and one in a
            # callback of an import is lost.
            for number in handlers:
                signal.signal(number, lambda number, _: note(number))
        return _run(work, [*handlers], early, forward)
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _run(
    work: Coroutine[Any, Any, T],
    numbers: list[signal.Signals],
    early: list[int],
    forward: Callable[[int], object] | None,
) -> T:
    """Run ``work`` with handlers for signals with these ``numbers``; it is cancelled at once if there are
    ``early`` ones."""
    import asyncio

    async def cancelled_by_signal() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError, ValueError):  # only in the main thread
            for number in numbers:
                if forward is None:
                    loop.add_signal_handler(number, task.cancel)
                else:
                    loop.add_signal_handler(number, forward, number)
        if early:
            task.cancel()
        return await work

    try:
        return asyncio.run(cancelled_by_signal())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
