"""The address of a monitor: ``PATH`` or ``unix:PATH``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyqmigrate.errors import UsageError

__all__ = ["monitor_path"]

# Other kinds of addresses in QEMU's options; ./NAME is always a path.
_OTHER_KIND = re.compile(r"(tcp|telnet|websocket|tls|inet|vsock|fd|chardev|mon|exec|pty|stdio):")
_HOST_AND_PORT = re.compile(r"[^/]*:[0-9]+")
_QEMU_OPTIONS = re.compile(r",(server|wait|nowait|reconnect)\b")


def monitor_path(address: str | os.PathLike[str]) -> Path:
    """Return the path of the UNIX socket. A ``PathLike`` is always a path.

    Raises UsageError for every other kind of address: guest memory is reached through descriptors,
    which only a UNIX socket carries.
    """
    if not isinstance(address, str):
        return Path(address)
    path = address.removeprefix("unix:")
    if not path:
        raise UsageError(f"the monitor {address!r} has no path: give PATH or unix:PATH")
    if path == address and (_OTHER_KIND.match(path) or _HOST_AND_PORT.fullmatch(path)):
        raise UsageError(
            f"the monitor {address!r} is not a UNIX socket, and no other carries descriptors to "
            "QEMU: give it a second monitor, -qmp unix:PATH,server=on,wait=off, and that PATH here"
        )
    if path != address and (options := _QEMU_OPTIONS.search(path)):
        raise UsageError(
            f"the monitor {address!r} has options, which are QEMU's: give "
            f"unix:{path[: options.start()]}"
        )
    return Path(path)
