"""A server in a thread of its own, and a raw client that says exactly what it is told."""

from __future__ import annotations

import array
import asyncio
import json
import socket
import threading
from pathlib import Path

from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qmp import QmpServer
from tests.harness.idle_guest import IdleGuest


class RawClient:
    def __init__(self, path, *, negotiate=True):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self._lines = self.sock.makefile("rb")
        self.events = []
        if negotiate:
            self.greeting = self.line()
            assert self.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}

    def line(self):
        """The next line, parsed; None when the server has closed the connection."""
        line = self._lines.readline()
        if not line:
            return None
        assert line.endswith(b"\r\n")
        assert line.isascii()
        return json.loads(line)

    def answer(self):
        """The next line that is no event."""
        while "event" in (message := self.line()):
            self.events.append(message)
        return message

    def event(self):
        """The next event, whether it has been passed over by an answer or not."""
        if self.events:
            return self.events.pop(0)
        message = self.line()
        assert "event" in message, message
        return message

    def send(self, data, fds=()):
        if not fds:
            self.sock.sendall(data)
            return
        rights = array.array("i", fds)
        self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def ask(self, data, fds=()):
        self.send(data, fds)
        return self.answer()

    def execute(self, command, **arguments):
        return self.call(command, {n.replace("_", "-"): v for n, v in arguments.items()})

    def call(self, command, arguments):
        return self.ask(json.dumps({"execute": command, "arguments": arguments}).encode())

    def close(self):
        self._lines.close()
        self.sock.close()


class ServerThread:
    """Runs a QmpServer until it is stopped."""

    def __init__(self, path, **options):
        self.path = Path(path)
        self.fdsets = FdSets()
        policy = options.pop("policy", Policy.COMPAT)
        names = ("incoming", "hold", "memory")
        guest_options = {name: options.pop(name) for name in names if name in options}
        self.guest = IdleGuest(self.fdsets, policy=policy, **guest_options)
        self._options = {"policy": policy, **options}
        self._ready = threading.Event()
        self._stop = None
        self._failure = None
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _main(self):
        try:
            asyncio.run(self._serve())
        except BaseException as failure:
            self._failure = failure
        finally:
            self._ready.set()

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with QmpServer(self.guest, self.fdsets, **self._options) as self.server:
            await self.server.listen(self.path)
            self._ready.set()
            await self._stop.wait()

    def close(self):
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.guest.close()
        self.fdsets.close()
        if self._failure is not None:
            raise self._failure
