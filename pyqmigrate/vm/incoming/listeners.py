"""The sockets on which QEMU will listen, and whether they are in use.

A new QEMU replaces a UNIX socket on which another process listens, perhaps the saved guest, which is
unreachable from then on even if the new QEMU fails. So the sockets of the command line, and of the
files of its ``-readconfig``, are tested first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pyqmigrate.errors import UsageError
from pyqmigrate.io.socket_path import SocketPath
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, is_on
from pyqmigrate.vm.qemu.readconfig import with_configurations

__all__ = ["Listener", "listeners", "refuse_taken"]

# Options whose value is a character device in the form that is older than -chardev.
_STREAMS = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb")
# Patterns are strings, compiled when first used: a restore waits for each import.
_STREAM = (
    r"(?:mon:)?(?:unix:(?P<path>(?:[^,]|,,)+)|(?:tcp|telnet|websocket):(?P<host>[^,]*):(?P<port>\d+))"
    r"(?P<options>(?:,.*)?)"
)
_PORT = r"(?P<host>.*):(?P<port>\d+)"
_GDB_PORT = 1234  # of -s
_VNC_PORT = 5900  # of display 0
_VNC_WEBSOCKET = 5700
_PLAIN_HOSTS = r"[0-9a-fA-F.:]*|localhost"  # hosts that need no name server


class Listener(NamedTuple):
    """A socket of ``option``: at ``path``, or at ``host`` (empty: any) and ``port``."""

    option: Option
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def address(self) -> str:
        """The real path, or host and port: equal for the same socket."""
        return os.path.realpath(self.path) if self.path else f"{self.host or '*'}:{self.port}"

    def is_taken(self) -> bool:
        """Return whether another process listens there. It may see a client that leaves at once."""
        return _answers(self.path) if self.path else _is_bound(self.host, self.port)


def refuse_taken(command: CommandLine, qmp: Path | None = None) -> None:
    """Raise UsageError if a socket of ``command``, or a monitor at ``qmp``, is in use or is a file of
    another kind."""
    if qmp is not None:
        if not qmp.parent.is_dir():
            raise UsageError(f"the directory of the monitor {qmp} does not exist")
        with SocketPath(qmp):  # raises if the name is too long
            pass
        if _answers(str(qmp)):
            raise UsageError(f"another monitor listens at {qmp}: give another --qmp")
        _refuse_other_file(str(qmp), "--qmp")
    for listener in listeners(command):
        if listener.is_taken():
            raise UsageError(
                f"another process listens at {listener.path or listener.address} "
                f"({listener.option}), perhaps the saved guest: end that process, or give another "
                "address"
            )
        _refuse_other_file(listener.path, str(listener.option))


def listeners(command: CommandLine) -> Iterator[Listener]:
    """Generate the sockets of ``command``."""
    for listener in _named_listeners(command):
        if listener.path and command.directory is not None:  # QEMU's current directory
            listener = listener._replace(path=str(Path(command.directory, listener.path)))
        yield listener


def _named_listeners(command: CommandLine) -> Iterator[Listener]:
    for option in with_configurations(command).options:
        if option.name in _STREAMS:
            yield from _of_stream(option)
        elif option.name == "s":
            yield Listener(option, port=_GDB_PORT)
        elif option.name == "chardev":
            yield from _of_chardev(option)
        elif option.name in ("vnc", "display"):
            yield from _of_vnc(option)
        elif option.name == "spice":
            yield from _of_spice(option)
        elif option.name in ("netdev", "net", "nic"):
            yield from _of_netdev(option)


def _of_stream(option: Option) -> Iterator[Listener]:
    """``unix:PATH,server=on``, ``tcp:HOST:PORT,server=on``; gdb always listens on TCP."""
    found = re.match(_STREAM, option.value or "")
    if found is None:
        return
    options = Option("", f"unix{found['options']}").properties("kind")
    if is_on(options.get("server")) or (option.name == "gdb" and found["port"]):
        if found["path"]:
            yield Listener(option, path=found["path"].replace(",,", ","))
        elif not {"to", "reconnect"} & options.keys():
            yield Listener(option, host=_host(found["host"]), port=int(found["port"]))


def _of_chardev(option: Option) -> Iterator[Listener]:
    properties = option.properties("backend")
    if properties.get("backend") == "socket" and is_on(properties.get("server")):
        yield from _of_address(option, properties)


def _of_vnc(option: Option) -> Iterator[Listener]:
    """``-vnc HOST:DISPLAY`` and ``unix:PATH``; ``-display vnc=HOST:DISPLAY`` is the same."""
    text = option.value or ""
    if option.name == "display":
        if not text.startswith("vnc="):
            return
        text = text.removeprefix("vnc=")
    properties = Option("vnc", text).properties("vnc")
    address = properties.get("vnc", "")
    if is_on(properties.get("reverse")) or "to" in properties:
        return
    host, found = "", re.fullmatch(_PORT, address)
    if address.startswith("unix:"):
        yield Listener(option, path=address.removeprefix("unix:"))
    elif found:
        host = _host(found["host"])
        yield Listener(option, host=host, port=_VNC_PORT + int(found["port"]))
    websocket = properties.get("websocket", "")
    if websocket.isdecimal():
        yield Listener(option, host=host, port=int(websocket))
    elif is_on(websocket) and found:
        yield Listener(option, host=host, port=_VNC_WEBSOCKET + int(found["port"]))


def _of_spice(option: Option) -> Iterator[Listener]:
    properties = option.properties()
    address = properties.get("addr", "")
    if is_on(properties.get("unix")):
        if address:
            yield Listener(option, path=address)
        return
    for key in ("port", "tls-port"):
        if properties.get(key, "0").isdecimal() and int(properties.get(key, "0")):
            yield Listener(option, host=_host(address), port=int(properties[key]))


def _of_netdev(option: Option) -> Iterator[Listener]:
    properties = option.properties("type")
    kind = properties.get("type")
    if kind == "socket" and (found := re.fullmatch(_PORT, properties.get("listen", ""))):
        yield Listener(option, host=_host(found["host"]), port=int(found["port"]))
    if kind == "stream" and is_on(properties.get("server")):
        yield from _of_address(option, properties, "addr.")


def _of_address(
    option: Option, properties: Mapping[str, str], front: str = ""
) -> Iterator[Listener]:
    """Generate the listener of properties ``path``, or ``host`` and ``port``."""
    path, port = properties.get(f"{front}path"), properties.get(f"{front}port", "")
    if path is not None:
        if not is_on(properties.get("abstract")):
            yield Listener(option, path=path)
    elif port.isdecimal() and f"{front}to" not in properties:
        yield Listener(option, host=_host(properties.get(f"{front}host", "")), port=int(port))


def _refuse_other_file(path: str, word: str) -> None:
    """Raise UsageError for a file that QEMU would replace by its socket."""
    with contextlib.suppress(OSError):
        if path and not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise UsageError(f"{path} ({word}) exists and is not a socket: give another path")


def _host(text: str) -> str:
    return text.strip("[]")


def _answers(path: str) -> bool:
    """Return whether a process listens at the UNIX socket, by a connection that is closed at once."""
    with contextlib.ExitStack() as stack:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return False
        stack.callback(os.close, place)
        probe = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{place}")
        except BlockingIOError:  # its backlog is full
            return True
        except OSError:
            return False
        return True


def _is_bound(host: str, port: int) -> bool:
    """Return whether a TCP port is in use, as QEMU would find it; a host name that needs a name
    server is not tested."""
    if not 0 < port < 1 << 16 or not re.fullmatch(_PLAIN_HOSTS, host):
        return False
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
