"""Keep what adds to a store and what collects its garbage apart.

An adder relies on packs that perhaps no snapshot names yet, so nothing may be collected while it runs.
Adders do not exclude each other.

A local store has a file that is locked (flock), which ends with the process. In an object store each
writes an object of its own first and lists the others' then: of an adder and a collector that begin
together, at least one sees the other. The object is refreshed; one that is older than an hour belongs
to a process that is gone. Ages are measured by the clock of the place. An adder that could not refresh
its object for three quarters of an hour (a suspended computer) must not write any more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.errors import PyqmigrateError, TargetError, target_error
from pyqmigrate.format.store.keys import LOCKS
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.threads import start_thread
from pyqmigrate.log import logger
from pyqmigrate.store.local_place import LocalPlace
from pyqmigrate.store.place import Bytes, Entry, Place

__all__ = ["STALE", "Adding", "Lock", "adding", "collecting"]

STALE = 3600.0  # seconds after which the lock of another is ignored
_REFRESHED = 600.0  # seconds between two refreshes
_VALID = 0.75 * STALE  # seconds after a refresh for which its owner may rely on it
_ADDER_WAITS = 600.0  # seconds for a collector to end
_PAUSE = 0.05
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

_LOCAL = "lock"
_ADD, _COLLECT = "add-", "gc-"


class Lock:
    """A lock that is held. ``now`` is the time by the clock of the place, seconds since 1970."""

    def check(self) -> None:
        """Raise TargetError (ESTALE) if it may have been lost."""

    @property
    def now(self) -> float:
        return time.time()


class Adding:
    """A place for an adder that holds ``lock``: it is checked before each write."""

    def __init__(self, place: Place, lock: Lock) -> None:
        self._place = place
        self.lock = lock

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def directory(self) -> Path | None:
        return self._place.directory

    def read(self, key: str, offset: int = 0, length: int | None = None) -> Bytes:
        return self._place.read(key, offset, length)

    def read_end(self, key: str, length: int) -> tuple[Bytes, int]:
        return self._place.read_end(key, length)

    def find(self, key: str) -> Entry | None:
        return self._place.find(key)

    def write_new(self, key: str, data: Bytes) -> bool:
        self.lock.check()
        return self._place.write_new(key, data)

    def replace(self, key: str, data: Bytes) -> None:
        self.lock.check()
        self._place.replace(key, data)

    def delete(self, key: str) -> bool:
        return self._place.delete(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._place.list(prefix)

    def close(self) -> None:
        """The place is borrowed."""


@contextlib.contextmanager
def adding(place: Place, *, wait: float = _ADDER_WAITS) -> Iterator[Adding]:
    """Hold the lock of an adder; the place that is yielded checks it before each write.

    Waits ``wait`` seconds for a collector to end, then raises TargetError (EBUSY).
    """
    with _locked(place, exclusive=False, wait=wait) as lock:
        yield Adding(place, lock)


@contextlib.contextmanager
def collecting(place: Place, *, wait: float = 0.0) -> Iterator[Lock]:
    """Hold the lock of a collector: no adder and no other collector runs.

    Waits ``wait`` seconds for them to end, then raises TargetError (EBUSY).
    """
    with _locked(place, exclusive=True, wait=wait) as lock:
        yield lock


@contextlib.contextmanager
def _locked(place: Place, *, exclusive: bool, wait: float) -> Iterator[Lock]:
    deadline = time.monotonic() + wait
    while True:
        with contextlib.ExitStack() as stack:
            with _naming_read_only(place):
                if isinstance(place, LocalPlace):
                    lock = _lock_locally(place, stack, exclusive)
                else:
                    lock = _lock_object(place, stack, exclusive)
            if lock is not None:
                yield lock
                return
        if time.monotonic() >= deadline:
            other = "an add, a copy or a gc" if exclusive else "a gc"
            raise TargetError(
                errno.EBUSY, f"{other} is at work in the store, try again later", place.name
            )
        # Two that always retry together would never get on.
        pause = _PAUSE if isinstance(place, LocalPlace) else 1.0
        time.sleep(pause * (0.5 + random.random()))


@contextlib.contextmanager
def _naming_read_only(place: Place) -> Iterator[None]:
    """Say of a store that can only be read what to do."""
    try:
        yield
    except TargetError as error:
        if error.errno not in _READ_ONLY:
            raise
        who = "the credentials" if place.directory is None else "the user"
        raise TargetError(
            error.errno,
            f"this store can only be read: nothing can be added, removed or collected here. Change what {who} "
            "may do, or copy snapshots into a store of your own (store create, store copy)",
            place.name,
        ) from error


def _lock_locally(place: LocalPlace, stack: contextlib.ExitStack, exclusive: bool) -> Lock | None:
    fd = place.open_lock(_LOCAL)
    stack.callback(os.close, fd)
    try:
        lock_file(fd, exclusive=exclusive)
    except BlockingIOError:
        return None
    except OSError as error:
        raise target_error(error, "cannot lock", place.directory / _LOCAL) from error
    return Lock()


def _lock_object(place: Place, stack: contextlib.ExitStack, exclusive: bool) -> Lock | None:
    lock = _ObjectLock(place, _COLLECT if exclusive else _ADD)
    stack.callback(lock.release)
    lock.write()
    others = [entry for entry in place.list(LOCKS) if entry.key != lock.key]
    excluded = (_ADD, _COLLECT) if exclusive else (_COLLECT,)
    for entry in others:
        if lock.now - entry.mtime > STALE:
            place.delete(entry.key)
        elif entry.key.removeprefix(LOCKS).startswith(excluded):
            return None
    lock.keep()
    return lock


class _ObjectLock(Lock):
    """An object that says who is at work."""

    def __init__(self, place: Place, kind: str) -> None:
        self.key = f"{LOCKS}{kind}{secrets.token_hex(8)}.json"
        self._place = place
        self._content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        self._fresh_at = 0.0  # by a clock that goes on while the computer sleeps
        self._ahead = 0.0  # of the place's clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self) -> None:
        before = _running_clock()
        self._place.replace(self.key, self._content)
        entry = self._place.find(self.key)
        if entry is None:
            raise TargetError(
                errno.ESTALE, "the lock disappeared", f"{self._place.name}/{self.key}"
            )
        self._fresh_at, self._ahead = before, entry.mtime - time.time()

    @property
    def now(self) -> float:
        return time.time() + self._ahead

    def keep(self) -> None:
        """Refresh it from now on."""
        self._thread = threading.Thread(
            target=self._refresh, name="pyqmigrate-store-lock", daemon=True
        )
        start_thread(self._thread)

    def check(self) -> None:
        if _running_clock() - self._fresh_at > _VALID:
            raise TargetError(
                errno.ESTALE,
                "the lock could not be refreshed for too long, and may have been taken over; begin "
                "again",
                self._place.name,
            )

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(PyqmigrateError):  # it becomes stale
            self._place.delete(self.key)

    def _refresh(self) -> None:
        while not self._stop.wait(_REFRESHED):
            try:
                self.write()
            except PyqmigrateError as error:
                logger.warning("%s", error)


def _running_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
