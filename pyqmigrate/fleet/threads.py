"""Run the tasks of a fleet run on threads of this process: the core and the libraries for object
stores work without the GIL."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable

from pyqmigrate.errors import Cancelled
from pyqmigrate.fleet.result import Result
from pyqmigrate.fleet.target import Target
from pyqmigrate.fleet.task import perform
from pyqmigrate.fleet.work import Work
from pyqmigrate.io.threads import start_thread

__all__ = ["perform_on_threads"]

_MOMENT = 0.1  # seconds


def perform_on_threads(
    work: Work, targets: Iterable[Target], jobs: int
) -> Generator[Result | None, None, None]:
    """Yield the results as they come, and None at least every 100 ms.

    When the iterator is closed, or fails, tasks that run are cancelled; it returns when they have
    ended.
    """
    waiting = iter(targets)
    lock, stop = threading.Lock(), threading.Event()
    results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()

    def next_target() -> Target | None:
        with lock:
            return None if stop.is_set() else next(waiting, None)

    def run() -> None:
        try:
            while (target := next_target()) is not None:
                results.put(perform(work, target, stop.is_set))
        except Cancelled:
            pass
        except BaseException as error:
            results.put(error)
        finally:
            results.put(None)

    threads: list[threading.Thread] = []
    try:
        for number in range(jobs):
            thread = threading.Thread(target=run, name=f"pyqmigrate-fleet-{number}")
            start_thread(thread)
            threads.append(thread)
        running = jobs
        while running:
            try:
                result = results.get(timeout=_MOMENT)
            except queue.Empty:
                yield None
                continue
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()
