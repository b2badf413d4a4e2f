"""A pool behind a UNIX socket: each client gets guests of its own.

A guest belongs to the connection that took it. No other can reset or end it, and when the connection
ends, for whatever reason, so does the guest. A server that keeps guests lets them go on instead: then
any client may reset or end them by their numbers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.io.listening_socket import ListeningSocket, peer_of
from pyqmigrate.io.place import absolute
from pyqmigrate.log import logger
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.pool.guest import PooledGuest
from pyqmigrate.vm.pool.pool import Pool
from pyqmigrate.vm.pool.protocol import (
    LINE_MAX,
    Command,
    Request,
    decode_line,
    encode_error,
    encode_reply,
)

__all__ = ["PoolServer", "guest_data"]

_CLIENTS_MAX = 256
_Guests = dict[int, PooledGuest]


class PoolServer:
    """Serves ``pool``, which stays the caller's, at the socket ``path``, mode 0600.

    keep: whether a guest goes on when its client hangs up. An asynchronous context manager; leaving
        it hangs up on all clients and removes the socket.

    Entering raises TargetError if the path is in use, UsageError for a name that a socket cannot have.
    """

    def __init__(self, pool: Pool, path: str | os.PathLike[str], *, keep: bool = False) -> None:
        self.path: Path = absolute(path)
        self._pool = pool
        self._keep = keep
        self._kept: _Guests = {}  # of clients that have hung up
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._listening: ListeningSocket | None = None

    async def __aenter__(self) -> Self:
        self._listening = ListeningSocket(self.path, "the pool's socket")
        try:
            self._server = await asyncio.start_unix_server(
                self._accept, sock=self._listening.socket, limit=LINE_MAX
            )
        except BaseException:
            self._listening.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        assert self._listening is not None
        self._server.close()
        self._listening.close()
        for client in self._clients:
            client.cancel()
        await shielded(_wait_for(self._clients))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if refused := self._refusal(writer):
                writer.write(encode_error(UsageError(refused)))
            else:
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the server is closed; a task of asyncio's own would log it
        finally:
            self._clients.discard(task)
            writer.close()

    def _refusal(self, writer: asyncio.StreamWriter) -> str:
        """Return why a client is not served; empty if it is."""
        pid, user = peer_of(writer.get_extra_info("socket"))
        if user != os.geteuid():
            logger.warning("process %d of user %d was turned away from the pool", pid, user)
            return "only the user who runs the pool may use it"
        if len(self._clients) > _CLIENTS_MAX:
            return f"the pool has {_CLIENTS_MAX} clients, the most that it serves"
        return ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guests: _Guests = {}
        try:
            reading = asyncio.ensure_future(reader.readuntil())
            try:
                while True:
                    line = await reading
                    reading = asyncio.ensure_future(reader.readuntil())
                    if await self._answer(line, guests, reading, writer):
                        return
            except asyncio.LimitOverrunError:
                writer.write(encode_error(UsageError(f"a request has at most {LINE_MAX} bytes")))
            except (asyncio.IncompleteReadError, OSError):
                return  # the client has hung up
            finally:
                reading.cancel()
                await asyncio.wait([reading])
                if not reading.cancelled():
                    reading.exception()  # retrieved, so that asyncio does not log it
        finally:
            await shielded(self._leave(guests))

    async def _answer(
        self,
        line: bytes,
        guests: _Guests,
        reading: asyncio.Future[bytes],
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Answer one request; return whether the client has hung up, which cancels the request unless
        guests are kept. A new guest whose reply cannot be sent is ended: nobody knows it."""
        identity, before = None, dict(guests)
        try:
            data, identity = decode_line(line)
            reply = await self._unless_hung_up(self._do(Request.decode(data), guests), reading)
        except PyqmigrateError as error:
            writer.write(encode_error(error, identity))
        else:
            if reply is None:
                return True
            writer.write(encode_reply(reply, identity))
        try:
            await writer.drain()
        except OSError:
            new = [guests.pop(number) for number in guests.keys() - before.keys()]
            await shielded(_end_all(new))
            raise
        return False

    async def _unless_hung_up(
        self, work: Coroutine[Any, Any, dict[str, Any]], reading: asyncio.Future[bytes]
    ) -> dict[str, Any] | None:
        """Return the result of ``work``; cancel it and return None if the client hangs up."""
        task = asyncio.ensure_future(work)
        try:
            if not self._keep:
                either: list[asyncio.Future[Any]] = [task, reading]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not task.done() and isinstance(
                    reading.exception(), asyncio.IncompleteReadError | OSError
                ):
                    return None
            return await asyncio.shield(task)
        finally:
            task.cancel()
            await shielded(_wait_for({task}))

    async def _do(self, request: Request, guests: _Guests) -> dict[str, Any]:
        if request.command is Command.STATUS:
            return self._status(guests)
        if request.command is Command.TAKE:
            new = await self._pool.take(paused=request.paused)
            guests[new.number] = new
            return {"guest": guest_data(new)}
        old = self._find(request.number, guests)
        guests.pop(old.number, None)
        self._kept.pop(old.number, None)
        if request.command is Command.END:
            await old.end()
            return {"ended": old.number}
        new = await self._pool.reset(old, paused=request.paused)
        guests[new.number] = new
        return {"guest": guest_data(new), "ended": old.number}

    def _find(self, number: int | None, guests: _Guests) -> PooledGuest:
        """Return a guest that this client may end."""
        if number is None:
            if len(guests) != 1:
                raise UsageError(f"this client has {len(guests)} guests: give the number of one")
            return next(iter(guests.values()))
        guest = guests.get(number) or self._kept.get(number)
        if guest is None:
            raise UsageError(f"guest {number} is not one of this client's")
        return guest

    def _status(self, guests: _Guests) -> dict[str, Any]:
        pool = self._pool
        self._forget_ended()
        error = pool.last_error
        return {
            "ready": len(pool.ready),
            "starting": pool.starting,
            "taken": len(pool.taken),
            "limit": pool.limit,
            "guests": sorted(guests),
            "kept": sorted(self._kept),
            "error": None if error is None else str(error),
        }

    async def _leave(self, guests: _Guests) -> None:
        """End the guests of a client that has hung up, or keep them."""
        if not self._keep:
            await _end_all([*guests.values()])
            return
        self._kept |= guests
        self._forget_ended()

    def _forget_ended(self) -> None:
        for number in [n for n, guest in self._kept.items() if guest.has_ended]:
            del self._kept[number]


def guest_data(guest: PooledGuest) -> dict[str, Any]:
    """Return what a client is told of its guest."""
    sockets = []
    for listener in guest.listeners:
        place = {"path": listener.path} if listener.path else {}
        address = {} if place else {"host": listener.host, "port": listener.port}
        option = {
            "option": f"-{listener.option.name}",
            "id": listener.option.properties().get("id"),
        }
        sockets.append({**option, **place, **address})
    return {
        "number": guest.number,
        "pid": guest.pid,
        "qmp": str(guest.qmp),
        "run_state": guest.run_state,
        "mode": str(guest.report.mode),
        "sockets": sockets,
    }


async def _end_all(guests: list[PooledGuest]) -> None:
    await asyncio.gather(*(guest.end() for guest in guests), return_exceptions=True)


async def _wait_for(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
