"""Who reads a snapshot of an object store: an object that says so, so that it is not removed.

A reader that has had a snapshot open for some seconds writes a lease below ``locks/``, refreshes it, and
deletes it at its end; one that is older than an hour belongs to a process that is gone. Readers that may
not write (their credentials allow reading only) have none, and their snapshots can be removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.format.store.keys import LOCKS
from pyqmigrate.io.threads import start_thread
from pyqmigrate.log import logger
from pyqmigrate.store.locks import STALE
from pyqmigrate.store.place import Place

__all__ = ["Leases", "leased"]

_AFTER = 5.0  # seconds that a snapshot is open: a short reader writes nothing
_REFRESHED = 600.0
_KEY = re.compile(re.escape(LOCKS) + r"read-[0-9a-f]{16}-(.+)\.json")


class Leases:
    """The leases of one open store, kept by one thread. Methods may be called by several threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        self._held: dict[str, float | None] = {}  # key: when it was written
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False

    def hold(self, name: str) -> Callable[[], None]:
        """Keep snapshot ``name`` from being removed, from some seconds on; return what ends that."""
        key = f"{LOCKS}read-{secrets.token_hex(8)}-{name}.json"
        with self._changed:
            self._held[key] = None
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._keep, name="pyqmigrate-leases", daemon=True
                )
                start_thread(self._thread)
        return lambda: self._release(key)

    def close(self) -> None:
        """End all leases. Idempotent."""
        for key in list(self._held):
            self._release(key)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _release(self, key: str) -> None:
        with self._changed:
            written = self._held.pop(key, None)
            if written is not None:  # under the lock: it is not written again after this
                with contextlib.suppress(PyqmigrateError):  # it becomes stale
                    self._place.delete(key)

    def _keep(self) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._ended, _AFTER):
                for key, written in list(self._held.items()):
                    if written is not None and time.monotonic() - written < _REFRESHED:
                        continue
                    try:
                        self._place.replace(key, self._content)
                    except PyqmigrateError as error:
                        logger.warning("a snapshot that is read can be removed: %s", error)
                        if written is None:
                            self._held[key] = float("inf")  # it may not write: not tried again
                    else:
                        self._held[key] = time.monotonic()


def leased(place: Place, now: float) -> set[str]:
    """Return the names of snapshots that are read, by leases; ``now`` is by the clock of the place."""
    found = set()
    for entry in place.list(LOCKS):
        match = _KEY.fullmatch(entry.key)
        if match is not None and now - entry.mtime <= STALE:
            found.add(match[1])
    return found
