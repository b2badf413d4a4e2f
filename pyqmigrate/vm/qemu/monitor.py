"""A negotiated QMP session with a running QEMU.

    async with await Monitor.connect("/run/guest.qmp") as monitor:
        print(monitor.version, await monitor.execute("query-status"))

The session is that of the library ``qemu.qmp``. This module adds time limits, this package's
exceptions, and the transfer of descriptors one at a time, as QEMU takes them (docs/internals/qemu-management.md,
"Passing descriptors" and "Rules for a client").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any, Self, cast

from pyqmigrate.errors import NotSupported, QemuError, QemuGone, QemuRefused
from pyqmigrate.qapi.monitor_address import monitor_path
from pyqmigrate.vm.qemu.peer import Peer

try:
    from qemu.qmp import (
        EventListener,
        ExecInterruptedError,
        ExecuteError,
        QMPClient,
        QMPError,
        StateError,
    )
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise NotSupported(
        "working with a running QEMU needs the library qemu.qmp: pip install qemu.qmp"
    ) from error

__all__ = ["GREETING_TIMEOUT", "EndedMonitor", "Monitor"]

GREETING_TIMEOUT = 5.0  # seconds; a QEMU whose monitor is free greets at once
_RETRY = 0.02  # seconds between attempts to connect to a full queue
_ANSWER_TIMEOUT = 60.0  # seconds; QEMU answers while it saves, but may wait for a disk


class Monitor:
    """One session. ``version`` is QEMU's, as (major, minor, micro).

    ``peer`` is the other end of the connection. Commands run one at a time.
    """

    def __init__(self, client: QMPClient, path: Path, peer: Peer) -> None:
        self._client = client
        self._turn = asyncio.Lock()
        self.path = path
        self.peer = peer
        assert client.greeting is not None
        version = cast("Mapping[str, int]", client.greeting.QMP.version["qemu"])
        self.version = (version["major"], version["minor"], version["micro"])

    @classmethod
    async def connect(
        cls, path: str | os.PathLike[str], *, timeout: float = GREETING_TIMEOUT
    ) -> Self:
        """Connect to the UNIX socket at ``path`` and negotiate, in at most ``timeout`` seconds.

        ``path`` may be written ``unix:PATH``. Raises UsageError for another kind of address,
        QemuError if no process listens, or if no greeting comes: a monitor serves one client at a
        time.
        """
        where = monitor_path(path)
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                connection = await _open(where)
        except TimeoutError as error:
            raise _no_greeting(where, timeout) from error
        left = deadline - asyncio.get_running_loop().time()
        return await cls.over(connection, where, timeout=left)

    @classmethod
    async def over(
        cls, connection: socket.socket, name: str | os.PathLike[str], *, timeout: float
    ) -> Self:
        """Negotiate over a connected socket, which the session takes over.

        Errors call it ``name``. Raises QemuError when no greeting comes.
        """
        where = Path(name)
        deadline = asyncio.get_running_loop().time() + timeout
        connection.setblocking(False)
        client = QMPClient(str(where))
        client.logger = _SILENT
        try:
            async with asyncio.timeout_at(deadline):
                await client.connect(connection)
            peer = Peer.of(connection)
        except TimeoutError as error:
            connection.close()
            raise _no_greeting(where, timeout) from error
        except (QMPError, OSError, EOFError) as error:
            connection.close()
            raise QemuGone(
                f"the monitor {where} does not speak QMP, or hung up: {error}"
            ) from error
        return cls(client, where, peer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Idempotent, and harmless when QEMU has ended."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = _ANSWER_TIMEOUT,
    ) -> Any:
        """Run a command and return its result.

        Raises QemuRefused when QEMU answers with an error, QemuGone when it hung up, QemuError
        when there is no answer within ``timeout`` seconds, if that is not None.
        """
        async with self._turn:
            return await self._execute(command, arguments, timeout)

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, timeout: float | None
    ) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise QemuRefused(command, str(error), error.error_class) from error
        except (ExecInterruptedError, StateError, OSError, EOFError) as error:
            if timeout is not None and isinstance(error, TimeoutError):
                raise QemuError(f"QEMU has not answered {command} within {timeout:g} s") from error
            raise QemuGone(f"QEMU hung up on {command}: it ended, or was killed") from error

    async def pause(self, seconds: float) -> None:
        """Let the event loop do other work for this long."""
        await asyncio.sleep(seconds)

    def listener(self, names: Collection[str]) -> contextlib.AbstractContextManager[EventListener]:
        """Return a queue of the events with these names, filled until the context ends."""
        return self._client.listener(names)

    async def hmp(self, line: str) -> str:
        """Run ``line`` in the human monitor and return its output."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def add_fd(self, fd: int, *, fdset_id: int | None = None, opaque: str = "") -> int:
        """Pass a descriptor into a fdset and return the set's id. The caller keeps ``fd``."""
        arguments: dict[str, object] = {"opaque": opaque} if opaque else {}
        if fdset_id is not None:
            arguments["fdset-id"] = fdset_id
        async with self._turn:
            self._send_fd(fd)
            added = await self._execute("add-fd", arguments, _ANSWER_TIMEOUT)
        return int(added["fdset-id"])

    async def get_fd(self, fd: int, name: str) -> None:
        """Pass a descriptor to QEMU, for addresses ``fd:NAME``. The caller keeps ``fd``."""
        async with self._turn:
            self._send_fd(fd)
            await self._execute("getfd", {"fdname": name}, _ANSWER_TIMEOUT)

    def _send_fd(self, fd: int) -> None:
        try:
            self._client.send_fd_scm(fd)
        except (StateError, OSError) as error:
            raise QemuGone("QEMU hung up before it received a descriptor") from error

    @contextlib.asynccontextmanager
    async def fdset(self, fds: Mapping[str, int]) -> AsyncIterator[int]:
        """Make a fdset of these descriptors and return its id; the names describe them to people.

        The set is removed at the end, but not after an exception: QEMU 10.0.2 crashes when a
        migration does not find its descriptor.
        """
        fdset_id: int | None = None
        for name, fd in fds.items():
            fdset_id = await self.add_fd(fd, fdset_id=fdset_id, opaque=name)
        if fdset_id is None:
            raise ValueError("a fdset has at least one descriptor")
        yield fdset_id
        await self.execute("remove-fd", {"fdset-id": fdset_id})


class EndedMonitor(Monitor):
    """The monitor of a QEMU of ``version`` that ended before there was a session with it."""

    def __init__(self, version: tuple[int, int, int]) -> None:
        self.version = version

    async def close(self) -> None:
        pass

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = _ANSWER_TIMEOUT,
    ) -> Any:
        raise QemuGone(f"QEMU has ended: it cannot run {command}")


def _no_greeting(path: Path, seconds: float) -> QemuError:
    return QemuError(
        f"no greeting from the monitor {path} within {seconds:g} s: another client holds it (a "
        "monitor serves one at a time), or QEMU hangs; end that client, or give QEMU a second "
        "-qmp socket"
    )


async def _open(path: Path) -> socket.socket:
    """Return a connected, non-blocking socket. The path may have any length."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    place = -1
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        while True:
            try:
                connection.connect(f"/proc/self/fd/{place}")
                break
            except BlockingIOError:  # the queue of clients is full; asyncio would fail
                await asyncio.sleep(_RETRY)
    except OSError as error:
        connection.close()
        raise QemuError(f"cannot connect to the monitor {path}: {error.strerror}") from error
    except BaseException:
        connection.close()
        raise
    finally:
        if place >= 0:
            os.close(place)
    return connection


_SILENT = logging.getLogger("pyqmigrate.qmp")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
