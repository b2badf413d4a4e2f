"""The settings of QEMU's that one ``migrate-incoming`` needs (management, 9.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import NotSupported, QemuRefused
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.vm.qemu.commands import Commands

__all__ = ["NEEDED", "Incoming", "configure", "questions_of_settings"]

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


def questions_of_settings() -> list[str]:
    """Return the commands without arguments that :func:`configure` needs the answers of."""
    return ["query-migrate-capabilities"]


async def configure(monitor: Commands, incoming: Incoming) -> None:
    """Set what the load needs, and nothing else. Raises NotSupported if QEMU does not have it."""
    if monitor.version < NEEDED:
        version = ".".join(map(str, monitor.version))
        raise NotSupported(f"a restore needs QEMU 9.1 or later; this is {version}")
    names = incoming.capabilities_on()
    states = [{"capability": name, "state": True} for name in names]
    # The command line may switch on others (-global migration.x-...).
    preset = [
        entry["capability"]
        for entry in await monitor.execute("query-migrate-capabilities")
        if entry["state"] and entry["capability"] in _CONFLICTING - set(names)
    ]
    states += [{"capability": name, "state": False} for name in preset]
    if not states:
        return
    try:
        await monitor.execute("migrate-set-capabilities", {"capabilities": states})
    except QemuRefused as error:
        version = ".".join(map(str, monitor.version))
        raise NotSupported(
            f"QEMU {version} does not accept {' with '.join(names)}: {error.desc}"
            + (f" (the command line switches on {', '.join(preset)})" if preset else "")
        ) from error
    if incoming.channels:
        await monitor.execute(
            "migrate-set-parameters",
            {"multifd-channels": incoming.channels, "direct-io": incoming.direct_io},
        )
