"""The settings of QEMU's that one ``migrate-incoming`` needs (management, 9.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pyqmigrate.errors import NotSupported, QemuRefused
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.commands import Commands

__all__ = ["NEEDED", "Incoming", "configure", "presets_possible", "settings_of"]

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


class Incoming(NamedTuple):
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


def presets_possible(command: CommandLine) -> bool:
    """Return whether a command line may switch on capabilities (-global migration.x-...)."""
    return any(command.has(name) for name in ("global", "set", "readconfig"))


def settings_of(incoming: Incoming) -> dict[str, object]:
    """Return the argument with which :func:`configure` switches capabilities on, without presets."""
    return {"capabilities": _states(incoming.capabilities_on(), True)}


def _states(names: Iterable[str], state: bool) -> list[dict[str, object]]:
    return [{"capability": name, "state": state} for name in names]


async def configure(monitor: Commands, incoming: Incoming, *, presets: bool = True) -> None:
    """Set what the load needs, and nothing else; without ``presets``, what QEMU has set is not asked for.

    Raises NotSupported if QEMU does not have it.
    """
    if monitor.version < NEEDED:
        version = ".".join(map(str, monitor.version))
        raise NotSupported(f"a restore needs QEMU 9.1 or later; this is {version}")
    names = incoming.capabilities_on()
    allowed = {"postcopy-blocktime"} if incoming.lazy else set()  # how long faults take
    states = _states(names, True)
    # The command line may switch on others (-global migration.x-...).
    set_before = await monitor.execute("query-migrate-capabilities") if presets else []
    preset = [
        entry["capability"]
        for entry in set_before
        if entry["state"] and entry["capability"] in _CONFLICTING - set(names) - allowed
    ]
    states += _states(preset, False)
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
