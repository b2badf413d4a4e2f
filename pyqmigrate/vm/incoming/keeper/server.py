"""The page server as a child process, and the channel to it.

A server is started before it is known what it serves, so that its imports are done by then
(:mod:`pyqmigrate.vm.incoming.keeper.preloaded`).
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple

from pyqmigrate.vm.incoming.keeper.lines import Lines

__all__ = ["ServerProcess", "ServerProgram"]

_LAST_WORDS = 4096  # bytes of the server's standard error kept


class ServerProcess:
    """A page server: its process, a child of this one, and the control channel.

    ``errors`` is a pipe from its standard error. Both are taken over.
    """

    def __init__(self, pid: int, control: socket.socket, errors: int) -> None:
        self.pid = pid
        self.control = Lines(control)
        self.pidfd = os.pidfd_open(pid)
        self._stderr = errors
        os.set_blocking(errors, False)
        self._closed = False
        self.served = False  # has QEMU taken anything from it?
        self.error = ""
        self._errors = b""

    def serve(
        self, words: Sequence[str], snapshot: str | int, source: socket.socket, kept: Sequence[int]
    ) -> None:
        """Have it serve ``snapshot``, a name or the index of one of the descriptors ``kept``, over
        ``source``, which is closed: only the server may keep it, as QEMU has to notice its end."""
        with source:
            self.control.send({"words": [*words], "snapshot": snapshot}, [source.fileno(), *kept])

    def kill(self) -> None:
        if not self._closed:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def read_errors(self) -> None:
        """Keep the end of its standard error."""
        try:
            while data := os.read(self._stderr, 65536):
                self._errors = (self._errors + data)[-_LAST_WORDS:]
        except OSError:
            return

    def close(self) -> str:
        """End it; return how it ended, with what it wrote."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if not ended:
            self.kill()
            _, status = os.waitpid(self.pid, 0)
        self._closed = True
        self.read_errors()
        self.control.close()
        os.close(self.pidfd)
        os.close(self._stderr)
        if self.error:
            return self.error
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        text = self._errors.decode("utf-8", "replace").strip()
        return f"the page server {how}" + (f": {text}" if text else "")


class ServerProgram(NamedTuple):
    """How to start a server: ``command`` is a program whose standard input is the control channel."""

    command: Sequence[str]

    def spawn(self) -> ServerProcess:
        """Start one that waits for what to serve. Raises OSError."""
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, writer, 2),
        ]
        words = list(self.command)
        try:
            pid = os.posix_spawn(words[0], words, os.environ, file_actions=actions, setsid=True)
        except BaseException:
            ours.close()
            os.close(reader)
            raise
        finally:
            theirs.close()
            os.close(writer)
        return ServerProcess(pid, ours, reader)
