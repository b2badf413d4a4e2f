"""Descriptors and memory for tests of what the server refuses, beside a real QEMU."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.serve import Driver, Serve, Witness

__all__ = [
    "D",
    "DSYNC",
    "Ends",
    "MULTIFD",
    "OLD",
    "PLAIN",
    "R",
    "RAM",
    "RW",
    "Refused",
    "SET_1",
    "SYNC",
    "W",
    "add",
    "configure",
    "ends",
    "run_on",
    "saved_ram",
    "take_back",
]

RAM = 32 << 20
W, R, RW, D = os.O_WRONLY, os.O_RDONLY, os.O_RDWR, os.O_DIRECT
SYNC, DSYNC = os.O_SYNC, os.O_DSYNC
OLD = b"what was in the file before" * 400
SET_1 = "file:/dev/fdset/1,offset=4096"
PLAIN: dict[str, bool] = {"mapped-ram": False, "multifd": False}
MULTIFD = {"mapped-ram": True, "multifd": True}


@dataclass(frozen=True)
class Refused:
    """Descriptors that do not serve; what QEMU answers, and what strict says instead."""

    name: str
    lent: tuple[int, ...]
    qemu: str
    strict: str
    direct: bool = False
    uri: str = SET_1
    dup: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ends:
    """A running QEMU and two servers, each with memory of its own that has the same contents."""

    qemu: Qemu
    compat: Serve
    strict: Serve
    memory: dict[int, GuestRam]

    def ram(self, end: Qemu | Serve) -> GuestRam:
        return self.memory[id(end)]


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    with contextlib.ExitStack() as stack:
        memories = [stack.enter_context(GuestRam(RAM)) for _ in range(3)]
        for memory in memories:
            fill(memory.memory, Contents.SPECKLED)
        driver = stack.enter_context(Driver())
        qemu = stack.enter_context(Qemu(memories[0], run=True))
        compat = stack.enter_context(Serve(driver, memories[1], compat=True))
        strict = stack.enter_context(Serve(driver, memories[2]))
        found = zip((qemu, compat, strict), memories, strict=True)
        yield Ends(qemu, compat, strict, {id(end): memory for end, memory in found})


def configure(end: Witness, capabilities: dict[str, bool], *, direct: bool = False) -> None:
    end.rest()
    end.end.set_capabilities({"events": True, **capabilities})
    parameters = {"multifd-channels": 2, "direct-io": direct, "max-bandwidth": 0}
    end.end.execute("migrate-set-parameters", parameters)


def add(end: Witness, path: Path, flags: int, fdset: int = 1, *, dup: bool = False) -> None:
    """Hands in one descriptor; with ``dup`` also its duplicate, made direct."""
    fds = [os.open(path, flags | os.O_CREAT, 0o600)]
    try:
        if dup:
            fds.append(os.dup(fds[0]))
            fcntl.fcntl(fds[1], fcntl.F_SETFL, flags | D)
        for fd in fds:
            end.ask("add-fd", {"fdset-id": fdset, "opaque": f"{flags:x}"}, fd=fd)
    finally:
        for fd in fds:
            os.close(fd)


def take_back(end: Witness, fdset: int = 1) -> None:
    end.ask("remove-fd", {"fdset-id": fdset})
    end.ask("query-fdsets")


def run_on(end: Witness) -> None:
    """The guest goes on, whether it was stopped or migrated."""
    end.ask("cont")
    end.ask("query-status")


def saved_ram(path: Path, offset: int = 0) -> bytearray:
    with open_snapshot(path, offset=offset) as snapshot:
        blocks = {name: bytearray(block.length) for name, block in snapshot.blocks.items()}
        snapshot.load(blocks)
    return blocks["pc.ram"]
