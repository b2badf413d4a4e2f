"""The signals that end a command, heard by an event loop.

A signal that raises KeyboardInterrupt inside the loop breaks it, and with it the sessions that are
needed to clean up: QEMU keeps running and never hears of it. So the loop hears it, cancels the
work, and waits until that has restored everything.
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
    """Those that end this command. A signal that is ignored stays so (nohup)."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` in an event loop of its own; a signal cancels it, with the time to clean up.

    Raises KeyboardInterrupt when it was cancelled. ``work`` may hear the signals in its own way
    from some moment on.
    """
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    early: list[int] = []

    async def cancelled_by_signal() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError, ValueError):  # only the main thread hears signals
            for number in handlers:
                loop.add_signal_handler(number, task.cancel)
        if early:
            task.cancel()
        return await work

    try:
        with contextlib.suppress(ValueError):
            # One that raised while the loop is made would leave it neither whole nor closed.
            for number in handlers:
                signal.signal(number, lambda number, _: early.append(number))
        return asyncio.run(cancelled_by_signal())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
