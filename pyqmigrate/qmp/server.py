"""A QMP server on a UNIX socket, in front of a migration.

::

    server = QmpServer(migration, fdsets)
    await server.listen("/run/vm.qmp")
    await server.quit_requested.wait()
    await server.close()

The socket has mode 0600, and peers of users other than ours and root are disconnected. Each client
is one task: a message is read, executed and answered before the next one, so a client that does not
read its replies stalls only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from importlib import metadata
from types import TracebackType
from typing import Self

from pyqmigrate.io.listening_socket import ListeningSocket, peer_of
from pyqmigrate.io.place import absolute
from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.qapi.event import Event
from pyqmigrate.qapi.monitor_address import monitor_path
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qmp.backend import MigrationBackend
from pyqmigrate.qmp.commands import Context, Version
from pyqmigrate.qmp.connection import Connection
from pyqmigrate.qmp.descriptors import NamedFds, PendingFds
from pyqmigrate.qmp.session import Session, event_message

__all__ = ["QmpServer"]

_log = logging.getLogger(__name__)
_CLIENTS = 16
_LARGE = 64 << 10  # bytes of a message whose answer, which may repeat it, is a thread's work


class QmpServer:
    """Serves QMP for one migration and its fdsets, both of which belong to the caller.

    A ``policy`` that imitates a QEMU also sets the announced version, the offer of out-of-band
    execution (no command here supports it), and one client at a time, while the next one waits.
    STRICT serves up to 16 at once. ``version`` overrides the announced one, ``any_user`` accepts
    peers of every user.

    The methods are for the event loop's thread; events may come from any thread.
    """

    def __init__(
        self,
        migration: MigrationBackend,
        fdsets: FdSets,
        *,
        policy: Policy = Policy.STRICT,
        version: Version | None = None,
        any_user: bool = False,
    ) -> None:
        compat = policy.compat
        self._policy = policy
        self._migration = migration
        self._fdsets = fdsets
        self._names = NamedFds()
        self._version = version or (Version(*policy.qemu.numbers) if compat else _own_version())
        self._offered = ("oob",) if compat else ()
        self._any_user = any_user
        self._places = asyncio.Semaphore(1 if compat else _CLIENTS)
        self._connections: dict[Connection, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Each with its path, which the current directory does not change, and what has it.
        self._listeners: list[ListeningSocket] = []
        self._unsubscribe: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._quitting = False
        self.quit_requested = asyncio.Event()
        """Set when a client sent ``quit``; ending is up to the embedder."""

    async def listen(self, path: str | os.PathLike[str]) -> None:
        """Listen on a new UNIX socket at ``path``, mode 0600; return when clients can connect.

        ``path`` may have the form ``unix:PATH``. A socket without a listener is replaced. Raises
        TargetError if ``path`` is in use or cannot be created, UsageError for another kind of address
        and for a file name that a socket cannot have.
        """
        place = absolute(monitor_path(path))
        listener = ListeningSocket(place, "the QMP socket")
        self._listeners.append(listener)
        if self._unsubscribe is None:
            self._loop = asyncio.get_running_loop()
            self._unsubscribe = self._migration.subscribe(
                lambda event: self._call_soon(self.send_event, event)
            )
        self._start(self._accept(listener.socket))

    def send_event(self, event: Event) -> None:
        """Send an event to every client that has finished negotiation."""
        message = event_message(event)
        for connection, session in list(self._connections.items()):
            if session.negotiated:
                connection.send(message)

    async def close(self) -> None:
        """Stop listening, end every connection, and close pending and named descriptors.

        Replies are sent before that if the client accepts them at once.
        """
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._names.close_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as refused:  # out of descriptors, say: the client may try again
                _log.warning("cannot accept a client: %s", refused.strerror)
                self._places.release()
                await asyncio.sleep(0.1)
                continue
            except BaseException:
                self._places.release()
                raise
            client.setblocking(False)
            if self._any_user or _is_trusted(client):
                self._start(self._serve(client))
            else:
                client.close()
                self._places.release()

    async def _serve(self, client: socket.socket) -> None:
        pending = PendingFds()
        context = Context(
            self._migration,
            self._fdsets,
            self._names,
            pending,
            self._version,
            self._quit,
            self._policy,
        )
        session = Session(context, offered=self._offered)
        connection = Connection(client, pending, positions=self._policy.qemu.json_positions)
        self._connections[connection] = session
        try:
            connection.send(session.greeting())
            position = 0
            async for item in connection:
                answer = await session.answer(item)
                if item.end - position > _LARGE:
                    await connection.send_large(answer)
                else:
                    connection.send(answer)
                position = item.end
                del answer, item  # while the client is waited for, they would be kept
                if self._quitting and not self.quit_requested.is_set():
                    self._announce_quit()
                await connection.sent()
        except OSError as broken:
            _log.info("a client is gone: %s", broken.strerror or broken)
        except Exception:
            _log.exception("a client is cut off for an unforeseen reason")
        finally:
            del self._connections[connection]
            connection.close()
            self._places.release()

    def _quit(self) -> None:
        self._quitting = True  # acted on when the client has its answer; from any thread

    def _announce_quit(self) -> None:
        data = {"guest": False, "reason": "host-qmp-quit"}
        self.send_event(Event("SHUTDOWN", data, time.time()))
        self.quit_requested.set()

    def _call_soon(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop is closed, and no client is connected
                self._loop.call_soon_threadsafe(call, *arguments)


def _is_trusted(client: socket.socket) -> bool:
    pid, uid = peer_of(client)
    if uid in (0, os.geteuid()):
        return True
    _log.warning("turned away process %d of user %d: only ours and root may connect", pid, uid)
    return False


def _own_version() -> Version:
    try:
        text = metadata.version("pyqmigrate")
    except metadata.PackageNotFoundError:
        text = "0.0.0"
    parts = [int(part) if part.isdecimal() else 0 for part in [*text.split("."), "0", "0"]]
    return Version(parts[0], parts[1], parts[2], f"pyqmigrate {text}")
