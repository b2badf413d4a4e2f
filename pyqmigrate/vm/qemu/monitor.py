"""A negotiated QMP session with a running QEMU.

    async with await Monitor.connect("/run/guest.qmp") as monitor:
        print(monitor.version, await monitor.execute("query-status"))

The session is the library ``qemu.qmp``'s; here are the time limits, errors of this package's own
that say what happened, and descriptors handed over one at a time, as QEMU takes them
(docs/internals/qemu-management.md, "Passing descriptors" and "Rules for a client").
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

__all__ = ["GREETING_TIMEOUT", "Monitor"]

GREETING_TIMEOUT = 5.0  # seconds; a QEMU whose monitor is free greets at once
_QUEUE_FULL = 0.02  # seconds before another attempt to connect
_ANSWER_TIMEOUT = 60.0  # seconds; QEMU answers while it migrates, but may wait for a disk


class Monitor:
    """One session. ``version`` is QEMU's, as (major, minor, micro).

    ``peer`` is the other end of the connection. One command is under way at a time, whoever asks.
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
        QemuError when nobody listens, and when no greeting comes: a monitor serves one client at a
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
        """Negotiate over a connected socket, which is the session's from now on.

        ``name`` is what errors call it. Raises QemuError when no greeting comes.
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
            raise QemuGone(f"the monitor {where} is not QMP, or hung up: {error}") from error
        return cls(client, where, peer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up. May be repeated, and when QEMU is gone."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = _ANSWER_TIMEOUT,
    ) -> Any:
        """Run one command and return what it returns.

        Raises QemuRefused when QEMU answers with an error, QemuGone when it hung up, QemuError
        when there is no answer within ``timeout`` seconds.
        """
        async with self._turn:
            return await self._execute(command, arguments, timeout)

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, timeout: float
    ) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise QemuRefused(command, str(error), error.error_class) from error
        except (ExecInterruptedError, StateError, OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                raise QemuError(f"QEMU has not answered {command} within {timeout:g} s") from error
            raise QemuGone(f"QEMU hung up on {command}: it ended, or was killed") from error

    def listener(self, names: Collection[str]) -> contextlib.AbstractContextManager[EventListener]:
        """A queue of the events of these names, from now until the end of the context."""
        return self._client.listener(names)

    async def hmp(self, line: str) -> str:
        """What the human monitor prints on ``line``."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def add_fd(self, fd: int, *, fdset_id: int | None = None, opaque: str = "") -> int:
        """Hand a descriptor over into a fdset; returns the set's id. ``fd`` stays the caller's."""
        arguments: dict[str, object] = {"opaque": opaque} if opaque else {}
        if fdset_id is not None:
            arguments["fdset-id"] = fdset_id
        async with self._turn:
            self._lend(fd)
            added = await self._execute("add-fd", arguments, _ANSWER_TIMEOUT)
        return int(added["fdset-id"])

    def _lend(self, fd: int) -> None:
        try:
            self._client.send_fd_scm(fd)
        except (StateError, OSError) as error:
            raise QemuGone("QEMU hung up before it got a descriptor") from error

    @contextlib.asynccontextmanager
    async def fdset(self, fds: Mapping[str, int]) -> AsyncIterator[int]:
        """A new fdset of these descriptors (their names tell a person what they are); its id.

        The set is removed afterwards, except when something fails meanwhile: a migration that
        looks for a descriptor in vain is the end of QEMU 10.0.2.
        """
        fdset_id: int | None = None
        for name, fd in fds.items():
            fdset_id = await self.add_fd(fd, fdset_id=fdset_id, opaque=name)
        if fdset_id is None:
            raise ValueError("a fdset has at least one descriptor")
        yield fdset_id
        await self.execute("remove-fd", {"fdset-id": fdset_id})


def _no_greeting(path: Path, seconds: float) -> QemuError:
    return QemuError(
        f"no greeting from the monitor {path} within {seconds:g} s: another client holds it (a "
        "monitor serves one at a time), or QEMU hangs; end that client, or give QEMU a second "
        "-qmp socket"
    )


async def _open(path: Path) -> socket.socket:
    """A connected, non-blocking socket; a path of any length."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    place = -1
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        while True:
            try:
                connection.connect(f"/proc/self/fd/{place}")
                break
            except BlockingIOError:  # others wait before us, as many as may; asyncio connects not
                await asyncio.sleep(_QUEUE_FULL)
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
