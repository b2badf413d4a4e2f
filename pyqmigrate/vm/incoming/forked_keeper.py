"""The keeper of a lazy restore as a fork of this process, for a command that has a single thread.

A command has imported most of what a page server needs when it starts QEMU. A fork has it, too: the
server is ready before QEMU is. A process with threads must start a new program instead
(:func:`~pyqmigrate.vm.incoming.lazy_keeper.start_keeper`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time

from pyqmigrate.errors import target_error
from pyqmigrate.vm.incoming.keeper.boot import keep
from pyqmigrate.vm.incoming.lazy_keeper import StartedKeeper, program_words, source_kind

__all__ = ["ForkedProcess", "fork_keeper"]

_POLL = 0.005  # seconds


class ForkedProcess:
    """A child that was forked; as :class:`subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit status, None while it lives."""
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # the caller ignores SIGCHLD
                ended, status = self.pid, 0
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the keeper", timeout or 0.0)
            time.sleep(_POLL)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_keeper(snapshot: str) -> StartedKeeper:
    """As :func:`~pyqmigrate.vm.incoming.lazy_keeper.start_keeper`, by a fork. Raises TargetError."""
    ours, theirs = socket.socketpair()
    words = program_words(source_kind(snapshot), snapshot)
    try:
        pid = os.fork()
    except OSError as error:
        ours.close()
        theirs.close()
        raise target_error(error, "cannot start the keeper of the lazy restore") from error
    if not pid:
        _become_keeper(theirs.fileno(), words)
    theirs.close()
    return StartedKeeper(ForkedProcess(pid), ours)


def _become_keeper(channel: int, words: list[str]) -> None:
    """Keep a restore, with the channel as standard input. Ends the process."""
    try:
        os.setsid()
        os.chdir("/")
        os.dup2(channel, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.closerange(
            3, os.sysconf("SC_OPEN_MAX")
        )  # of the command: QEMU must be the only one to keep them
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        keep(words)
        os._exit(0)
    finally:
        os._exit(1)
