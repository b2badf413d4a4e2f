"""Guests that are ready before they are wanted: for tests, fuzzing and sandboxes.

    async with Pool("/snap/guest.mapped", command, ready=2, directory="/run/guests") as pool:
        guest = await pool.take()
        print(guest.number, guest.pid, guest.qmp)
        guest = await pool.reset(guest)      # ends it, and takes another

QEMU needs some 50 ms of processor time until it has loaded a snapshot. A pool spends them ahead, and
while other guests are in use; a guest that is ready only has to be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

from pyqmigrate.errors import NotSupported, PyqmigrateError, QemuGone, TargetError, UsageError
from pyqmigrate.io.place import absolute
from pyqmigrate.io.socket_path import remove_stale_socket
from pyqmigrate.io.target import Target
from pyqmigrate.log import logger
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.incoming.clone import make_directory
from pyqmigrate.vm.incoming.keywords import VmPoolOptions, VmRestoreOptions
from pyqmigrate.vm.incoming.options import RestoreOptions
from pyqmigrate.vm.incoming.report import RestoreReport
from pyqmigrate.vm.pool.guest import PooledGuest
from pyqmigrate.vm.pool.series import GuestSeries

__all__ = ["Pool"]

_MONITOR = r"[1-9][0-9]*\.qmp"
_RETRY = 1.0  # seconds from the death of a guest that was ready until another is started


class Pool:
    """``ready`` guests of one snapshot, started and loaded ahead. An asynchronous context manager.

    Entering it returns when all are ready; leaving it ends them, and all that were taken. They also
    end when this process does, for whatever reason. ``{n}`` in a word of ``command`` is the number
    of the guest, which is never used again. Each guest has a monitor ``directory/N.qmp`` and no
    standard input. The options are those of :class:`~pyqmigrate.vm.VmPoolOptions`.

    Entering raises UsageError if guests would write to the same disk or file, listen at the same
    address, or use the same descriptor, TargetError if the directory cannot be created, and the
    errors of :func:`pyqmigrate.vm.restore`. Not for several event loops or threads.
    """

    def __init__(
        self,
        snapshot: Target,
        command: Sequence[str] | None = None,
        ready: int = 2,
        **options: Unpack[VmPoolOptions],
    ) -> None:
        """Raises UsageError for invalid options. Nothing is opened yet."""
        if ready < 1:
            raise UsageError(f"ready must be at least 1, not {ready}")
        self._size = ready
        self._snapshot, self._command = snapshot, command
        self.directory = absolute(options.get("directory", "."))
        self.limit = options.get("limit")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be at least 1, not {self.limit}")
        self._slots = asyncio.Semaphore(options.get("at_once") or os.cpu_count() or 1)
        self._options = _restore_options(options, self.directory)
        self._series: GuestSeries | None = None
        self._closing = False
        self._made_directory = False
        self._report: RestoreReport | None = None
        self._asked = 0  # calls of take that have no guest yet
        self._living: set[PooledGuest] = set()
        self._ready: deque[PooledGuest] = deque()
        self._taken: dict[int, PooledGuest] = {}
        self._waiting: deque[asyncio.Future[PooledGuest]] = deque()
        self._starting: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self.last_error: PyqmigrateError | None = None

    @property
    def ready(self) -> Sequence[PooledGuest]:
        """The guests that are ready, the oldest first."""
        return tuple(self._ready)

    @property
    def taken(self) -> Sequence[PooledGuest]:
        """The guests that were taken and have not ended."""
        return tuple(self._taken.values())

    @property
    def starting(self) -> int:
        """How many guests are being started."""
        return len(self._starting)

    @property
    def report(self) -> RestoreReport:
        """The report of the first guest."""
        self._opened()
        assert self._report is not None
        return self._report

    @property
    def runs(self) -> bool:
        """Whether a guest runs when it is handed over, unless it is asked for paused."""
        return self._opened().runs

    @property
    def runs_from_store(self) -> bool:
        """Whether the guests run from a snapshot of a store, about which there may be messages."""
        return self._opened().view is not None

    async def store_messages(self) -> Sequence[str]:
        """Return what went wrong with the store so far, the oldest first; empty for a file."""
        view = self._opened().view
        return () if view is None else await asyncio.to_thread(view.view.messages)

    async def take(self, *, paused: bool | None = None) -> PooledGuest:
        """Return a guest, and start another in its place; wait for one if none is ready.

        paused: whether it stays paused; None does as the pool's option.

        Raises TargetError if ``limit`` guests are in use, UsageError if the pool is not open,
        QemuError if the guest cannot be resumed, and the errors of a restore: the next call tries
        to start guests again.
        """
        series = self._opened()
        if self.limit is not None and len(self._taken) + self._asked >= self.limit:
            raise TargetError(
                errno.EBUSY,
                f"{self.limit} guests of the pool are in use, which is its limit: end one, or reset it",
            )
        while True:
            self._asked += 1
            try:
                guest = await self._next()
                self._taken[guest.number] = guest
            finally:
                self._asked -= 1
            try:
                if (series.runs if paused is None else not paused) and series.can_run(guest):
                    await self._resume(guest)
            except QemuGone:  # it was killed while it was ready
                continue
            finally:
                self._fill()  # after the guest was resumed: a start takes processor time
            return guest

    async def reset(self, guest: PooledGuest, *, paused: bool | None = None) -> PooledGuest:
        """End ``guest`` and return another, as :meth:`take` does. It ends even if that fails."""
        self._opened()
        self._taken.pop(guest.number, None)
        ending = asyncio.ensure_future(guest.end())
        taking = asyncio.ensure_future(self.take(paused=paused))
        try:
            await asyncio.wait([ending, taking])
            ending.result()
            return taking.result()
        except BaseException:
            taking.cancel()
            await shielded(_end_taken(taking, ending))
            raise

    async def close(self) -> None:
        """End all guests and close the snapshot. Can be called again."""
        await shielded(self._close())

    async def __aenter__(self) -> Self:
        if self._series is not None or self._closing:
            raise UsageError("a pool can be entered only once")
        made = not self.directory.is_dir()
        try:
            await asyncio.to_thread(make_directory, self.directory)
            self._made_directory = made
            await asyncio.to_thread(_remove_stale_monitors, self.directory)
            self._series = await GuestSeries.open(
                self._snapshot, self._command, self.directory, self._options
            )
            self._fill()
            while self._starting:
                await asyncio.wait(self._starting, return_when=asyncio.FIRST_COMPLETED)
                if self.last_error is not None:
                    raise self.last_error
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _opened(self) -> GuestSeries:
        if self._series is None or self._closing:
            raise UsageError("the pool is not open: use it inside of async with Pool(...)")
        return self._series

    async def _next(self) -> PooledGuest:
        """Return the oldest ready guest, or wait for one."""
        while self._ready:
            guest = self._ready.popleft()
            if not guest.has_ended:
                return guest
        waiter: asyncio.Future[PooledGuest] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._fill()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._deliver(waiter.result())
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)

    async def _resume(self, guest: PooledGuest) -> None:
        try:
            await guest.run()
        except BaseException:
            await guest.end()  # it may have run, and nobody has it
            raise

    def _fill(self) -> None:
        """Start what is missing: for those who wait, and to be ready."""
        if self._closing or self._series is None:
            return
        wanted = self._size + len(self._waiting)
        while len(self._ready) + len(self._starting) < wanted:
            task = asyncio.create_task(self._start(self._series))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, series: GuestSeries) -> None:
        try:
            async with self._slots:
                guest = await series.start(self._forget)
        except PyqmigrateError as error:
            self._fail(error)
            return
        except Exception as error:  # a bug must not leave clients waiting
            self._fail(NotSupported(f"the pool cannot start a guest: {error!r}"))
            raise
        self._living.add(guest)
        self.last_error = None
        if self._report is None:
            self._report = guest.report
        self._deliver(guest)

    def _deliver(self, guest: PooledGuest) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(guest)
                return
        self._ready.append(guest)

    def _fail(self, error: PyqmigrateError) -> None:
        """Fail those who wait. Others are not started until the next call of take."""
        self.last_error = error
        if not self._waiting:
            logger.warning("the pool could not start a guest: %s", error)
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(error)

    def _forget(self, guest: PooledGuest) -> None:
        """Note the end of a guest. One that was ready, and was killed, is replaced after a while."""
        self._living.discard(guest)
        self._taken.pop(guest.number, None)
        if guest in self._ready:
            self._ready.remove(guest)
            if self._retry is not None:
                self._retry.cancel()
            self._retry = asyncio.get_running_loop().call_later(_RETRY, self._fill)

    async def _close(self) -> None:
        self._closing = True
        if self._retry is not None:
            self._retry.cancel()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(UsageError("the pool was closed"))
        for task in list(self._starting):
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(guest.end() for guest in self._living), return_exceptions=True)
        if self._series is not None:
            await self._series.close()
            self._series = None
        if self._made_directory:
            with contextlib.suppress(OSError):  # it has files of the guests
                self.directory.rmdir()


def _remove_stale_monitors(directory: Path) -> None:
    """Remove the monitor sockets of a pool that was killed: on which no process listens."""
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            if re.fullmatch(_MONITOR, path.name):
                with contextlib.suppress(OSError, UsageError):
                    remove_stale_socket(path)


async def _end_taken(taking: asyncio.Future[PooledGuest], ending: asyncio.Future[None]) -> None:
    """Wait for both; end the guest that a cancelled take has returned nevertheless."""
    await asyncio.gather(taking, ending, return_exceptions=True)
    if not taking.cancelled() and taking.exception() is None:
        await taking.result().end()


def _restore_options(options: VmPoolOptions, directory: Path) -> RestoreOptions:
    """Return the options that all guests share."""
    if unknown := options.keys() - VmPoolOptions.__optional_keys__:
        raise TypeError(f"Pool() got an unexpected keyword argument {min(unknown)!r}")
    values: dict[str, Any] = {**options}
    for name in ("at_once", "directory", "limit"):
        values.pop(name, None)
    if values.get("disks_dir") is None:
        values["disks_dir"] = directory
    return RestoreOptions.check(cast("VmRestoreOptions", values))
