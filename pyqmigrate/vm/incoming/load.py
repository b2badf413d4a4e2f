"""Run ``migrate-incoming``, and wait until QEMU has loaded."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from pyqmigrate.errors import QemuError, QemuGone
from pyqmigrate.vm.incoming.incoming_settings import Incoming, configure
from pyqmigrate.vm.incoming.loading import LoadFailed, load_stream
from pyqmigrate.vm.qemu.launch import QemuSession

__all__ = ["take_in"]

_STREAM = "pyqmigrate-stream"


async def take_in(qemu: QemuSession, incoming: Incoming) -> float:
    """Have QEMU load; return the seconds from ``migrate-incoming`` to its completion.

    Raises NotSupported if QEMU lacks something, QemuError with QEMU's reason if it fails, QemuGone
    if it ends. After an error the process cannot be used.
    """
    try:
        await configure(qemu.monitor, incoming)
        async with _stream_address(qemu, incoming) as uri:
            return await load_stream(qemu.monitor, uri)
    except LoadFailed as error:
        raise QemuError(await qemu.described(str(error))) from error
    except QemuGone as error:
        raise QemuGone(await qemu.described("QEMU died while loading the snapshot")) from error


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
