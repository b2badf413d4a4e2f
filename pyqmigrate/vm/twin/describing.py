"""Have a twin describe a save's device state while the save goes on.

async with Describing(guest) as describing:   # before the guest is stopped
    ...
    describing.start(state)                   # when it runs again
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
from pyqmigrate.vm.guest.device_state import DeviceState
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.twin.command import make_twin
from pyqmigrate.vm.twin.original import Original
from pyqmigrate.vm.twin.twin import TIMEOUT, Pages, describe

__all__ = ["Describing", "why_not_described"]

_CURE = "pyqmigrate convert SNAPSHOT NEW --to mapped-ram --describe [-- QEMU'S COMMAND LINE]"
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
        self._original: Original | None = None
        try:
            self._original = Original.of_process(guest.pid)
        except Exception as error:
            self._refuse(error)

    def start(self, state: DeviceState) -> None:
        """Start the twin unless it was started; return at once."""
        if self._task is None and self._original is not None:
            self._task = asyncio.create_task(self._describe(self._original, state))

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
            if self._task is not None:
                self._task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(self._task)
        finally:
            if self._original is not None:
                self._original.close()

    async def _describe(self, original: Original, state: DeviceState) -> None:
        try:
            description = await describe(original, state, self._sizes.get, self._pages)
        except Exception as error:
            self._refuse(error)
        else:
            if not self._result.done():
                self._result.set_result(description)
        finally:
            self.cancel()

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
