"""The keeper process of a lazy restore, and what it reports.

    lazy = start_keeper(snapshot, kept, options, monitor, source)
    lazy.attach()                                # in the event loop
    lazy.begin(pid, page_sizes, collapse)
    await lazy.loaded()                          # the guest can run; its pages follow
    await lazy.completed()                       # it has all of its memory

See :mod:`pyqmigrate.vm.incoming.keeper.keeper`. The keeper goes on when this process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyqmigrate
from pyqmigrate.errors import QemuError, TargetError, target_error
from pyqmigrate.vm.incoming.keeper.keeper import ENDED

__all__ = ["Damage", "KeeperProcess", "LazyState", "ServerSettings", "follow", "start_keeper"]

_LINE_MAX = 1 << 20
_END_TIMEOUT = 5.0  # seconds
_PACKAGES = os.path.dirname(os.path.dirname(os.path.abspath(pyqmigrate.__file__)))
_KEEPER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from pyqmigrate.vm.incoming.keeper.keeper import main; main()"
)
_SERVER = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module('pyqmigrate.page_server', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True)
class Damage:
    """A page that cannot be had from the snapshot: the guest waits when it touches it. ``why`` says
    that, with the block and the page; ``page`` is the number of the page in the block."""

    block: str
    page: int
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class LazyState:
    """How far a lazy restore is.

    ``state`` is ``starting``, ``running`` (pages are missing), ``recovering`` (the page server is
    being replaced), ``completed`` (the guest has all of its memory), ``failed`` or ``gone`` (QEMU has
    ended). ``pages_left`` counts pages with data that were not sent yet, None if that is not known;
    ``faults`` are the guest's requests for pages, ``fault_seconds`` their mean latency in the server.
    ``restarts`` counts replacements of the server, ``huge`` the bytes that were made huge pages.
    ``damages`` are pages that cannot be had, ``warnings`` sentences on what else went wrong, ``failure``
    is why it failed or ended.
    """

    state: str = "starting"
    loaded: bool = False
    pages_left: int | None = None
    faults: int = 0
    fault_seconds: float | None = None
    restarts: int = 0
    damages: tuple[Damage, ...] = ()
    warnings: tuple[str, ...] = ()
    huge: int = 0
    failure: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return what a line of the keeper says."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["damages"] = tuple(
            Damage(str(entry["block"]), int(entry["page"]), str(entry["why"]))
            for entry in values.get("damages", ())
        )
        known["warnings"] = tuple(map(str, values.get("warnings", ())))
        return cls(**known)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-compatible values."""
        return asdict(self)


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


class KeeperProcess:
    """A keeper that this process has started. ``state`` is the latest that it has reported."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.process = process
        self.state = LazyState()
        self._channel = channel
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def send(self, **line: object) -> None:
        """Send a line. Raises QemuError if the keeper has ended."""
        try:
            self._channel.sendall(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise QemuError(
                f"the keeper of the lazy restore has ended: {error.strerror}"
            ) from error

    def attach(self) -> None:
        """Follow what it reports, in the running event loop."""
        if self._reading is None:
            self._channel.setblocking(False)
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(OSError):
            await follow(self._channel, self._take)
        if not self.state.ended:
            self._take(LazyState("failed", failure="the keeper of the lazy restore has ended"))

    def _take(self, state: LazyState) -> None:
        self.state = state
        self._changed.set()

    async def changed(self) -> LazyState:
        """Wait for the next report; return it. Returns at once after the last one."""
        if not self.state.ended:
            self._changed.clear()
            await self._changed.wait()
        return self.state

    async def loaded(self) -> None:
        """Wait until QEMU has loaded the device state. Raises QemuError if it fails before."""
        while not self.state.loaded:
            if self.state.ended:
                raise QemuError(self.state.failure or "the lazy restore has ended")
            await self.changed()

    async def completed(self) -> LazyState:
        """Wait until the guest has all of its memory, and return the last report.

        Raises QemuError if QEMU ended before, or the restore failed.
        """
        while not self.state.ended:
            await self.changed()
        if self.state.state != "completed":
            raise QemuError(self.state.failure or "the lazy restore has ended")
        return self.state

    def begin(
        self, pid: int, host_pages: Mapping[str, int], collapse: Sequence[tuple[int, int]]
    ) -> None:
        """Have the stream sent to QEMU ``pid``, whose blocks have these page sizes. At the end the
        memory ``collapse``, of addresses and lengths, gets huge pages."""
        self.send(start={"pid": pid, "host_pages": dict(host_pages), "collapse": list(collapse)})

    async def close(self) -> None:
        """Follow it no longer; the keeper goes on until the guest has its memory. Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        self._channel.close()
        self.process.poll()  # no zombie, if it has ended

    def end(self) -> None:
        """End a keeper whose QEMU has ended, or has not loaded anything. Blocks. Idempotent."""
        self._channel.close()
        try:
            self.process.wait(_END_TIMEOUT)  # it ends its server
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def follow(channel: socket.socket, take: Callable[[LazyState], None]) -> None:
    """Call ``take`` with each state that comes over a non-blocking socket, until its end."""
    loop = asyncio.get_running_loop()
    received = b""
    while data := await loop.sock_recv(channel, 65536):
        *lines, received = (received + data).split(b"\n")
        if len(received) > _LINE_MAX:
            return
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                take(LazyState.of(json.loads(line)))


def start_keeper(
    snapshot: str,
    kept: Sequence[tuple[str, int]],
    settings: ServerSettings,
    monitor: socket.socket,
    source: socket.socket,
) -> KeeperProcess:
    """Start the keeper, which starts the page server of ``snapshot``.

    kept: the snapshot's files by their paths, and descriptors of them, which the keeper keeps open.
    monitor: the connection to the second monitor of a QEMU. Borrowed, as all descriptors.
    source: the socket on whose other end QEMU will expect the stream.

    Raises TargetError.
    """
    # Without site: the guest waits for the imports.
    paths = [_PACKAGES, *(path for path in sys.path if os.path.isabs(path))]
    server = [sys.executable, "-I", "-S", "-c", _SERVER, json.dumps(paths), *settings.words()]
    command = [sys.executable, "-I", "-S", "-c", _KEEPER, _PACKAGES, snapshot]
    ours, theirs = socket.socketpair()
    setup = {
        "server": server,
        "first": settings.first_words(),
        "hold": settings.record_seconds,
        "push": settings.push,
        "snapshot": snapshot,
        "kept": kept,
        "monitor": monitor.fileno(),
        "source": source.fileno(),
    }
    try:
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[monitor.fileno(), source.fileno(), *(fd for _, fd in kept)],
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        ours.close()
        raise target_error(error, "cannot start the keeper of the lazy restore") from error
    keeper = KeeperProcess(process, ours)
    try:
        keeper.send(setup=setup)
    except QemuError as error:
        keeper.end()
        raise TargetError(32, "the keeper of the lazy restore does not start") from error
    return keeper
