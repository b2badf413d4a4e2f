"""Run the tasks of a fleet run on the workers of a Dask scheduler (the library ``distributed``).

Workers open files by the same paths, and object stores with the credentials of their own
environment; a task carries names only. Workers that cannot do the work are named before it starts.
The tasks of a worker that is lost are done by others. A task during which several workers were lost
is tried once more alone, because another task may be to blame, and is a failure then.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import queue
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from pyqmigrate import __version__
from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.fleet.result import Result, Verdict
from pyqmigrate.fleet.target import Kind, Target
from pyqmigrate.fleet.task import perform_travelling
from pyqmigrate.fleet.work import Verb, Work

__all__ = ["perform_on_workers"]

_MOMENT = 0.1  # seconds
_CONNECT = 10.0  # seconds
_COUNT_EVERY = 1.0  # seconds
_NO_WORKER = 60.0  # seconds without any worker: nothing starts it again
_WAITING = 4  # tasks of each thread of a worker that are with the scheduler
_RETRIES = 2  # of a task that a worker could not run


def perform_on_workers(
    work: Work, targets: Iterable[Target], address: str
) -> Generator[Result | None, None, None]:
    """Yield the results as they come, and None at least every 100 ms.

    When the iterator is closed, or fails, tasks that have not begun are cancelled. Raises UsageError
    if workers lack something or there are none, NotSupported without ``distributed``, TargetError if
    the scheduler cannot be reached, or is lost, or no worker is left.
    """
    client = _connect(address)
    try:
        given = list(targets)
        _check_workers(client, address, work, given)
        yield from _Run(client, address, work, given).results()
    finally:
        client.close(timeout=5)


def _connect(address: str) -> Any:
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise NotSupported(
            "a scheduler needs the library distributed: pip install distributed"
        ) from None
    try:
        return distributed.Client(address, timeout=_CONNECT, set_as_default=False)
    except ValueError as error:
        raise UsageError(
            f"{address!r} is not the address of a scheduler: tcp://HOST:PORT"
        ) from error
    except OSError as error:
        number = error.errno or errno.ETIMEDOUT
        raise TargetError(number, "cannot reach the scheduler", address) from error


def _check_workers(client: Any, address: str, work: Work, targets: list[Target]) -> None:
    """Raise UsageError that names the workers that lack the package or what it needs."""
    # By value of builtins: a function of this package could not be unpickled without it.
    versions = client.run(eval, "__import__('pyqmigrate').__version__", on_error="return")
    if not versions:
        raise UsageError(
            f"the scheduler {address} has no workers: start some with: dask worker {address}"
        )
    _refuse(
        "pyqmigrate is missing",
        [worker for worker, version in versions.items() if not isinstance(version, str)],
        len(versions),
        f"install pyqmigrate {__version__} there",
    )
    for version in sorted({*versions.values()} - {__version__}):
        _refuse(
            f"pyqmigrate has version {version}",
            [worker for worker, found in versions.items() if found == version],
            len(versions),
            f"this is {__version__}, install the same there",
        )
    for module, extra in _needed(work, targets):
        found = client.run(eval, f"__import__({module!r})and()", on_error="return")
        _refuse(
            f"the module {module} is missing",
            [worker for worker, value in found.items() if value != ()],
            len(versions),
            f"install pyqmigrate with the extra {extra} there",
        )
    # It unpickles tasks, too.
    try:
        client.run_on_scheduler(eval, "__import__('pyqmigrate.fleet.task')and()")
    except Exception:
        raise UsageError(
            f"pyqmigrate is missing at the scheduler {address}, which handles its tasks: install "
            f"pyqmigrate {__version__} there"
        ) from None


def _needed(work: Work, targets: list[Target]) -> Iterator[tuple[str, str]]:
    """Yield the modules that workers need, and the extra of this package that brings them."""
    yield "pyqmigrate.fleet.task", "fleet"
    yield "pyqmigrate.core", "fleet"
    if work.verb is Verb.ADD or any(target.kind is Kind.STORED for target in targets):
        yield "zstandard", "store"
        yield "blake3", "store"
    if any("://" in text for text in (work.store, *(target.place for target in targets))):
        yield "obstore", "remote"


def _refuse(what: str, workers: list[str], count: int, remedy: str) -> None:
    if workers:
        raise UsageError(
            f"{what} on {len(workers)} of {count} workers ({', '.join(sorted(workers))}): {remedy}"
        )


class _Run:
    """The tasks that are with the scheduler."""

    def __init__(self, client: Any, address: str, work: Work, targets: list[Target]) -> None:
        self._client, self._address, self._work = client, address, work
        self._waiting = deque(targets)
        self._suspects: deque[Target] = deque()  # a worker was lost with them
        self._alone = False
        self._running: dict[Any, Target] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._name = os.urandom(6).hex()  # of this run, in the names of its tasks
        self._threads = 0
        self._counted = -_COUNT_EVERY  # when the threads of workers were last counted
        self._worked = time.monotonic()  # when there was a worker, or a result

    def results(self) -> Iterator[Result | None]:
        try:
            while self._waiting or self._suspects or self._running:
                self._submit()
                try:
                    future = self._ended.get(timeout=_MOMENT)
                except queue.Empty:
                    self._check_alive()
                    yield None
                    continue
                self._worked = time.monotonic()
                result = self._result(future)
                if result is not None:
                    yield result
        finally:
            self._client.cancel([*self._running])

    def _submit(self) -> None:
        if not (self._waiting or self._running):
            self._alone = True
        if self._alone:
            if self._suspects and not self._running:
                self._start(self._suspects.popleft())
            return
        self._count_workers()
        while self._waiting and len(self._running) < _WAITING * max(self._threads, 1):
            self._start(self._waiting.popleft())

    def _start(self, target: Target) -> None:
        # A name is shown on the dashboard and in logs: it has no path, and no URL.
        facts = f"{self._work.options}\0{target.name}\0{target.identity}"
        digest = hashlib.blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=8)
        mark = "-alone" if self._alone else ""
        future = self._client.submit(
            perform_travelling,
            json.dumps({"work": self._work.to_json(), "target": target.to_json()}),
            key=f"pyqmigrate-{self._work.verb}-{digest.hexdigest()}-{self._name}{mark}",
            retries=_RETRIES,
            pure=False,
        )
        self._running[future] = target
        future.add_done_callback(self._ended.put)

    def _result(self, future: Any) -> Result | None:
        """Return the result of a task that has ended; None if it is tried again."""
        from distributed.scheduler import KilledWorker

        target = self._running[future]
        found: Result | None
        try:
            found = Result.from_json(json.loads(future.result(timeout=_CONNECT)))
        except TimeoutError:
            future.add_done_callback(
                self._ended.put
            )  # its worker was lost with it: it is made again
            return None
        except KilledWorker as error:
            count = error.allowed_failures + 1
            found = _failed(target, f"each of the {count} workers that tried it was lost")
            if not self._alone:
                self._suspects.append(target)
                found = None
        except Exception as error:
            if future.status in ("cancelled", "lost"):
                raise self._lost() from error
            found = _failed(target, f"the worker could not run it: {type(error).__name__}")
        del self._running[future]
        future.release()
        return found

    def _count_workers(self) -> None:
        now = time.monotonic()
        if now - self._counted < _COUNT_EVERY:
            return
        self._counted = now
        try:
            self._threads = sum(self._client.nthreads().values())
        except (OSError, ValueError) as error:
            raise self._lost() from error
        if self._threads:
            self._worked = now

    def _check_alive(self) -> None:
        if self._client.status != "running":
            raise self._lost()
        self._count_workers()
        if time.monotonic() - self._worked >= _NO_WORKER:
            raise TargetError(
                errno.ECHILD,
                f"there has been no worker for {_NO_WORKER:.0f} s (start some with: dask worker "
                f"{self._address})",
                self._address,
            )

    def _lost(self) -> TargetError:
        return TargetError(errno.ECONNRESET, "lost the scheduler", self._address)


def _failed(target: Target, message: str) -> Result:
    return Result(target.name, target.identity, Verdict.FAILED, message, finished=time.time())
