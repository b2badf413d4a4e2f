"""Start QEMU with a monitor socket and captured standard error.

The monitor is one end of a socket pair, which QEMU inherits: it needs no name in a file system.
It is described in a separate ``-readconfig``, because ``-mon`` or ``-qmp`` on the command line
would remove QEMU's default monitor. That is QEMU's first option, and a pipe: QEMU waits for the rest
of it until this process lets it go on. A lifeline holds QEMU then: until it is handed over, it does
not outlive this process. Until then its standard error is kept for error messages; afterwards it is
passed on.

No event loop is needed here: a command that restores a guest imports one while QEMU starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Collection
from pathlib import Path
from typing import TypedDict, Unpack

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.io.socket_path import SocketPath, remove_stale_socket
from pyqmigrate.vm.qemu.binary import has_type
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, escape, is_qemu
from pyqmigrate.vm.qemu.error_output import LAST_WORDS, ErrorOutput, Stream
from pyqmigrate.vm.qemu.lifeline import Lifeline

__all__ = [
    "END_TIMEOUT",
    "OWN_CONFIGURATION",
    "QMP_CHARDEV",
    "Connections",
    "QemuProcess",
    "WaitingQemu",
    "start",
]

END_TIMEOUT = 5.0  # seconds from SIGTERM to SIGKILL
_NAME = "pyqmigrate"
_CONFIGURATION = "/proc/self/fd/./"  # nobody else writes it so
OWN_CONFIGURATION = rf"{re.escape(_CONFIGURATION)}\d+"  # a pattern
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
        errors: ErrorOutput,
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


class Connections(TypedDict, total=False):
    """What connects a QEMU with others: another monitor that listens at ``qmp``, and standard streams as
    subprocess.Popen takes them; None is this process's own.

    ``second`` is QEMU's end of a connection to one more monitor; it is borrowed.
    """

    qmp: Path | None
    stdin: Stream
    stdout: Stream
    stderr: Stream
    second: socket.socket | None


class WaitingQemu:
    """A started QEMU that waits for its configuration: it has opened nothing that its command line names.

    Let it :meth:`go` on, or :meth:`end` it; it ends with this process. Arguments and errors are those of
    :func:`start`.
    """

    def __init__(
        self, command: CommandLine, pass_fds: Collection[int], **connections: Unpack[Connections]
    ) -> None:
        self._qmp = qmp = connections.get("qmp")
        self._started_at = time.monotonic()
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as inherited:
            self._lifeline = Lifeline()
            on_failure.callback(self._lifeline.close)
            self._monitor, qemu_end = socket.socketpair()
            on_failure.enter_context(self._monitor)
            # Only QEMU may keep what it inherits: its end is noticed when they are closed.
            inherited.enter_context(qemu_end)
            configuration, writer = os.pipe2(os.O_CLOEXEC)
            inherited.callback(os.close, configuration)
            os.fchmod(configuration, 0o444)  # QEMU opens it by name, and may be another user
            self._description = on_failure.enter_context(os.fdopen(writer, "w"))
            self._description.write(_HEAD)
            self._description.flush()
            # First: QEMU takes its options in order.
            options = [Option("readconfig", f"{_CONFIGURATION}{configuration}"), *command.options]
            self._connections = {_NAME: qemu_end.fileno()}
            if second := connections.get("second"):
                self._connections[_SECOND] = second.fileno()
            fds = [configuration, self._lifeline.fd, *self._connections.values(), *pass_fds]
            if qmp is not None:
                place = inherited.enter_context(SocketPath(qmp))
                fds += place.fds
                options.append(
                    Option(
                        "chardev",
                        f"socket,id={QMP_CHARDEV},path={escape(place.path)},server=on,wait=off",
                    )
                )
            self._errors = ErrorOutput(connections.get("stderr"))
            inherited.callback(self._errors.close_writer)
            try:
                self._process = subprocess.Popen(
                    command._replace(options=tuple(options)).argv(),
                    stdin=connections.get("stdin"),
                    stdout=connections.get("stdout"),
                    stderr=self._errors.writer,
                    pass_fds=fds,
                    cwd=command.directory,
                )
            except OSError as error:
                raise QemuError(f"cannot start {command.program}: {error.strerror}") from error
            except ValueError as error:  # a NUL, or a character that the system's encoding lacks
                raise UsageError(f"invalid command-line argument: {error}") from error
            on_failure.callback(_end, self._process)
            self._lifeline.hold(self._process.pid)
            is_new = _has_monitor_qmp(self._process.pid, configuration)
            self._monitor_form = _MONITOR_QMP if is_new else _MON
            on_failure.pop_all()

    def go(self, sections: str = "") -> QemuProcess:
        """Give it its configuration: its monitors, and these sections."""
        connections = self._connections.items()
        monitors = [*self._connections] if self._qmp is None else [*self._connections, QMP_CHARDEV]
        try:
            # A broken pipe: QEMU has ended, and the caller finds out why.
            with contextlib.suppress(BrokenPipeError), self._description as text:
                text.write(_HEAD.join(_CHARDEV.format(name=n, fd=fd) for n, fd in connections))
                text.writelines(self._monitor_form.format(name=name) for name in monitors)
                text.write(sections)
        except BaseException:
            self.end()
            raise
        return QemuProcess(
            self._process, self._started_at, self._monitor, self._lifeline, self._errors, self._qmp
        )

    def end(self) -> None:
        """End it, at once: it has opened nothing."""
        with contextlib.suppress(BrokenPipeError):
            self._description.close()
        # If this is not permitted, QEMU rejects what it has of the configuration, and ends.
        with contextlib.suppress(PermissionError):
            self._process.kill()
        self._process.wait()
        self._lifeline.close()
        self._monitor.close()
        self._errors.join()


def start(
    command: CommandLine, pass_fds: Collection[int], **connections: Unpack[Connections]
) -> QemuProcess:
    """Start ``command`` with an additional monitor, and its ``connections``.

    Do not call it in the main thread: a signal handler that raised between fork and bookkeeping would
    leave QEMU running.

    Raises QemuError when the program cannot be started, UsageError for invalid arguments, and for
    an invalid socket path ``qmp``.
    """
    return WaitingQemu(command, pass_fds, **connections).go()


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


def _describe(what: str, process: subprocess.Popen[bytes], errors: ErrorOutput) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)
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
