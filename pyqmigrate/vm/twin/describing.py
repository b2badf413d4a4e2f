"""Have a twin describe a save's device state while the save goes on.

async with Describing(guest) as describing:   # before the guest is stopped
    describing.start_ahead()                  # where every tenth of a second counts
    ...
    await describing.until_ready()            # so that it takes no processor in the pause
    ...                                       # the pause
    describing.start(state)                   # when the guest runs again
    describing.wait()                         # in the thread that writes the file
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Self

from pyqmigrate.errors import NotSupported, PyqmigrateError
from pyqmigrate.io.memory import FileMemory, ProcessMemory
from pyqmigrate.io.process_memory import ProcessSource
from pyqmigrate.log import logger
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.guest.device_state import DeviceState
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.twin.command import make_twin
from pyqmigrate.vm.twin.original import Original
from pyqmigrate.vm.twin.twin import TIMEOUT, Pages, RunningTwin

__all__ = ["Describing", "why_not_described"]

_CURE = "pyqmigrate convert SNAPSHOT NEW --to mapped-ram --describe [-- QEMU'S COMMAND LINE]"
_START = 0.5  # seconds that a save waits for a twin before it stops the guest
_END = 5.0  # seconds for ending a twin


class Describing:
    """A pending description; an asynchronous context manager that ends the twin.

    ``note`` is the reason why there is none, or empty.
    """

    def __init__(self, guest: GuestInfo) -> None:
        self.note = ""
        self._sizes = _sizes(guest)
        self._pages = _pages(guest)
        self._result: Future[bytes | None] = Future()
        self._task: asyncio.Task[None] | None = None
        self._twin: asyncio.Task[RunningTwin] | None = None
        self._blocks = {block.name: block.length for block in guest.blocks}
        self._original: Original | None = None
        try:
            self._original = Original.of_process(guest.pid)
        except Exception as error:
            self._refuse(error)

    def start_ahead(self) -> None:
        """Start the twin before there is a state to describe; return at once."""
        if self._twin is None and self._original is not None:
            starting = RunningTwin.start(self._original, self._blocks, self._sizes.get)
            self._twin = asyncio.create_task(starting)

    async def until_ready(self) -> None:
        """Wait until a twin that was started ahead has started, or failed, for at most half a second."""
        if self._twin is not None:
            await asyncio.wait([self._twin], timeout=_START)

    def start(self, state: DeviceState) -> None:
        """Start to describe ``state`` unless that was done; return at once."""
        if self._task is None and self._original is not None:
            self.start_ahead()
            self._task = asyncio.create_task(self._describe(state))

    @property
    def ready(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self._result.done()

    def wait(self) -> bytes | None:
        """Wait for the description; return it or None. Not for the event loop's thread."""
        try:
            return self._result.result(TIMEOUT + _END)
        except FutureTimeout:
            return None

    def cancel(self) -> None:
        """Let :meth:`wait` return None, unless it has a result."""
        if not self._result.done():
            self._result.set_result(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        try:
            await shielded(self._end())
        finally:
            if self._original is not None:
                self._original.close()

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._end_twin()

    async def _end_twin(self) -> None:
        """End the twin, or its start; idempotent."""
        twin, self._twin = self._twin, None
        if twin is None:
            return
        twin.cancel()  # does nothing if it has started
        await asyncio.wait([twin])
        if not twin.cancelled() and twin.exception() is None:
            await twin.result().end()

    async def _describe(self, state: DeviceState) -> None:
        assert self._twin is not None
        try:
            async with asyncio.timeout(TIMEOUT):
                twin = await asyncio.shield(self._twin)
                description = await twin.describe(state, self._pages)
        except TimeoutError:
            self._refuse(NotSupported(f"the twin took longer than {TIMEOUT:g} s"))
        except Exception as error:
            self._refuse(error)
        else:
            if not self._result.done():
                self._result.set_result(description)
        finally:
            self.cancel()
            await shielded(self._end_twin())

    def _refuse(self, error: Exception) -> None:
        """Continue without a description: no failure of a twin fails the save."""
        if not isinstance(error, NotSupported):
            logger.error("the twin failed", exc_info=error)
        self.note = (
            f"device state is saved without its description ({error}): devices and the registers "
            f"of an ELF core need it; this adds it: {_CURE}"
        )
        self.cancel()


def why_not_described(guest: GuestInfo) -> str:
    """Return why a twin would not describe a save of this guest, as far as is known before; empty
    if it would."""
    try:
        original = Original.of_process(guest.pid)
        try:
            blocks = {block.name: block.length for block in guest.blocks}
            make_twin(original.command, blocks, _sizes(guest).get, lambda length: "")
        finally:
            original.close()
    except (PyqmigrateError, RecursionError) as error:
        return str(error)
    return ""


def _sizes(guest: GuestInfo) -> dict[str, int]:
    """Return the sizes of images by every name that an option may use for them."""
    return {
        name: disk.size
        for disk in guest.disks
        for name in (disk.device, disk.node, disk.file)
        if disk.size
    }


def _pages(guest: GuestInfo) -> Pages:
    memories = {block.name: block.memory for block in guest.blocks}

    def pages(name: str, offset: int, length: int) -> bytes:
        memory = memories.get(name)
        if isinstance(memory, FileMemory):
            return os.pread(memory.fd, length, memory.offset + offset)
        if isinstance(memory, ProcessMemory):
            with contextlib.closing(ProcessSource(memory, name)) as source:
                return source.read(offset, length)
        return b""  # unreadable memory is empty for the twin, too

    return pages
