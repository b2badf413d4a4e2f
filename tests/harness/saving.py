"""A guest that writes its pattern and counts, with a monitor for the test and one for a save.

with source(disk, memory="memfd") as guest:
    report = guest.save(disk / "snapshot")
    guest.assert_as_before()
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyqmigrate import open_snapshot
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.save import save
from tests.harness.machine import RAM_BLOCK, GuestRam, Qemu
from tests.harness.pattern_guest import build

__all__ = ["KINDS", "Source", "loaded", "source"]

ROOT = Path(__file__).resolve().parents[2]
RAM = 32 << 20
KINDS = ["file", "memfd", "private"]
"""How the guest has its memory: a shared file, a shared memfd, its own."""


class Source:
    """A QEMU with the guest of ``guest.s``. ``vm`` is the test's; a save uses another monitor."""

    def __init__(self, vm: Qemu, directory: Path, ram: GuestRam, image: Path) -> None:
        self.vm = vm
        self.directory = directory
        self.ram = ram
        self.image = image
        self.socket = directory / "save.qmp"
        self.serial = directory / "serial"
        self.before = self.settings()
        self.run_state = self.status()
        self.files = self._files()

    def save(self, path: Path, **arguments: Any) -> VmSaveReport:
        return asyncio.run(save(self.socket, path, **arguments))

    def start_save(
        self, path: Path, *arguments: str, program: str | None = None
    ) -> subprocess.Popen[bytes]:
        """The command, in a process of its own, or a ``program`` that is it in some way."""
        python = ["-m", "pyqmigrate"] if program is None else ["-c", program]
        command = [
            sys.executable,
            *python,
            "vm",
            "save",
            "--qmp",
            str(self.socket),
            *arguments,
            str(path),
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def settings(self) -> tuple[Any, Any]:
        return (
            self.vm.execute("query-migrate-capabilities"),
            self.vm.execute("query-migrate-parameters"),
        )

    def status(self) -> str:
        return str(self.vm.execute("query-status")["status"])

    def count(self) -> int:
        """How far the guest says it has counted."""
        return self.serial.stat().st_size

    def wait_for_count(self, count: int) -> None:
        wait_until(lambda: self.count() >= count, "the guest does not go on counting")

    def assert_as_before(self, *, within: float = 0) -> None:
        """The guest does what it did, with the settings it had; nothing is left anywhere.

        ``within`` so many seconds, where a guardian is at work.
        """
        wait_until(lambda: self._difference() == "", lambda: self._difference(), within)
        if self.run_state == "running":
            self.wait_for_count(self.count() + 2)

    def _difference(self) -> str:
        if self.settings() != self.before:
            return f"settings {self.settings()}, before: {self.before}"
        if self.status() != self.run_state:
            return f"the guest is {self.status()}, before: {self.run_state}"
        if fdsets := self.vm.execute("query-fdsets"):
            return f"stray fdsets: {fdsets}"
        if self._files() != self.files:
            return f"stray files: {self._files() - self.files}"
        if guardians := self._guardians():
            return f"guardian processes are left: {guardians}"
        return ""

    def _files(self) -> set[str]:
        """Those in the directory; the record of a snapshot that is expected is expected, too."""
        names = {path.name for path in self.directory.iterdir()}
        return names - {f"{name}.vm.json" for name in getattr(self, "files", ())}

    def _guardians(self) -> list[int]:
        """Processes that guard this guest: they are told a snapshot in this directory."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                ours = any(word.startswith(bytes(self.directory)) for word in words)
                if ours and any(word.endswith(b"/guardian.py") for word in words):
                    found.append(int(entry.name))
        return found


def wait_until(
    condition: Callable[[], bool], complaint: str | Callable[[], str], seconds: float = 20
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint() if callable(complaint) else complaint
        time.sleep(0.02)


@contextlib.contextmanager
def source(
    directory: Path,
    *,
    machine: str = "pc",
    memory: str = "file",
    run: bool = True,
    length: int = RAM,
    extra: tuple[str, ...] = (),
) -> Iterator[Source]:
    """A guest in full swing, or (not ``run``) stopped in it."""
    image = build(directory, length)
    (directory / "serial").touch()
    with (
        GuestRam(length) as ram,
        Qemu(
            ram,
            machine=machine,
            run=True,
            bios=image,
            serial=directory / "serial",
            memory=_memory(machine, memory, ram),
            extra=["-qmp", f"unix:{directory}/save.qmp,server=on,wait=off", *extra],
        ) as vm,
    ):
        wait_until(lambda: (directory / "serial").stat().st_size >= 2, "the guest does not run")
        if not run:
            vm.execute("stop")
        yield Source(vm, directory, ram, image)


def _memory(machine: str, kind: str, ram: GuestRam) -> list[str]:
    block = RAM_BLOCK[machine]
    common = f"id={block},size={ram.length}"
    backend = {
        "file": f"memory-backend-file,{common},share=on,mem-path=/proc/self/fd/{ram.fd}",
        "memfd": f"memory-backend-memfd,{common},share=on",
        "private": f"memory-backend-ram,{common}",
    }[kind]
    return [
        "-machine",
        f"{machine},memory-backend={block}",
        "-m",
        f"{ram.length >> 20}M",
        "-object",
        backend,
    ]


@contextlib.contextmanager
def loaded(guest: Source, path: Path) -> Iterator[Source]:
    """A fresh QEMU that has loaded the snapshot, not running yet; checked against the file."""
    directory = path.parent / "loaded"
    directory.mkdir()
    serial = directory / "serial"
    serial.touch()
    with (
        GuestRam(guest.ram.length) as ram,
        Qemu(ram, machine=guest.vm.machine, incoming=True, bios=guest.image, serial=serial) as vm,
        open_snapshot(path) as snapshot,
    ):
        vm.load(path)
        snapshot.verify()
        memory = vm.read_blocks()
        for name, block in snapshot.blocks.items():
            assert memory[name] == block.read(0, block.length), f"block {name} differs"
        yield Source(vm, directory, ram, guest.image)
