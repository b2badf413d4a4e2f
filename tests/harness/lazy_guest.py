"""A guest that runs before its memory is there, and the process that serves its pages."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyqmigrate import open_snapshot
from tests.harness.machine import RAM_BLOCK, GuestRam, Mode, Qemu
from tests.harness.pattern_guest import build

__all__ = [
    "RAM",
    "LazyGuest",
    "SavedGuest",
    "ServerProcess",
    "blocks_of",
    "lazy_guest",
    "memory_options",
    "save_guest",
    "wait_for",
]

RAM = 24 << 20


@dataclass(frozen=True)
class SavedGuest:
    """A stopped guest of the pattern's, its snapshot, the content of its blocks, and its image."""

    path: Path
    machine: str
    blocks: dict[str, bytes]
    image: Path


def save_guest(directory: Path, machine: str = "q35") -> SavedGuest:
    """Save a guest that has filled its memory twice, in the middle of a generation."""
    path, serial = directory / f"{machine}.mapped", directory / f"{machine}.serial"
    image = build(directory, RAM)
    serial.touch()
    with (
        GuestRam(RAM) as ram,
        Qemu(ram, machine=machine, run=True, bios=image, serial=serial) as vm,
    ):
        wait_for(lambda: serial.stat().st_size >= 2, "the guest does not run")
        vm.execute("stop")
        vm.save(path, Mode())
    return SavedGuest(path, machine, blocks_of(path), image)


def blocks_of(path: Path | str) -> dict[str, bytes]:
    """Return the content of all blocks of a snapshot."""
    with open_snapshot(path) as snapshot:
        return {name: block.read(0, block.length) for name, block in snapshot.blocks.items()}


def memory_options(machine: str, kind: str, directory: Path) -> list[str]:
    """Return QEMU's options for memory of a kind, the machine included."""
    block = RAM_BLOCK[machine]
    common = f"id={block},size={RAM >> 20}M"
    backend = {
        "private": f"memory-backend-ram,{common}",
        "prealloc": f"memory-backend-ram,{common},prealloc=on",
        "memfd": f"memory-backend-memfd,{common},share=on",
        "memfd-private": f"memory-backend-memfd,{common},share=off",
        "tmpfs": f"memory-backend-file,{common},share=on,mem-path={directory}/memory",
        "hugetlb": f"memory-backend-memfd,{common},share=on,hugetlb=on,hugetlbsize=2M",
    }[kind]
    return [
        "-machine",
        f"{machine},memory-backend={block}",
        "-m",
        f"{RAM >> 20}M",
        "-object",
        backend,
    ]


class LazyGuest(Qemu):
    """A QEMU that waits for a source of pages; its guest is stopped."""

    def __init__(
        self, ram: GuestRam, saved: SavedGuest, memory: Sequence[str], serial: Path
    ) -> None:
        super().__init__(
            ram,
            machine=saved.machine,
            incoming=True,
            memory=memory,
            bios=saved.image,
            serial=serial,
        )
        self.set_capabilities({"postcopy-ram": True})

    def connect(self, *, recover: bool = False) -> socket.socket:
        """Return the source's end of a new connection."""
        ours, theirs = socket.socketpair()
        name = "recover" if recover else "incoming"
        with theirs:
            self.execute("getfd", {"fdname": name}, fd=theirs.fileno())
        self.execute(f"migrate-{name}", {"uri": f"fd:{name}"})
        return ours

    def migration(self) -> str:
        return str(self.execute("query-migrate").get("status"))


class ServerProcess:
    """A page server; ``events`` are those that :meth:`wait_for` has seen."""

    def __init__(self, snapshot: Path | str, connection: socket.socket, *options: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._control, theirs = socket.socketpair()
        self._control.settimeout(30)
        self._lines = self._control.makefile("rb")
        with theirs, connection:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pyqmigrate.page_server",
                    "--fd",
                    str(connection.fileno()),
                    "--control",
                    str(theirs.fileno()),
                    "--snapshot",
                    str(snapshot),
                    *options,
                ],
                pass_fds=[connection.fileno(), theirs.fileno()],
            )

    def wait_for(self, name: str) -> dict[str, Any]:
        """Return the next event of this name."""
        for line in self._lines:
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if event["event"] == name:
                return event
        raise AssertionError(f"the server ended without {name!r}: {self.events[-3:]}")

    def send(self, command: str, connection: socket.socket | None = None, **more: Any) -> None:
        line = json.dumps({"command": command, **more}).encode() + b"\n"
        socket.send_fds(self._control, [line], [] if connection is None else [connection.fileno()])

    def wait(self) -> int:
        return self.process.wait(30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._lines.close()
        self._control.close()


def wait_for(happens: Any, otherwise: str, limit: float = 60) -> None:
    """Wait until ``happens()``; AssertionError after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not happens():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)


@contextlib.contextmanager
def lazy_guest(saved: SavedGuest, directory: Path, kind: str = "private") -> Iterator[LazyGuest]:
    """Yield a QEMU for the pages of ``saved``, with memory of a kind."""
    with (
        GuestRam(RAM) as ram,
        LazyGuest(
            ram, saved, memory_options(saved.machine, kind, directory), directory / "lazy.serial"
        ) as guest,
    ):
        yield guest
