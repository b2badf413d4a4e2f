"""A QEMU that is started here: its monitor, and what it says before it is somebody else's.

The monitor is a socket that QEMU inherits, described in a ``-readconfig`` of its own: QEMU counts
``-mon`` and ``-qmp`` on the command line as a wish for no other monitor, and the command line
stays as its owner wrote it. That description is a pipe whose end comes when QEMU is on a leash:
until it is handed over, it does not outlive this process. What QEMU writes to standard error is
kept until then, so that it can be part of an error, and passed on afterwards.
"""

from __future__ import annotations

import asyncio
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
from typing import IO, Self

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.vm.command_line import CommandLine, Option
from pyqmigrate.vm.connection import Monitor
from pyqmigrate.vm.leash import Leash
from pyqmigrate.vm.unbroken import owned, unbroken

__all__ = ["Launched", "Stream", "launch"]

Stream = int | IO[bytes] | None
_START_TIMEOUT = 60.0  # seconds until QEMU answers; it may have large files to open
_KEPT = 1 << 16  # bytes of standard error that a message may have to draw on
_LAST_WORDS = 0.2  # seconds that QEMU's last lines may need to arrive
_END_TIMEOUT = 5.0  # seconds from SIGTERM to SIGKILL
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


class Launched:
    """A QEMU of our own: ``process`` and a negotiated ``monitor``."""

    def __init__(
        self, process: subprocess.Popen[bytes], monitor: Monitor, errors: _ErrorOutput,
        leash: Leash, seconds: float,
    ) -> None:
        self.process = process
        self.monitor = monitor
        self.seconds = seconds  # until the monitor answered
        self._errors = errors
        self._leash = leash

    async def described(self, what: str) -> str:
        """``what``, how the process ended if it did, and what it wrote to standard error."""
        return await asyncio.to_thread(_describe, what, self.process, self._errors)

    def _wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_TIMEOUT)

    def hand_over(self) -> None:
        """From here on QEMU lives without us, and standard error goes where the caller wanted."""
        self._leash.close()
        self._errors.hand_over()

    async def end(self) -> None:
        """Ask the process to end, and end it if it does not. Cannot be interrupted halfway."""
        await unbroken(self._stop())

    async def _stop(self) -> None:
        with contextlib.suppress(QemuError):
            await self.monitor.execute("quit", timeout=_END_TIMEOUT)
        await self.monitor.close()
        await asyncio.to_thread(self._wait)
        await asyncio.to_thread(_end, self.process)
        self._leash.close()
        await asyncio.to_thread(self._errors.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            await self.end()


async def launch(
    command: CommandLine, pass_fds: Collection[int], *,
    stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
) -> Launched:
    """Start ``command`` and wait until its monitor answers.

    Streams are as subprocess.Popen takes them; None is this process's own. Raises QemuError with
    what QEMU said when it does not start, UsageError for words that no program can be given.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyqmigrate-")))
        path = directory / "qmp"
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen(1)
        configuration, writer = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, configuration)
        description = stack.enter_context(os.fdopen(writer, "w"))
        description.write(_HEAD)
        description.flush()
        own = Option("readconfig", f"/proc/self/fd/{configuration}")
        leash = Leash()
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(leash.close)
        errors = _ErrorOutput(stderr)
        stack.callback(errors.close_writer)
        # In a thread, where no signal can raise between the fork and our knowing of it.
        starting = asyncio.to_thread(
            subprocess.Popen, command.with_options(own).argv(), stdin=stdin, stdout=stdout,
            stderr=errors.writer, pass_fds=(listener.fileno(), configuration, leash.fd, *pass_fds),
        )
        try:
            process: subprocess.Popen[bytes] = await owned(starting, _end)
        except OSError as error:
            raise QemuError(f"{command.program} does not start: {error.strerror}") from error
        except ValueError as error:  # a NUL, or a character that the system's encoding lacks
            raise UsageError(f"a word of the command line cannot be one: {error}") from error
        try:
            leash.hold(process.pid)
            with contextlib.suppress(BrokenPipeError):  # it has ended, and will be asked why
                description.write(_CONFIGURATION.format(name=_NAME, fd=listener.fileno()))
                description.close()
        except BaseException:
            _end(process)
            raise
        # Nobody else may hold these: that QEMU is gone is seen by their being closed.
        listener.close()
        errors.close_writer()
        try:
            monitor = await Monitor.connect(path, timeout=_START_TIMEOUT)
        except QemuError as error:
            what = await asyncio.to_thread(_describe, "QEMU does not start", process, errors)
            _end(process)
            raise QemuError(what) from error
        except BaseException:
            _end(process)
            raise
        undo.pop_all()
        return Launched(process, monitor, errors, leash, time.monotonic() - started)


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
        process.wait(_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
