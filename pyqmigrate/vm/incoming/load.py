"""Run ``migrate-incoming``, and wait until QEMU has loaded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from pyqmigrate.errors import QemuError, QemuGone
from pyqmigrate.vm.incoming.incoming_settings import Incoming, configure
from pyqmigrate.vm.qemu.launch import QemuSession

__all__ = ["take_in"]

_STREAM = "pyqmigrate-stream"
_FIRST_POLL = 0.001  # seconds; doubled up to the last
_LAST_POLL = 0.05


async def take_in(qemu: QemuSession, incoming: Incoming) -> float:
    """Have QEMU load; return the seconds from ``migrate-incoming`` to its completion.

    Raises NotSupported if QEMU lacks something, QemuError with QEMU's reason if it fails, QemuGone
    if it ends. After an error the process cannot be used.
    """
    monitor = qemu.monitor
    try:
        await configure(qemu.monitor, incoming)
        async with _stream_address(qemu, incoming) as uri:
            started = time.monotonic()
            await monitor.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
            answer = await _wait(qemu)
            seconds = time.monotonic() - started
            if answer["status"] in ("failed", "cancelled"):
                reason = answer.get("error-desc", answer["status"])
                raise QemuError(await qemu.described(f"QEMU failed to load the snapshot: {reason}"))
    except QemuGone as error:
        raise QemuGone(await qemu.described("QEMU died while loading the snapshot")) from error
    return seconds


@contextlib.asynccontextmanager
async def _stream_address(qemu: QemuSession, incoming: Incoming) -> AsyncIterator[str]:
    """Pass the descriptors to QEMU; yield the address of the stream."""
    if incoming.stream is not None:
        await qemu.monitor.get_fd(incoming.stream, _STREAM)
        yield f"fd:{_STREAM}"
        return
    async with qemu.monitor.fdset(incoming.fds) as fdset:
        where = f",offset={incoming.offset:#x}" if incoming.offset else ""
        yield f"file:/dev/fdset/{fdset}{where}"


async def _wait(qemu: QemuSession) -> dict[str, Any]:
    """Wait until the load ends or, in postcopy, the guest runs.

    QEMU's main loop reads a mapped-ram file, so its monitor does not answer before the end: the wait
    has no limit.
    """
    pause = _FIRST_POLL
    while True:
        answer: dict[str, Any] = await qemu.monitor.execute("query-migrate", timeout=None)
        status = answer.get("status")
        if status in ("completed", "failed", "cancelled", "postcopy-active"):
            return answer
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_POLL)
