"""Debian's cloud kernel with a shell on its serial console, under TCG.

    with LinuxGuest(directory).boot() as console:
        assert console.run("echo $((6 * 7))") == "42"

No disk, no modules, no firmware but QEMU's own: the initramfs is busybox and a dozen lines.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from tests.harness.machine import BINARY
from tests.harness.unpacked import unpacked

__all__ = ["Console", "LinuxGuest"]

_INIT = b"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
stty -echo -onlcr
cd /tmp
while :; do sh /dev/console </dev/null; done
"""
_DIRECTORIES = ("bin", "dev", "proc", "sys", "tmp")
_KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 reboot=t nokaslr mitigations=off tsc=reliable no_timer_check"
)


class Console:
    """The guest's serial console: a line in, what it prints out. One client at a time."""

    def __init__(self, path: Path, timeout: float = 20.0) -> None:
        self.timeout = timeout
        self._received = b""
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait(self, limit: float = 60.0) -> None:
        """Wait until a shell answers; its output until then is dropped."""
        deadline = time.monotonic() + limit
        while True:
            try:
                self.run(":", timeout=0.3)
                return
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def run(self, command: str, *, timeout: float | None = None) -> str:
        """Runs lines of shell and returns what they printed, the last newline taken off.

        AssertionError when the last command failed, TimeoutError when there is no end of it.
        """
        self._number += 1
        begin, end = f"begin-{self._number}.", f"end-{self._number}."
        # Written so that an echo of the lines could not be taken for their output.
        self._socket.sendall(f"\necho '' {begin}\n{command}\necho $?:{end}\n".encode())
        framed = re.compile(rf" {begin}\r?\n(.*?)(\d+):{end}\r?\n".encode(), re.DOTALL)
        output = self._until(framed, self.timeout if timeout is None else timeout)
        text = output[1].decode(errors="replace").replace("\r\n", "\n").removesuffix("\n")
        assert output[2] == b"0", f"{command!r} ended with {output[2].decode()}: {text}"
        return text

    def _connect(self, path: Path) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self._socket.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _until(self, pattern: re.Pattern[bytes], timeout: float) -> re.Match[bytes]:
        deadline = time.monotonic() + timeout
        while not (found := pattern.search(self._received)):
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise TimeoutError(f"the console said {self._received!r}") from None
            if not data:
                raise ConnectionError(f"the console hung up after {self._received!r}")
            self._received += data
        self._received = self._received[found.end() :]
        return found


class LinuxGuest:
    """A machine that boots Linux to a shell; what it needs lies in ``directory``.

    ``memory`` is what follows ``memory-backend-`` in the RAM's backend, without its id and size.
    ``files`` are further files of its root directory: the path, and the content of a program.
    """

    def __init__(
        self,
        directory: Path,
        *,
        machine: str = "q35",
        megabytes: int = 128,
        memory: str = "memfd,share=on",
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.directory = directory
        self.qmp = directory / "qmp"
        root = unpacked("linux")
        initramfs = directory / "initramfs"
        initramfs.write_bytes(_initramfs((root / "bin/busybox").read_bytes(), files or {}))
        kind, _, options = memory.partition(",")
        backend = f"memory-backend-{kind},id=ram,size={megabytes}M,{options}".removesuffix(",")
        self._command = [
            BINARY,
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            f"{machine},memory-backend=ram",
            "-m",
            f"{megabytes}M",
            "-object",
            backend,
            "-kernel",
            str(next((root / "boot").glob("vmlinuz-*"))),
            "-initrd",
            str(initramfs),
            "-append",
            _KERNEL_OPTIONS,
        ]

    def command(self, console: Path) -> list[str]:
        """The command line, without a monitor, of this machine with its console there."""
        return [*self._command, "-serial", f"unix:{console},server=on,wait=off"]

    @contextlib.contextmanager
    def boot(self, *more: str) -> Iterator[Console]:
        """Starts it, with its monitor at ``qmp`` and ``more`` on its command line, until its shell
        answers; killed on exit."""
        path = self.directory / "console"
        process = subprocess.Popen(
            [*self.command(path), "-qmp", f"unix:{self.qmp},server=on,wait=off", *more],
            stdin=subprocess.DEVNULL,
        )
        try:
            with Console(path) as console:
                console.wait()
                yield console
        finally:
            process.kill()
            process.wait()


def _initramfs(busybox: bytes, files: Mapping[str, bytes]) -> bytes:
    entries = [
        *(_entry(name, 0o040755) for name in _DIRECTORIES),
        *(_entry(path, 0o100755, content) for path, content in files.items()),
        _entry("dev/console", 0o020600, device=(5, 1)),
        _entry("bin/busybox", 0o100755, busybox),
        _entry("init", 0o100755, _INIT),
        _entry("TRAILER!!!", 0),
    ]
    return b"".join(entries)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a cpio archive in the "newc" form: numbers in hex, all padded to 4 bytes."""
    inode, owner, group, links, time_, here = 0, 0, 0, 1, 0, (0, 0)
    fields = [inode, mode, owner, group, links, time_, len(data), *here, *device, len(name) + 1, 0]
    head = "070701" + "".join(f"{field:08x}" for field in fields) + name + "\0"
    padded = head.encode() + bytes(-len(head) % 4)
    return padded + data + bytes(-len(data) % 4)
