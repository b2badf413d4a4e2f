"""A QEMU that loads what the demo saved.

Its RAM is a file that we hold too, so that the memory can be compared without asking it. The
guest never runs a single instruction. The monitor is one end of a pair of sockets: nothing of it
is in the file system.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyqmigrate.errors import QemuError, QemuRefused
from pyqmigrate.qmp.client import QmpClient

__all__ = ["BLOCK", "Qemu", "find_qemu", "load"]

BLOCK = "pc.ram"  # the RAM block of the guest, and the id of the memory that we give it

_BINARY = "qemu-system-x86_64"
_NEEDED = (9, 0)  # mapped-ram
_DIRECT_IO = (9, 1)  # the parameter direct-io, and exit-on-error
_ANSWER = 60.0  # seconds to wait for an answer
_POLL = 0.005


@dataclass(frozen=True)
class Qemu:
    """An executable and its version."""

    path: str
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return "QEMU " + ".".join(map(str, self.version))


def find_qemu() -> Qemu | str:
    """The QEMU on the PATH, or why there is none that can load such a file."""
    path = shutil.which(_BINARY)
    needed = f"{_BINARY} >= {_NEEDED[0]}.{_NEEDED[1]}"
    if path is None:
        return f"there is no {needed} on the PATH"
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_ANSWER
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", answer)
    if found is None:
        return f"{path} does not show its version"
    qemu = Qemu(path, (int(found[1]), int(found[2]), int(found[3])))
    return qemu if qemu.version >= _NEEDED else f"{needed} is needed, and {path} is {qemu}"


def load(
    qemu: Qemu, snapshot: Path, memory_fd: int, size: int, *, channels: int, direct_io: bool
) -> float:
    """Have QEMU load ``snapshot`` into ``memory_fd``, a file of ``size`` bytes; returns seconds.

    ``direct_io`` only where the file system can: QEMU may die of it elsewhere. Raises QemuError.
    """
    newer = qemu.version >= _DIRECT_IO
    with _running(qemu, memory_fd, size, snapshot.parent) as monitor:
        monitor.execute(
            "migrate-set-capabilities",
            capabilities=[
                {"capability": "mapped-ram", "state": True},
                {"capability": "multifd", "state": True},
            ],
        )
        parameters: dict[str, Any] = {"multifd-channels": channels}
        if newer:
            parameters["direct-io"] = direct_io
        monitor.execute("migrate-set-parameters", **parameters)
        started = time.monotonic()
        stay = {"exit-on-error": False} if newer else {}
        # Relative: a directory's name can hold what the grammar of the URI has a meaning for.
        monitor.execute("migrate-incoming", uri=f"file:{snapshot.name}", **stay)
        while True:
            answer = monitor.execute("query-migrate")
            status = answer.get("status")
            if status == "completed":
                return time.monotonic() - started
            if status in ("failed", "cancelled"):
                raise QemuError(
                    f"{qemu} refused the snapshot: {answer.get('error-desc', status)}; "
                    f"{monitor.last_words()}"
                )
            time.sleep(_POLL)


@contextlib.contextmanager
def _running(qemu: Qemu, memory_fd: int, size: int, directory: Path) -> Iterator[_Monitor]:
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as stderr, contextlib.ExitStack() as started:
        with theirs:
            command = [
                qemu.path,
                "-no-user-config",
                "-nodefaults",
                "-display",
                "none",
                "-accel",
                "tcg",
                "-S",
                "-machine",
                f"pc,memory-backend={BLOCK}",
                "-m",
                f"{size >> 20}M",
                "-object",
                f"memory-backend-file,id={BLOCK},size={size},share=on,"
                f"mem-path=/proc/self/fd/{memory_fd}",
                "-chardev",
                f"socket,id=qmp,fd={theirs.fileno()}",
                "-mon",
                "chardev=qmp,mode=control",
                "-incoming",
                "defer",
            ]
            try:
                with _uninterrupted():
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=stderr,
                        stderr=stderr,
                        cwd=directory,
                        pass_fds=(memory_fd, theirs.fileno()),
                    )
                    started.callback(_end, process)
            except OSError as error:
                raise QemuError(f"{qemu} does not start: {error}") from error
        yield _Monitor(str(qemu), ours, process, stderr)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals wait, so that no process is started and then forgotten."""
    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Monitor:
    """A QMP session with a QEMU that runs here. Every failure is a QemuError."""

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        process: subprocess.Popen[bytes],
        stderr: IO[bytes],
    ) -> None:
        self._name = name
        self._process = process
        self._stderr = stderr
        with self._failures():
            self._client = QmpClient(connection, _ANSWER)

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        with self._failures():
            answer: dict[str, Any] = self._client.execute(command, arguments)
        return answer

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except QemuRefused as error:
            raise QemuError(f"{self._name} refused {error.command}: {error.desc}") from error
        except OSError as error:
            raise self._gone() from error
        except ValueError as error:
            raise QemuError(f"{self._name} does not speak QMP: {error}") from error

    def _gone(self) -> QemuError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        how = f"did not answer within {_ANSWER:.0f} s" if code is None else f"ended with {code}"
        return QemuError(f"{self._name} {how}; {self.last_words()}")

    def last_words(self) -> str:
        """What QEMU printed last."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"it said: {lines[-1]}" if lines else "it said nothing"
