"""A QEMU process that is started here, and what it says before it is somebody else's.

The monitor is one end of a pair of sockets, which QEMU inherits: it needs no name in a file system.
It is described in a ``-readconfig`` of its own: QEMU counts ``-mon`` and ``-qmp`` on the command
line as a wish for no other monitor, and the command line stays as its owner wrote it. That
description is a pipe whose end comes when QEMU is on a leash: until it is handed over, it does not
outlive this process. What QEMU writes to standard error is kept until then, so that it can be part
of an error, and passed on afterwards.

There is no event loop here: a command that restores a guest imports one while QEMU starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.io.socket_path import SocketPath, remove_stale_socket
from pyqmigrate.io.threads import start_thread
from pyqmigrate.vm.qemu.binary import has_type
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, escape, is_qemu
from pyqmigrate.vm.qemu.lifeline import Lifeline

__all__ = ["END_TIMEOUT", "QMP_CHARDEV", "QemuProcess", "Stream", "start"]

Stream = int | IO[bytes] | None
END_TIMEOUT = 5.0  # seconds from SIGTERM to SIGKILL
_KEPT = 1 << 16  # bytes of standard error that a message may have to draw on
_LAST_WORDS = 0.2  # seconds that QEMU's last lines may need to arrive
_NAME = "pyqmigrate"
QMP_CHARDEV = "pyqmigrate-qmp"  # the monitor that the caller asked for
_WRAPPER_TIMEOUT = 0.5  # seconds until a program that starts QEMU has become QEMU
_WRAPPER_POLL = 0.001
# QEMU takes the head alone for a mistake, and ends.
_HEAD = '[chardev "'
_CHARDEV = """{name}"]
  backend = "socket"
  fd = "{fd}"
"""
# QEMU 11.1 deprecates the first; 10 does not have the second.
_MON = """[mon "{name}"]
  chardev = "{name}"
  mode = "control"
"""
_MONITOR_QMP = """[object "{name}"]
  qom-type = "monitor-qmp"
  chardev = "{name}"
"""


class QemuProcess:
    """A process on a leash. ``monitor`` is the socket on which its monitor will answer; whoever
    takes it owns it. ``at`` is when it was started (``time.monotonic``)."""

    def __init__(
        self, at: float, monitor: socket.socket, leash: Lifeline, qmp: Path | None
    ) -> None:
        self.at = at
        self.monitor = monitor
        self._leash = leash
        self._qmp = qmp
        self.process: subprocess.Popen[bytes]
        self._errors: _ErrorOutput

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

    def end(self, timeout: float = END_TIMEOUT) -> None:
        """By SIGTERM, and by SIGKILL after so many seconds. May be repeated."""
        _end(self.process, timeout)
        self._leash.close()
        self.monitor.close()
        self._errors.join()
        if self._qmp is not None:  # QEMU removes it unless it was killed
            with contextlib.suppress(OSError, UsageError):
                remove_stale_socket(self._qmp)

    def terminate(self) -> None:
        """Send SIGTERM, on which QEMU stops the guest and ends; returns at once."""
        self.process.terminate()


def start(
    command: CommandLine,
    pass_fds: Collection[int],
    *,
    qmp: Path | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
) -> QemuProcess:
    """Start ``command``, with a monitor of ours besides, and one more that listens at ``qmp``.

    Streams are as subprocess.Popen takes them; None is this process's own. Not for the main thread:
    a signal that raised between the fork and our knowing of it would leave the process alone.

    Raises QemuError when there is no such program, UsageError for words that no program can be
    given, and for a ``qmp`` that no socket can have.
    """
    at = time.monotonic()
    with contextlib.ExitStack() as failed, contextlib.ExitStack() as ours:
        leash = Lifeline()
        failed.callback(leash.close)
        monitor, theirs = socket.socketpair()
        failed.enter_context(monitor)
        # Nobody but QEMU may hold these: that it is gone is seen by their being closed.
        ours.enter_context(theirs)
        started = QemuProcess(at, monitor, leash, qmp)
        configuration, writer = os.pipe2(os.O_CLOEXEC)
        ours.callback(os.close, configuration)
        os.fchmod(configuration, 0o444)  # QEMU opens it by name, and may be another user
        description = ours.enter_context(os.fdopen(writer, "w"))
        description.write(_HEAD)
        description.flush()
        added = [Option("readconfig", f"/proc/self/fd/{configuration}")]
        inherited = [theirs.fileno(), configuration, leash.fd, *pass_fds]
        if qmp is not None:
            place = ours.enter_context(SocketPath(qmp))
            inherited += place.fds
            added.append(
                Option(
                    "chardev",
                    f"socket,id={QMP_CHARDEV},path={escape(place.path)},server=on,wait=off",
                )
            )
        started._errors = errors = _ErrorOutput(stderr)
        ours.callback(errors.close_writer)
        try:
            started.process = subprocess.Popen(
                command.with_options(*added).argv(),
                stdin=stdin,
                stdout=stdout,
                stderr=errors.writer,
                pass_fds=inherited,
                cwd=command.directory,
            )
        except OSError as error:
            raise QemuError(f"{command.program} does not start: {error.strerror}") from error
        except ValueError as error:  # a NUL, or a character that the system's encoding lacks
            raise UsageError(f"a word of the command line cannot be one: {error}") from error
        failed.callback(_end, started.process)
        leash.hold(started.process.pid)
        monitors = [_NAME] if qmp is None else [_NAME, QMP_CHARDEV]
        form = _MONITOR_QMP if _has_monitor_qmp(started.process.pid, configuration) else _MON
        with contextlib.suppress(BrokenPipeError):  # it has ended, and will be asked why
            description.write(_CHARDEV.format(name=_NAME, fd=theirs.fileno()))
            description.writelines(form.format(name=name) for name in monitors)
            description.close()
        failed.pop_all()
        return started


def _has_monitor_qmp(pid: int, configuration: int) -> bool:
    """Whether QEMU makes monitors as objects. It waits for its configuration meanwhile."""
    executable = Path(f"/proc/{pid}/exe")
    deadline = time.monotonic() + _WRAPPER_TIMEOUT
    try:
        # A program of another name may become QEMU, which then begins to read.
        while not is_qemu(str(executable.readlink())) and _unread(configuration):
            if time.monotonic() > deadline:
                return False
            time.sleep(_WRAPPER_POLL)
    except OSError:  # it has ended, or belongs to another user
        return False
    return has_type(executable, "monitor-qmp")


def _unread(pipe: int) -> int:
    """How many bytes a pipe has that nobody has read."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


class _ErrorOutput:
    """Standard error of a process: kept at first, passed on to ``target`` later."""

    def __init__(self, target: Stream) -> None:
        self._target = _descriptor(target)
        self._kept: bytearray | None = bytearray()
        self._lock = threading.Lock()
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._pump, name="pyqmigrate-stderr", daemon=True)
        try:
            start_thread(self._thread)
        except BaseException:
            for fd in (self._reader, self._target, self.writer):
                os.close(fd)
            raise

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


def _end(process: subprocess.Popen[bytes], timeout: float = END_TIMEOUT) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
