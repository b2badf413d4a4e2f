"""Start the keeper of a lazy restore, without an event loop.

    keeper = start_keeper("/snap/guest.mapped")               # its imports and the server's go on from here
    keeper.set_up(snapshot, kept, settings, monitor, source)
    keeper.begin(pid, blocks, page_sizes, collapse)
    keeper.wait_until_loaded()                                # the guest can run; its pages follow
    keeper.leave_monitor()

See :mod:`pyqmigrate.vm.incoming.keeper.keeper`. The keeper goes on when this process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyqmigrate
from pyqmigrate.errors import QemuError, target_error
from pyqmigrate.io.view import names_stored
from pyqmigrate.vm.incoming.lazy_state import LazyState

__all__ = [
    "ServerSettings",
    "KeeperChild",
    "StartedKeeper",
    "program_words",
    "source_kind",
    "start_keeper",
]

_END_TIMEOUT = 5.0  # seconds
_PACKAGES = os.path.dirname(os.path.dirname(os.path.abspath(pyqmigrate.__file__)))
_KEEPER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from pyqmigrate.vm.incoming.keeper.boot import main; main()"
)


@dataclass(frozen=True)
class ServerSettings:
    """How the page server works: ``push`` is idle, always or never; ``working_set`` the file that is
    pushed first, or None; ``record`` the file into which the pages are written that the guest requests,
    or None, while nothing else is sent for ``record_seconds``. ``base`` and ``cache`` as for
    :func:`pyqmigrate.vm.restore`."""

    push: str = "idle"
    working_set: str | None = None
    record: str | None = None
    record_seconds: float | None = None
    base: str | None = None
    cache: str | None = None
    offset: int | None = None

    def words(self) -> list[str]:
        """Return the options of every server of the restore."""
        values = {
            "--push": self.push,
            "--base": self.base,
            "--cache": self.cache,
            "--offset": self.offset,
        }
        return _words(values)

    def first_words(self) -> list[str]:
        """Return the options of the first server: a later one would record only a part."""
        values = {"--working-set": self.working_set, "--record": self.record}
        if self.record is not None:
            values["--push"] = "never"
        return _words(values)


def _words(values: Mapping[str, object]) -> list[str]:
    return [
        word for name, value in values.items() if value is not None for word in (name, str(value))
    ]


class KeeperChild(Protocol):
    """The process of a keeper, a child of this one: as :class:`subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


class StartedKeeper:
    """A keeper that this process has started. ``state`` is the latest that it has reported.

    ``channel`` and ``received``, what was read of it but is not a whole line, are for
    :class:`~pyqmigrate.vm.incoming.lazy_process.KeeperProcess`, which follows it later.
    """

    def __init__(self, process: KeeperChild, channel: socket.socket) -> None:
        self.process = process
        self.channel = channel
        self.state = LazyState()
        self.received = b""

    def set_up(
        self,
        snapshot: str,
        kept: Sequence[tuple[str, int]],
        settings: ServerSettings,
        monitor: socket.socket,
        source: socket.socket,
    ) -> None:
        """Have the page server open ``snapshot``; empty for the first of the ``kept`` files.

        kept: the snapshot's files by their paths, and descriptors of them, which the keeper keeps open.
        monitor: the connection to the second monitor of a QEMU. Borrowed, as all descriptors.
        source: the socket on whose other end QEMU will expect the stream.

        Raises QemuError if the keeper has ended.
        """
        setup = {
            "server": settings.words(),
            "first": settings.first_words(),
            "hold": settings.record_seconds,
            "push": settings.push,
            "snapshot": snapshot,
            "kept": [path for path, _ in kept],
        }
        fds = [monitor.fileno(), source.fileno(), *(fd for _, fd in kept)]
        self._send({"setup": setup}, fds)

    def begin(
        self,
        pid: int,
        blocks: Sequence[str],
        host_pages: Mapping[str, int],
        collapse: Sequence[tuple[int, int]],
    ) -> None:
        """Have the stream sent to QEMU ``pid``, which has these blocks, some of other page sizes. At the end
        the memory ``collapse``, of addresses and lengths, gets huge pages."""
        start = {
            "pid": pid,
            "blocks": list(blocks),
            "host_pages": dict(host_pages),
            "collapse": list(collapse),
        }
        self._send({"start": start})

    def leave_monitor(self) -> None:
        """Let the keeper use the monitor from now on."""
        self._send({"monitor": True})

    def _send(self, line: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            sent = socket.send_fds(self.channel, [data], list(fds)) if fds else 0
            self.channel.sendall(data[sent:])
        except OSError as error:
            raise QemuError(
                f"the keeper of the lazy restore has ended: {error.strerror}"
            ) from error

    def wait_until_loaded(self) -> None:
        """Wait until QEMU has loaded the device state. Raises QemuError if it fails before. Blocks."""
        while not self.state.loaded:
            data = b""
            if not self.state.ended:
                with contextlib.suppress(OSError):
                    data = self.channel.recv(65536)
            if not data:
                raise QemuError(self.state.failure or "the keeper of the lazy restore has ended")
            *lines, self.received = (self.received + data).split(b"\n")
            for line in lines:
                self.state = LazyState.of(json.loads(line))

    def abandon(self) -> None:
        """End a wait of another thread for it."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """End a keeper whose QEMU has ended, or has not loaded anything. Blocks. Idempotent."""
        self.channel.close()
        try:
            self.process.wait(_END_TIMEOUT)  # it ends its server
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def source_kind(snapshot: str) -> str:
    """Return the module of the page server that opens a snapshot, by the name that the user gave."""
    return "stored" if "#" in snapshot and names_stored(snapshot) else "opened"


def program_words(kind: str, shown: str) -> list[str]:
    """Return the arguments of :mod:`pyqmigrate.vm.incoming.keeper.boot`."""
    # Without site: the guest waits for the imports.
    return [_PACKAGES, kind, shown, _PACKAGES, *(path for path in sys.path if os.path.isabs(path))]


def start_keeper(snapshot: str) -> StartedKeeper:
    """Start the keeper, and its page server, for a snapshot by the name that the user gave.

    Both import what they need, and wait for :meth:`StartedKeeper.set_up`. Raises TargetError.
    """
    words = program_words(source_kind(snapshot), snapshot)
    command = [sys.executable, "-I", "-S", "-c", _KEEPER, *words]
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        ours.close()
        raise target_error(error, "cannot start the keeper of the lazy restore") from error
    return StartedKeeper(process, ours)
