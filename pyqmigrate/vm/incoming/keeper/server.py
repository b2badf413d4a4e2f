"""The page server as a child process, and the channel to it."""

from __future__ import annotations

import os
import socket
import subprocess

from pyqmigrate.vm.incoming.keeper.lines import Lines

__all__ = ["ServerProcess"]

_LAST_WORDS = 4096  # bytes of the server's standard error kept


class ServerProcess:
    """A page server: its process, and the control channel."""

    def __init__(self, command: list[str], source: socket.socket, fds: list[int]) -> None:
        ours, theirs = socket.socketpair()
        with theirs, source:  # only the server may keep them: its end is noticed by QEMU
            words = ["--fd", str(source.fileno()), "--control", str(theirs.fileno())]
            self.process = subprocess.Popen(
                [*command, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[source.fileno(), theirs.fileno(), *fds],
                start_new_session=True,
            )
        self.control = Lines(ours)
        self.pidfd = os.pidfd_open(self.process.pid)
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        self.served = False  # has QEMU taken anything from it?
        self.error = ""
        self._errors = b""

    @property
    def stderr(self) -> int:
        assert self.process.stderr is not None
        return self.process.stderr.fileno()

    def read_errors(self) -> bool:
        """Keep the end of its standard error; return whether there may be more."""
        try:
            data = os.read(self.stderr, 65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._errors = (self._errors + data)[-_LAST_WORDS:]
        return bool(data)

    def close(self) -> str:
        """End it; return how it ended, with what it wrote."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        self.read_errors()
        self.control.close()
        os.close(self.pidfd)
        assert self.process.stderr is not None
        self.process.stderr.close()
        if self.error:
            return self.error
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        text = self._errors.decode("utf-8", "replace").strip()
        return f"the page server {how}" + (f": {text}" if text else "")
