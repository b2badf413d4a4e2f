"""Starting threads where the system may allow no more of them (a limit on processes)."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator

from pyqmigrate.errors import TargetError

__all__ = ["start_thread", "starting_threads"]


def start_thread(thread: threading.Thread) -> None:
    """Start ``thread``. Raises TargetError (EAGAIN) where the system allows no more threads."""
    with starting_threads():
        thread.start()


@contextlib.contextmanager
def starting_threads() -> Iterator[None]:
    """Make a TargetError (EAGAIN) of what Python raises when it cannot start a thread: for a body
    that has a pool or an event loop start some."""
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise TargetError(errno.EAGAIN, "cannot start a thread") from error
