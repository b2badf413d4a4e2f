"""Termination signals, handled by an event loop.

A KeyboardInterrupt raised inside the loop would break the loop and the QMP sessions that are needed
for the rollback, and QEMU would keep its changed settings. So the loop handles the signal, cancels the
work, and waits for its rollback.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

__all__ = ["HeldSignals", "ending_signals", "held_signals", "run_interruptible"]

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this command: those that are not ignored (nohup)."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class HeldSignals:
    """Signals that end this command, while they raise nothing: they are kept in ``received``, in order, and given
    to ``react``."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.react: Callable[[int], object] = self.ignore

    def ignore(self, number: int) -> None:
        """Only keep it."""

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Be the handler of signal ``number``."""
        self.received.append(number)
        self.react(number)


@contextlib.contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Hold the signals that end this command.

    KeyboardInterrupt would be lost in a callback of an import, or of a thread that ends.
    """
    held = HeldSignals()
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    try:
        with contextlib.suppress(ValueError):  # only in the main thread
            for number in handlers:
                signal.signal(number, held.take)
        yield held
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def run_interruptible(
    work: Coroutine[Any, Any, T],
    held: HeldSignals | None = None,
    forward: Callable[[int], object] | None = None,
) -> T:
    """Run ``work`` in an event loop of its own; a signal cancels it and waits for its cleanup.

    ``held``: signals are held already. With ``forward``, a signal is given to that instead. Raises
    KeyboardInterrupt if the work was cancelled. It may install its own handlers later.
    """
    numbers = ending_signals()
    # An exception while the loop is created would leave it half made and open.
    with held_signals() if held is None else contextlib.nullcontext(held) as held:
        held.react = held.ignore if forward is None else forward
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
            if held.received and forward is None:
                task.cancel()
            return await work

        try:
            return asyncio.run(cancelled_by_signal())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
