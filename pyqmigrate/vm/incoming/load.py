"""Driving ``migrate-incoming``: what QEMU is told, and how long it takes (management, 9.2)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import NotSupported, QemuError, QemuGone, QemuRefused
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.vm.qemu.launch import QemuSession

__all__ = ["NEEDED", "Incoming", "take_in"]

NEEDED = (9, 1, 0)  # descriptors in fdsets, exit-on-error
# Capabilities that change what an incoming stream is, or how it is taken in.
_CONTRARY = frozenset(
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
_FIRST_POLL = 0.001  # seconds; doubled up to the last
_LAST_POLL = 0.05


@dataclass(frozen=True)
class Incoming:
    """One ``migrate-incoming``: descriptors by name, where the stream starts, and the settings.

    ``channels`` 0 is without multifd.
    """

    fds: Mapping[str, int]
    offset: int
    capabilities: tuple[str, ...] = ()
    channels: int = 0
    direct_io: bool = False
    postcopy: bool = False

    def settings(self) -> dict[str, Any]:
        """What differs from QEMU's defaults, by QEMU's names."""
        chosen: dict[str, Any] = dict.fromkeys(self.switched_on(), True)
        if self.channels:
            chosen |= {"multifd-channels": self.channels, "direct-io": self.direct_io}
        return chosen

    def switched_on(self) -> list[str]:
        """The capabilities that it needs."""
        names = ["mapped-ram", *(c for c in self.capabilities if c == IGNORE_SHARED)]
        return names + ["multifd"] * bool(self.channels) + ["postcopy-ram"] * self.postcopy


async def take_in(qemu: QemuSession, incoming: Incoming) -> float:
    """Have QEMU load; returns the seconds from ``migrate-incoming`` until the guest is there.

    Raises NotSupported when QEMU does not have what it takes, QemuError with its words when it
    fails, QemuGone when it dies of it. The process is of no use after a failure.
    """
    monitor = qemu.monitor
    if monitor.version < NEEDED:
        version = ".".join(map(str, monitor.version))
        raise NotSupported(f"a restore needs QEMU 9.1 or later; this is {version}")
    try:
        await _configure(qemu, incoming)
        async with monitor.fdset(incoming.fds) as fdset:
            where = f",offset={incoming.offset:#x}" if incoming.offset else ""
            started = time.monotonic()
            await monitor.execute(
                "migrate-incoming",
                {"uri": f"file:/dev/fdset/{fdset}{where}", "exit-on-error": False},
            )
            answer = await _wait(qemu)
            seconds = time.monotonic() - started
            if answer["status"] in ("failed", "cancelled"):
                reason = answer.get("error-desc", answer["status"])
                raise QemuError(await qemu.described(f"QEMU did not load the snapshot: {reason}"))
    except QemuGone as error:
        raise QemuGone(await qemu.described("QEMU died while it loaded the snapshot")) from error
    return seconds


async def _configure(qemu: QemuSession, incoming: Incoming) -> None:
    names = incoming.switched_on()
    states = [{"capability": name, "state": True} for name in names]
    # Those that the command line switched on (-global migration.x-...), against ours.
    preset = [
        one["capability"]
        for one in await qemu.monitor.execute("query-migrate-capabilities")
        if one["state"] and one["capability"] in _CONTRARY and one["capability"] not in names
    ]
    states += [{"capability": name, "state": False} for name in preset]
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
    """Until the load has ended, or the guest runs while the rest comes (postcopy)."""
    pause = _FIRST_POLL
    while True:
        answer: dict[str, Any] = await qemu.monitor.execute("query-migrate")
        status = answer.get("status")
        if status in ("completed", "failed", "cancelled", "postcopy-active"):
            return answer
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_POLL)
