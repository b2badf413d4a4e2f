"""Start QEMU with a monitor socket and captured standard error.

The monitor is one end of a socket pair, which QEMU inherits: it needs no name in a file system.
It is described in a separate ``-readconfig``, because ``-mon`` or ``-qmp`` on the command line
would remove QEMU's default monitor. That description is a pipe, closed once a lifeline holds QEMU:
until QEMU is handed over, it does not outlive this process. Until then its standard error is kept
for error messages; afterwards it is passed on.

No event loop is needed here: a command that restores a guest imports one while QEMU starts.
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
_KEPT = 1 << 16  # bytes of standard error kept for error messages
_LAST_WORDS = 0.2  # seconds to wait for QEMU's last lines
_NAME = "pyqmigrate"
_SECOND = "pyqmigrate-second"  # of the monitor that another process uses
QMP_CHARDEV = "pyqmigrate-qmp"  # of the additional monitor
_WRAPPER_TIMEOUT = 0.5  # seconds until a program that starts QEMU has become QEMU
_WRAPPER_POLL = 0.001
# QEMU rejects this head alone, and ends.
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
    """A QEMU that ends with this process until it is handed over.

    ``monitor`` is the socket of its monitor; the caller may take it over. ``started_at`` is a time
    of ``time.monotonic``.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        started_at: float,
        monitor: socket.socket,
        lifeline: Lifeline,
        errors: _ErrorOutput,
        qmp: Path | None,
    ) -> None:
        self.process = process
        self.started_at = started_at
        self.monitor = monitor
        self._lifeline = lifeline
        self._errors = errors
        self._qmp = qmp

    def describe(self, what: str) -> str:
        """Return ``what``, how the process ended if it did, and what it wrote to stderr."""
        return _describe(what, self.process, self._errors)

    def wait(self, timeout: float) -> None:
        """Wait for its end, at most ``timeout`` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)

    def hand_over(self, *, bound: bool = False) -> None:
        """Let QEMU outlive this process unless ``bound``, and pass its standard error on to the
        caller's stream."""
        if not bound:
            self._lifeline.close()
        self._errors.hand_over()

    def end(self, timeout: float = END_TIMEOUT) -> None:
        """End it with SIGTERM, and with SIGKILL after ``timeout`` seconds. Idempotent."""
        _end(self.process, timeout)
        self._lifeline.close()
        self.monitor.close()
        self._errors.join()
        if self._qmp is not None:  # QEMU removes it unless it was killed
            with contextlib.suppress(OSError, UsageError):
                remove_stale_socket(self._qmp)

    def terminate(self) -> None:
        """Send SIGTERM, on which QEMU stops the guest and ends. Does not wait."""
        self.process.terminate()


def start(
    command: CommandLine,
    pass_fds: Collection[int],
    *,
    qmp: Path | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    second: socket.socket | None = None,
) -> QemuProcess:
    """Start ``command`` with an additional monitor, and another one that listens at ``qmp``.

    ``second`` is QEMU's end of a connection to one more monitor; it is borrowed. Streams are as
    subprocess.Popen takes them; None is this process's own. Do not call it in the main thread: a
    signal handler that raised between fork and bookkeeping would leave QEMU running.

    Raises QemuError when the program cannot be started, UsageError for invalid arguments, and for
    an invalid socket path ``qmp``.
    """
    started_at = time.monotonic()
    with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as inherited:
        lifeline = Lifeline()
        on_failure.callback(lifeline.close)
        monitor, qemu_end = socket.socketpair()
        on_failure.enter_context(monitor)
        # Only QEMU may keep what it inherits: its end is noticed when they are closed.
        inherited.enter_context(qemu_end)
        configuration, writer = os.pipe2(os.O_CLOEXEC)
        inherited.callback(os.close, configuration)
        os.fchmod(configuration, 0o444)  # QEMU opens it by name, and may be another user
        description = inherited.enter_context(os.fdopen(writer, "w"))
        description.write(_HEAD)
        description.flush()
        added = [Option("readconfig", f"/proc/self/fd/{configuration}")]
        fds = [qemu_end.fileno(), configuration, lifeline.fd, *pass_fds]
        if second is not None:
            fds.append(second.fileno())
        if qmp is not None:
            place = inherited.enter_context(SocketPath(qmp))
            fds += place.fds
            added.append(
                Option(
                    "chardev",
                    f"socket,id={QMP_CHARDEV},path={escape(place.path)},server=on,wait=off",
                )
            )
        errors = _ErrorOutput(stderr)
        inherited.callback(errors.close_writer)
        try:
            process = subprocess.Popen(
                command.with_options(*added).argv(),
                stdin=stdin,
                stdout=stdout,
                stderr=errors.writer,
                pass_fds=fds,
                cwd=command.directory,
            )
        except OSError as error:
            raise QemuError(f"cannot start {command.program}: {error.strerror}") from error
        except ValueError as error:  # a NUL, or a character that the system's encoding lacks
            raise UsageError(f"invalid command-line argument: {error}") from error
        on_failure.callback(_end, process)
        lifeline.hold(process.pid)
        connections = {_NAME: qemu_end}
        if second is not None:
            connections[_SECOND] = second
        monitors = [*connections] if qmp is None else [*connections, QMP_CHARDEV]
        form = _MONITOR_QMP if _has_monitor_qmp(process.pid, configuration) else _MON
        with contextlib.suppress(BrokenPipeError):  # QEMU has ended; the caller finds out why
            texts = [_CHARDEV.format(name=n, fd=c.fileno()) for n, c in connections.items()]
            description.write(_HEAD.join(texts))
            description.writelines(form.format(name=name) for name in monitors)
            description.close()
        on_failure.pop_all()
        return QemuProcess(process, started_at, monitor, lifeline, errors, qmp)


def _has_monitor_qmp(pid: int, configuration: int) -> bool:
    """Return whether QEMU has the object type monitor-qmp. It is waiting for its configuration."""
    executable = Path(f"/proc/{pid}/exe")
    deadline = time.monotonic() + _WRAPPER_TIMEOUT
    try:
        # A wrapper may become QEMU, which then begins to read.
        while not is_qemu(str(executable.readlink())) and _unread(configuration):
            if time.monotonic() > deadline:
                return False
            time.sleep(_WRAPPER_POLL)
    except OSError:  # it has ended, or belongs to another user
        return False
    return has_type(executable, "monitor-qmp")


def _unread(pipe: int) -> int:
    """Return the number of unread bytes in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


class _ErrorOutput:
    """Standard error of a process: kept at first, later passed on to ``target``."""

    def __init__(self, target: Stream) -> None:
        self._stream = target
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
        """Close the end that the process inherited."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def text(self) -> str:
        with self._lock:
            return (self._kept or b"").decode("utf-8", "replace").strip()

    def hand_over(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, None
            if not kept:
                return
            if self._target >= 0:
                self._write(bytes(kept))
                return
            self._target = _descriptor(self._stream)  # the process has ended
            self._write(bytes(kept))
            self._close_target()

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
            with self._lock:
                self._close_target()

    def _close_target(self) -> None:
        os.close(self._target)
        self._target = -1

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # without a reader; QEMU goes on
            while data:
                data = data[os.write(self._target, data) :]


def _descriptor(target: Stream) -> int:
    """Return a new descriptor that writes to ``target``."""
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
