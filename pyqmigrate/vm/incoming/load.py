"""Run ``migrate-incoming``, with the settings that it needs (management, 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import NotSupported, QemuError, QemuGone, QemuRefused
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.vm.qemu.launch import QemuSession

__all__ = ["NEEDED", "Incoming", "configure", "stream_address", "take_in"]

NEEDED = (9, 1, 0)  # descriptors in fdsets, exit-on-error
# Capabilities that change the format of an incoming stream, or how it is loaded.
_CONFLICTING = frozenset(
    {
        "background-snapshot",
        "block",
        "compress",
        "multifd",
        "postcopy-blocktime",
        "postcopy-preempt",
        "postcopy-ram",
        "rdma-pin-all",
        "x-colo",
        "x-ignore-shared",
        "xbzrle",
        "zero-blocks",
        "zero-copy-send",
    }
)
_STREAM = "pyqmigrate-stream"
_FIRST_POLL = 0.001  # seconds; doubled up to the last
_LAST_POLL = 0.05


@dataclass(frozen=True)
class Incoming:
    """One ``migrate-incoming``: descriptors by name, where the stream starts, and the settings.

    With ``channels`` 0 multifd is off. With ``stream``, the descriptor of a pipe or socket, QEMU
    reads a sequential stream from it instead; with ``lazy`` too, that of a post-copy migration.
    """

    fds: Mapping[str, int]
    offset: int
    capabilities: tuple[str, ...] = ()
    channels: int = 0
    direct_io: bool = False
    postcopy: bool = False
    stream: int | None = None
    lazy: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that differ from QEMU's defaults, by QEMU's names."""
        chosen: dict[str, Any] = dict.fromkeys(self.capabilities_on(), True)
        if self.channels:
            chosen |= {"multifd-channels": self.channels, "direct-io": self.direct_io}
        return chosen

    def capabilities_on(self) -> list[str]:
        """Return the capabilities that the load needs."""
        if self.stream is not None:
            return ["postcopy-ram"] * self.lazy
        names = ["mapped-ram", *(name for name in self.capabilities if name == IGNORE_SHARED)]
        return names + ["multifd"] * bool(self.channels) + ["postcopy-ram"] * self.postcopy


async def take_in(qemu: QemuSession, incoming: Incoming) -> float:
    """Have QEMU load; return the seconds from ``migrate-incoming`` to its completion.

    Raises NotSupported if QEMU lacks something, QemuError with QEMU's reason if it fails, QemuGone
    if it ends. After an error the process cannot be used.
    """
    monitor = qemu.monitor
    try:
        await configure(qemu, incoming)
        async with stream_address(qemu, incoming) as uri:
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
async def stream_address(qemu: QemuSession, incoming: Incoming) -> AsyncIterator[str]:
    """Pass the descriptors to QEMU; yield the address of the stream."""
    if incoming.stream is not None:
        await qemu.monitor.get_fd(incoming.stream, _STREAM)
        yield f"fd:{_STREAM}"
        return
    async with qemu.monitor.fdset(incoming.fds) as fdset:
        where = f",offset={incoming.offset:#x}" if incoming.offset else ""
        yield f"file:/dev/fdset/{fdset}{where}"


async def configure(qemu: QemuSession, incoming: Incoming) -> None:
    """Set what the load needs, and nothing else. Raises NotSupported if QEMU does not have it."""
    if qemu.monitor.version < NEEDED:
        version = ".".join(map(str, qemu.monitor.version))
        raise NotSupported(f"a restore needs QEMU 9.1 or later; this is {version}")
    names = incoming.capabilities_on()
    states = [{"capability": name, "state": True} for name in names]
    # The command line may switch on others (-global migration.x-...).
    preset = [
        entry["capability"]
        for entry in await qemu.monitor.execute("query-migrate-capabilities")
        if entry["state"] and entry["capability"] in _CONFLICTING - set(names)
    ]
    states += [{"capability": name, "state": False} for name in preset]
    if not states:
        return
    try:
        await qemu.monitor.execute("migrate-set-capabilities", {"capabilities": states})
    except QemuRefused as error:
        version = ".".join(map(str, qemu.monitor.version))
        raise NotSupported(
            f"QEMU {version} does not accept {' with '.join(names)}: {error.desc}"
            + (f" (the command line switches on {', '.join(preset)})" if preset else "")
        ) from error
    if incoming.channels:
        await qemu.monitor.execute(
            "migrate-set-parameters",
            {"multifd-channels": incoming.channels, "direct-io": incoming.direct_io},
        )


async def _wait(qemu: QemuSession) -> dict[str, Any]:
    """Wait until the load ends or, in postcopy, the guest runs."""
    pause = _FIRST_POLL
    while True:
        answer: dict[str, Any] = await qemu.monitor.execute("query-migrate")
        status = answer.get("status")
        if status in ("completed", "failed", "cancelled", "postcopy-active"):
            return answer
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_POLL)
