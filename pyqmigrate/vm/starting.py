"""A QEMU process that is started here, and what it says before it is somebody else's.

The monitor is a socket that QEMU inherits, described in a ``-readconfig`` of its own: QEMU counts
``-mon`` and ``-qmp`` on the command line as a wish for no other monitor, and the command line
stays as its owner wrote it. That description is a pipe whose end comes when QEMU is on a leash:
until it is handed over, it does not outlive this process. What QEMU writes to standard error is
kept until then, so that it can be part of an error, and passed on afterwards.

There is no event loop here: a command that restores a guest imports one while QEMU starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.vm.command_line import CommandLine, Option
from pyqmigrate.vm.leash import Leash

__all__ = ["END_TIMEOUT", "Started", "Stream", "start"]

Stream = int | IO[bytes] | None
END_TIMEOUT = 5.0  # seconds from a request to end to SIGTERM, and from that to SIGKILL
_KEPT = 1 << 16  # bytes of standard error that a message may have to draw on
_LAST_WORDS = 0.2  # seconds that QEMU's last lines may need to arrive
_NAME = "pyqmigrate"
# QEMU takes the head alone for a mistake, and ends.
_HEAD = '[chardev "'
_CONFIGURATION = """{name}"]
  backend = "socket"
  fd = "{fd}"
  server = "on"
  wait = "off"
[mon "{name}"]
  chardev = "{name}"
  mode = "control"
"""


class Started:
    """A process on a leash. ``monitor_path`` is the socket on which its monitor will answer, until
    :meth:`forget_socket`; ``at`` is when it was started (``time.monotonic``)."""

    def __init__(self, at: float, resources: contextlib.ExitStack, leash: Leash) -> None:
        self.at = at
        self.monitor_path = Path()
        self._resources = resources
        self._leash = leash
        self.process: subprocess.Popen[bytes]
        self._errors: _ErrorOutput

    def forget_socket(self) -> None:
        """Remove the name of the monitor's socket: who is to be connected is."""
        self._resources.close()

    def describe(self, what: str) -> str:
        """``what``, how the process ended if it did, and what it wrote to standard error."""
        return _describe(what, self.process, self._errors)

    def wait(self, timeout: float) -> None:
        """For its end, but not for longer than so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)

    def hand_over(self) -> None:
        """From here on QEMU lives without us, and standard error goes where the caller wanted."""
        self._leash.close()
        self._errors.hand_over()

    def end(self) -> None:
        """By SIGTERM, and at last by SIGKILL. May be repeated."""
        _end(self.process)
        self._leash.close()
        self._resources.close()
        self._errors.join()


def start(
    command: CommandLine, pass_fds: Collection[int], *,
    stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
) -> Started:
    """Start ``command``, with a monitor of ours besides.

    Streams are as subprocess.Popen takes them; None is this process's own. Not for the main thread:
    a signal that raised between the fork and our knowing of it would leave the process alone.

    Raises QemuError when there is no such program, UsageError for words that no program can be
    given.
    """
    at = time.monotonic()
    with contextlib.ExitStack() as failed, contextlib.ExitStack() as ours:
        kept = failed.enter_context(contextlib.ExitStack())
        leash = Leash()
        failed.callback(leash.close)
        started = Started(at, kept, leash)
        directory = kept.enter_context(tempfile.TemporaryDirectory(prefix="pyqmigrate-"))
        started.monitor_path = Path(directory) / "qmp"
        # Nobody but QEMU may hold these: that it is gone is seen by their being closed.
        listener = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(started.monitor_path))
        listener.listen(1)
        configuration, writer = os.pipe2(os.O_CLOEXEC)
        ours.callback(os.close, configuration)
        os.fchmod(configuration, 0o444)  # QEMU opens it by name, and may be another user
        description = ours.enter_context(os.fdopen(writer, "w"))
        description.write(_HEAD)
        description.flush()
        own = Option("readconfig", f"/proc/self/fd/{configuration}")
        started._errors = errors = _ErrorOutput(stderr)
        ours.callback(errors.close_writer)
        try:
            started.process = subprocess.Popen(
                command.with_options(own).argv(), stdin=stdin, stdout=stdout, stderr=errors.writer,
                pass_fds=(listener.fileno(), configuration, leash.fd, *pass_fds),
                cwd=command.directory,
            )
        except OSError as error:
            raise QemuError(f"{command.program} does not start: {error.strerror}") from error
        except ValueError as error:  # a NUL, or a character that the system's encoding lacks
            raise UsageError(f"a word of the command line cannot be one: {error}") from error
        failed.callback(_end, started.process)
        leash.hold(started.process.pid)
        with contextlib.suppress(BrokenPipeError):  # it has ended, and will be asked why
            description.write(_CONFIGURATION.format(name=_NAME, fd=listener.fileno()))
            description.close()
        failed.pop_all()
        return started


class _ErrorOutput:
    """Standard error of a process: kept at first, passed on to ``target`` later."""

    def __init__(self, target: Stream) -> None:
        self._target = _descriptor(target)
        self._kept: bytearray | None = bytearray()
        self._lock = threading.Lock()
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._pump, name="pyqmigrate-stderr", daemon=True)
        self._thread.start()

    def close_writer(self) -> None:
        """Our copy of what the process got."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def text(self) -> str:
        with self._lock:
            return (self._kept or b"").decode("utf-8", "replace").strip()

    def hand_over(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, None
            if kept:
                self._write(bytes(kept))

    def join(self, timeout: float = _LAST_WORDS) -> None:
        """Wait until the process has closed it."""
        self._thread.join(timeout)

    def _pump(self) -> None:
        try:
            while data := os.read(self._reader, 65536):
                with self._lock:
                    if self._kept is None:
                        self._write(data)
                    else:
                        self._kept += data
                        del self._kept[:-_KEPT]
        finally:
            os.close(self._reader)
            os.close(self._target)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more; QEMU goes on
            while data:
                data = data[os.write(self._target, data) :]


def _descriptor(target: Stream) -> int:
    """A descriptor of our own that writes to ``target``."""
    if target == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    number = 2 if target is None else target if isinstance(target, int) else target.fileno()
    try:
        return os.dup(number)
    except OSError:  # a process without standard error
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _describe(what: str, process: subprocess.Popen[bytes], errors: _ErrorOutput) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_WORDS)
    code = process.returncode
    if code is not None:
        errors.join()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        what = f"{what}: it {how}"
    text = errors.text()
    return f"{what}; QEMU wrote:\n{text}" if text else f"{what}; QEMU wrote nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
