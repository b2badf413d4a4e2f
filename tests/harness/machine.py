"""A real QEMU under TCG, its RAM in the hands of the test.

    with GuestRam(64 << 20) as ram, Qemu(ram, machine="q35") as vm:
        ram.memory[:4] = b"abcd"
        vm.save(path, Mode(multifd=True, direct_io=True))

The guest's RAM is a file that QEMU maps shared, so what the test writes is what the guest has,
and what a load brought can be compared without asking QEMU.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyqmigrate.qmp.client import QmpClient

__all__ = ["GuestRam", "MigrationFailed", "Mode", "Qemu", "QemuDied", "RAM_BLOCK"]

BINARY = "qemu-system-x86_64"
RAM_BLOCK = {"pc": "pc.ram", "q35": "pc.ram", "microvm": "microvm.ram", "isapc": "pc.ram"}
_FDSET = 1
_TERMINAL = {"completed", "failed", "cancelled"}
_RAMBLOCK_LINE = re.compile(
    r"^\s*(?P<name>\S+)\s+\d+ \w+\s+0x[0-9a-f]+ 0x(?P<used>[0-9a-f]+)"
    r"\s+0x[0-9a-f]+ 0x(?P<host>[0-9a-f]+)"
)


class QemuDied(AssertionError):
    """The process ended by itself; the message has its standard error."""


class MigrationFailed(AssertionError):
    """A migration ended in another status than completed."""

    def __init__(self, result: dict[str, Any], stderr: str) -> None:
        super().__init__(f"migration ended as {result}; standard error:\n{stderr}")
        self.result = result
        self.stderr = stderr


@dataclass(frozen=True)
class Mode:
    """How QEMU carries a migration: with one channel, or with ``channels`` multifd channels."""

    channels: int = 1
    multifd: bool = False
    direct_io: bool = False
    fdset: bool = False
    zero_pages: str = "multifd"

    def __post_init__(self) -> None:
        assert self.multifd or (self.channels == 1 and not self.direct_io), "QEMU ignores these"

    def __str__(self) -> str:
        words = [f"multifd{self.channels}" if self.multifd else "single"]
        words += ["direct"] if self.direct_io else []
        words += ["fdset"] if self.fdset else []
        words += [] if self.zero_pages == "multifd" else [f"zero-{self.zero_pages}"]
        return "-".join(words)


class GuestRam:
    """``length`` bytes of zeros in a memfd, mapped here as ``memory``; gone on exit."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, length)
            self.memory = mmap.mmap(self.fd, length)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # a view is held: the mapping goes with it
            self.memory.close()


class Qemu:
    """One ``qemu-system-x86_64``, connected; killed on exit, its directory removed.

    The guest is stopped before its first instruction (``-S``) unless ``run`` is true.
    ``incoming`` makes it wait for :meth:`load`. ``private`` gives it anonymous RAM instead of
    ``ram``, which then only says how much; ``memory`` is the command line's part that gives it
    RAM in yet another way, the machine included. ``serial`` is a file that receives what the guest
    writes to its first serial port.
    """

    def __init__(
        self,
        ram: GuestRam,
        *,
        machine: str = "pc",
        run: bool = False,
        incoming: bool = False,
        private: bool = False,
        memory: Sequence[str] | None = None,
        bios: Path | None = None,
        serial: Path | None = None,
        extra: Sequence[str] = (),
        accelerator: str = "tcg",
    ) -> None:
        self.machine = machine
        self.ram_block = RAM_BLOCK[machine]
        self._directory = tempfile.TemporaryDirectory(prefix="qemu-")
        self.directory = Path(self._directory.name)
        self.socket = self.directory / "qmp.sock"
        self._stderr = self.directory / "stderr"
        backend = f"id={self.ram_block},size={ram.length}"
        backend = (
            f"memory-backend-ram,{backend}"
            if private
            else f"memory-backend-file,{backend},share=on,mem-path=/proc/self/fd/{ram.fd}"
        )
        if memory is None:
            memory = [
                "-machine",
                f"{machine},memory-backend={self.ram_block}",
                "-m",
                f"{ram.length >> 20}M",
                "-object",
                backend,
            ]
        command = [
            BINARY,
            "-accel",
            accelerator,
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            *memory,
            "-qmp",
            f"unix:{self.socket},server=on,wait=off",
            *([] if run else ["-S"]),
            *(["-incoming", "defer"] if incoming else []),
            *(["-bios", str(bios)] if bios else []),
            *(["-serial", f"file:{serial}"] if serial else []),
            *extra,
        ]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=[ram.fd]
            )
        try:
            self.qmp = self._connect(time.monotonic() + 30)
        except BaseException:
            self.kill()
            self._directory.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        self.kill()
        self._directory.cleanup()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None
    ) -> Any:
        """One QMP command; a QEMU that dies of it is a :class:`QemuDied`."""
        try:
            return self.qmp.execute(command, arguments, fd=fd)
        except ConnectionError as error:
            raise self._died() from error

    def save(
        self, path: Path, mode: Mode | None = None, *, offset: int = 0, limit: float = 60
    ) -> dict[str, Any]:
        """Saves into ``path`` as a mapped-ram file and returns the last ``query-migrate``."""
        mode = mode or Mode()
        self.start_save(path, mode, offset=offset)
        return self._finish(mode, limit)

    def start_save(
        self, path: Path, mode: Mode | None = None, *, offset: int = 0, bandwidth: int = 0
    ) -> None:
        """Begins a save, to be waited for; ``bandwidth`` in bytes a second, 0 for all there is."""
        mode = mode or Mode()
        self._configure(mode, bandwidth)
        if mode.fdset:
            path.touch(0o600)
        uri = self._lend(path, mode, os.O_WRONLY)
        self.execute("migrate", {"uri": _uri(uri, offset)})

    def load(
        self, path: Path, mode: Mode | None = None, *, offset: int = 0, limit: float = 60
    ) -> dict[str, Any]:
        """Loads the mapped-ram file ``path``; it was started with ``incoming``."""
        mode = mode or Mode()
        self._configure(mode)
        uri = _uri(self._lend(path, mode, os.O_RDONLY), offset)
        self.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        return self._finish(mode, limit)

    def wait(self, limit: float = 60) -> dict[str, Any]:
        """Waits for the end of a migration, whichever it is; returns ``query-migrate``."""
        deadline = time.monotonic() + limit
        while True:
            result: dict[str, Any] = self.execute("query-migrate")
            if result.get("status") in _TERMINAL:
                return result
            if time.monotonic() > deadline:
                raise MigrationFailed(result, self.stderr())
            time.sleep(0.005)

    def set_capabilities(self, wanted: dict[str, bool]) -> None:
        states = [{"capability": name, "state": on} for name, on in wanted.items()]
        self.execute("migrate-set-capabilities", {"capabilities": states})

    def machine_name(self) -> str:
        """The full name of the machine type, as a stream carries it (``pc-i440fx-10.0``)."""
        machines = self.execute("query-machines")
        names = [m["name"] for m in machines if self.machine in (m["name"], m.get("alias"))]
        return str(names[0])

    def where_blocks_are(self) -> dict[str, tuple[int, int]]:
        """Address in QEMU, and length in bytes, of every RAM block."""
        table = self.execute("human-monitor-command", {"command-line": "info ramblock"})
        lines = (_RAMBLOCK_LINE.match(line) for line in table.splitlines())
        where = {m["name"]: (int(m["host"], 16), int(m["used"], 16)) for m in lines if m}
        assert self.ram_block in where, table
        return where

    def read_blocks(self) -> dict[str, bytes]:
        """The bytes of every RAM block, from QEMU's own address space."""
        where = self.where_blocks_are()
        with Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as memory:
            return {
                name: os.pread(memory.fileno(), used, host) for name, (host, used) in where.items()
            }

    def _connect(self, deadline: float) -> QmpClient:
        while True:
            try:
                return QmpClient.connect(self.socket)
            except (FileNotFoundError, ConnectionError):
                if self.process.poll() is not None:
                    raise self._died() from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _died(self) -> QemuDied:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return QemuDied(f"QEMU closed its monitor but lives; standard error:\n{self.stderr()}")
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return QemuDied(f"QEMU ended with {how}; standard error:\n{self.stderr()}")

    def _configure(self, mode: Mode, bandwidth: int = 0) -> None:
        self.set_capabilities({"events": True, "mapped-ram": True, "multifd": mode.multifd})
        parameters = {
            "multifd-channels": mode.channels,
            "direct-io": mode.direct_io,
            "zero-page-detection": mode.zero_pages,
            "max-bandwidth": bandwidth,
        }
        self.execute("migrate-set-parameters", parameters)

    def _lend(self, path: Path, mode: Mode, access: int) -> str:
        if not mode.fdset:
            return str(path)
        for flags in [0, os.O_DIRECT] if mode.direct_io else [0]:
            fd = os.open(path, access | flags)
            try:
                self.execute("add-fd", {"fdset-id": _FDSET}, fd=fd)
            finally:
                os.close(fd)
        return f"/dev/fdset/{_FDSET}"

    def _finish(self, mode: Mode, limit: float) -> dict[str, Any]:
        result = self.wait(limit)
        if mode.fdset:
            self.execute("remove-fd", {"fdset-id": _FDSET})
        if result["status"] != "completed":
            raise MigrationFailed(result, self.stderr())
        return result


def _uri(path: str, offset: int) -> str:
    return f"file:{path},offset={offset:#x}" if offset else f"file:{path}"
