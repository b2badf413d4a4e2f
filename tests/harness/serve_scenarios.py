"""QEMU's own file migration scenarios, for QEMU and for our server."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.machine import GuestRam, Qemu
from tests.harness.serve import Serve
from tests.harness.version import qemu_version

__all__ = [
    "D",
    "DIRECT",
    "FDSET",
    "FOUR",
    "HEADER",
    "MAGIC",
    "MAPPED",
    "MULTIFD",
    "NO_FILES_AS_FD",
    "R",
    "RAM",
    "ROWS",
    "Row",
    "W",
    "configure",
    "lend",
    "load",
    "missing_in_this_qemu",
    "occupied",
    "same",
    "save",
    "skip_what_this_qemu_has_not",
    "take_back",
]

RAM = 32 << 20
HEADER = b"X" * 0x1000
MAGIC = b"QEVM"
W, R, D = os.O_WRONLY, os.O_RDONLY, os.O_DIRECT
FDSET = "file:/dev/fdset/1,offset=4096"
MAPPED = ("mapped-ram",)
MULTIFD = ("mapped-ram", "multifd")
FOUR = {"multifd-channels": 4}
DIRECT = {**FOUR, "direct-io": True}


# From then on QEMU takes sockets and pipes as ``fd:``, and no files.
NO_FILES_AS_FD = (11, 0)


@dataclass(frozen=True)
class Row:
    name: str
    stop: bool
    capabilities: tuple[str, ...] = ()
    parameters: tuple[tuple[str, object], ...] = ()
    uri: str = "file:{file}"
    lent: tuple[int, ...] = ()  # flags of the saver's descriptors beyond its access mode

    def __str__(self) -> str:
        return self.name


ROWS = [
    Row("file", True),
    Row("file/offset", False, uri="file:{file},offset=4096"),
    Row("file/offset/fdset", False, uri=FDSET, lent=(0,)),
    Row("file/mapped-ram", True, MAPPED),
    Row("file/mapped-ram/live", False, MAPPED),
    Row("multifd/file/mapped-ram", True, MULTIFD, tuple(FOUR.items())),
    Row("multifd/file/mapped-ram/live", False, MULTIFD, tuple(FOUR.items())),
    Row("multifd/file/mapped-ram/dio", True, MULTIFD, tuple(DIRECT.items())),
    Row("multifd/file/mapped-ram/fdset", True, MULTIFD, tuple(FOUR.items()), FDSET, (0, 0)),
    Row("multifd/file/mapped-ram/fdset/dio", True, MULTIFD, tuple(DIRECT.items()), FDSET, (0, D)),
    *(
        Row(
            f"multifd/file/mapped-ram/zero-page/{who}",
            True,
            MULTIFD,
            (*FOUR.items(), ("zero-page-detection", who)),
        )
        for who in ("legacy", "none")
    ),
    Row("fd/file", True, uri="fd:there", lent=(0,)),
]


def missing_in_this_qemu(row: Row) -> bool:
    """QEMU 11.0 and later take no file as ``fd:``."""
    return row.uri.startswith("fd:") and qemu_version() >= NO_FILES_AS_FD


def skip_what_this_qemu_has_not(row: Row) -> None:
    if missing_in_this_qemu(row):
        pytest.skip("QEMU 11.0 and later take no file as fd:")


def configure(end: Qemu | Serve, row: Row) -> None:
    end.set_capabilities({"events": True, **dict.fromkeys(row.capabilities, True)})
    end.execute("migrate-set-parameters", {"max-bandwidth": 0, **dict(row.parameters)})


def lend(end: Qemu | Serve, row: Row, path: Path, access: int) -> str:
    """Hands in the descriptors of a row, each a separate open; its URI."""
    for flags in row.lent:
        fd = os.open(path, access | flags | os.O_CREAT, 0o600)
        try:
            if row.uri.startswith("fd:"):
                end.execute("getfd", {"fdname": "there"}, fd=fd)
            else:
                assert end.execute("add-fd", {"fdset-id": 1}, fd=fd)["fdset-id"] == 1
        finally:
            os.close(fd)
    return row.uri.format(file=path)


def save(end: Qemu | Serve, row: Row, path: Path) -> None:
    configure(end, row)
    if "offset" in row.uri:
        path.write_bytes(HEADER)
    uri = lend(end, row, path, W)
    if row.stop:
        end.execute("stop")
    end.execute("migrate", {"uri": uri})
    result = end.wait()
    assert result["status"] == "completed", result
    # QEMU calls a migration completed a moment before the guest is in postmigrate.
    deadline = time.monotonic() + 10
    while (status := end.execute("query-status")["status"]) == "finish-migrate":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert status == "postmigrate"
    take_back(end, row)
    with path.open("rb") as file:
        if "offset" in row.uri:
            assert file.read(len(HEADER)) == HEADER
        assert file.read(len(MAGIC)) == MAGIC


def load(end: Qemu | Serve, row: Row, path: Path) -> None:
    configure(end, row)
    uri = lend(end, row, path, R)
    end.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    result = end.wait()
    assert result == {"status": "completed"}
    take_back(end, row)


def take_back(end: Qemu | Serve, row: Row) -> None:
    if "fdset" in row.uri:
        end.execute("remove-fd", {"fdset-id": 1})
        assert end.execute("query-fdsets") == []


def same(one: GuestRam, other: GuestRam) -> bool:
    """Compares without a copy, and without a diff that pytest would make of 32 MiB."""
    with memoryview(one.memory) as a, memoryview(other.memory) as b:
        step = 1 << 20
        return all(a[at : at + step] == b[at : at + step] for at in range(0, RAM, step))


def occupied(ram: GuestRam) -> None:
    """Memory that a load has to overwrite, zero pages too."""
    ram.memory[:] = b"\xa5" * RAM
