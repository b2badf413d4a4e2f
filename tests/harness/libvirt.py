"""libvirt, unpacked but not installed, with a session of its own.

    with Libvirt(directory) as libvirt:
        domain = libvirt.create(xml)
        libvirt.virsh("save", domain.name, path, "--image-format", "sparse")

Its files are seen through an overlay over /usr, in a mount namespace that ends with each process.
libvirt serves a session only to somebody who is not root, so it has a user namespace as well, in
which the owner of this test has another number. Sockets, logs and caches lie in ``directory``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from pyqmigrate.format.libvirt import LibvirtHeader, read_header
from pyqmigrate.io.input import InputFile
from tests.harness.machine import BINARY
from tests.harness.pattern_guest import build
from tests.harness.saved import serial_says
from tests.harness.unpacked import lack, unpacked

__all__ = ["DOMAIN", "Domain", "Image", "Libvirt", "RAM", "save"]

_IN_NAMESPACES = """
cd "$1"; shift
mount -t overlay -o ro,lowerdir=usr:/usr none /usr
cd /
exec unshare --user --map-user=1000 --map-group=1000 "$@"
"""
_ONLY_LIBVIRTS = {"-name", "-S", "-mon", "-chardev", "-add-fd", "-sandbox", "-msg"}
_ONLY_LIBVIRTS_OBJECTS = {"secret", "isa-serial", "monitor-qmp"}  # the last is a -mon of 11.1
_WITHOUT_VALUE = {"-S", "-no-user-config", "-nodefaults", "-no-shutdown", "-enable-kvm"}


@dataclass(frozen=True)
class Domain:
    """A guest that libvirt started: its name and the command line of its QEMU."""

    name: str
    pid: int
    command: tuple[str, ...]

    def machine(self) -> list[str]:
        """The command line without what only libvirt can give it: descriptors, secrets, names.

        The serial port's device goes with its character device.
        """
        kept, words = [self.command[0]], list(self.command[1:])
        while words:
            option = [words.pop(0)]
            if option[0] not in _WITHOUT_VALUE:
                option.append(words.pop(0))
            value = option[-1]
            if option[0] in _ONLY_LIBVIRTS or any(word in value for word in _ONLY_LIBVIRTS_OBJECTS):
                continue
            kept += option
        return kept


class Libvirt:
    """A ``libvirtd`` in a session; it and its guests end on exit."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._root = unpacked("libvirt")
        if reason := _why_not(self._root):
            lack(reason)
        names = {
            "XDG_RUNTIME_DIR": "run",
            "XDG_CONFIG_HOME": "config",
            "XDG_CACHE_HOME": "cache",
            "XDG_DATA_HOME": "data",
            "HOME": "home",
        }
        self._environment = {**os.environ, "LC_ALL": "C"}
        for variable, name in names.items():
            (directory / name).mkdir(mode=0o700)
            self._environment[variable] = str(directory / name)
        configuration = directory / "config/libvirt"
        configuration.mkdir()
        # Otherwise one more daemon keeps what guests write.
        (configuration / "qemu.conf").write_text('stdio_handler = "file"\n')
        self._log = (directory / "libvirtd.log").open("wb")

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            _command(self._root, "libvirtd"),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=self._environment,
        )
        try:
            self._wait(30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for file in (self.directory / "run/libvirt/qemu/run").glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        self._log.close()

    def virsh(self, *words: str | Path) -> str:
        """Runs one command of virsh's. AssertionError when it fails."""
        done = subprocess.run(
            _command(self._root, "virsh", "-q", "-c", "qemu:///session", *map(str, words)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            env=self._environment,
        )
        if "Parameter 'detach' is unexpected" in done.stderr:  # an argument of migrate
            pytest.skip("this libvirt is too old for a QEMU of 11.0 or later")
        assert done.returncode == 0, f"virsh {words}: {done.stderr}{self._said()}"
        return done.stdout

    def create(self, name: str, xml: str, *options: str) -> Domain:
        """Starts a guest that is forgotten when it ends; ``options`` are virsh's."""
        path = self.directory / f"{name}.xml"
        path.write_text(xml)
        self.virsh("create", path, *options)
        pid = int((self.directory / f"run/libvirt/qemu/run/{name}.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_text().removesuffix("\0").split("\0")
        return Domain(name, pid, tuple(command))

    def _wait(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not (self.directory / "run/libvirt/libvirt-sock").exists():
            assert self._process.poll() is None, self._said()
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.02)

    def _said(self) -> str:
        return (self.directory / "libvirtd.log").read_text(errors="replace")


def _command(root: Path, *words: str) -> list[str]:
    outer = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    )
    return [*outer, "sh", "-ec", _IN_NAMESPACES, "sh", str(root), *words]


@functools.cache
def _why_not(root: Path) -> str | None:
    """Why it cannot run here; None if it can."""
    done = subprocess.run(_command(root, "libvirtd", "--version"), capture_output=True, text=True)
    return f"libvirt does not run: {done.stderr.strip()}" if done.returncode else None


RAM = 24 << 20


DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='b'>{ram}</memory>
  <os><type arch='x86_64' machine='{machine}'>hvm</type><loader type='rom'>{image}</loader></os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <serial type='file'><source path='{serial}'/></serial>
  </devices>
</domain>
"""


@dataclass(frozen=True)
class Image:
    """A file that libvirt wrote, the command line of its guest, and what that had reported."""

    path: Path
    header: LibvirtHeader
    domain: Domain
    bios: Path
    reports: bytes


def save(
    libvirt: Libvirt, directory: Path, machine: str, *options: str, paused: bool = False
) -> Image:
    """Has libvirt start a guest and, once it runs, save it; that ends it."""
    path, serial, name = directory / "image", directory / "serial", directory.name
    bios, emulator = build(directory, RAM), shutil.which(BINARY)
    values = {"machine": machine, "image": bios, "serial": serial, "emulator": emulator}
    domain = libvirt.create(name, DOMAIN.format(name=name, ram=RAM, **values))
    serial_says(serial, 2)
    if paused:
        libvirt.virsh("suspend", name)
    libvirt.virsh("save", name, path, *options)
    with contextlib.closing(InputFile(path)) as source:
        header = read_header(source)
    return Image(path, header, domain, bios, serial.read_bytes())
