"""QEMU's own file migration scenarios, with our server saving, loading, or both.

The names, capabilities, parameters, URIs and descriptors are those of QEMU's migration tests;
RAM is compared every time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.qmp import QmpError
from tests.harness.serve import Driver, Serve
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

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


def skip_what_this_qemu_has_not(row: Row) -> None:
    if row.uri.startswith("fd:") and qemu_version() >= NO_FILES_AS_FD:
        pytest.skip("QEMU 11.0 and later take no file as fd:")


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as started:
        yield started


@pytest.fixture(scope="module")
def machine_type() -> str:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        return vm.machine_name()


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


@pytest.mark.parametrize("policy", ["strict", "compat"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_serve_loads_what_serve_saved(
    driver: Driver, machine_type: str, disk: Path, row: Row, policy: str
) -> None:
    path, compat = disk / "state", policy == "compat"
    if compat:
        skip_what_this_qemu_has_not(row)
    with GuestRam(RAM) as source, GuestRam(RAM) as destination:
        fill(source.memory, Contents.SPECKLED)
        occupied(destination)
        with Serve(driver, source, machine=machine_type, compat=compat) as saver:
            save(saver, row, path)
            statuses = [e["data"]["status"] for e in saver.events if e["event"] == "MIGRATION"]
            assert statuses == ["setup", "active", "device", "completed"]
        with Serve(driver, destination, machine=machine_type, compat=compat, incoming=True) as end:
            load(end, row, path)
            state = "paused" if row.stop else "running"
            assert end.execute("query-status")["status"] == state
            end.execute("cont")
            assert end.execute("query-status") == {"status": "running", "running": True}
        assert same(source, destination)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_serve_loads_what_qemu_saved(driver: Driver, disk: Path, row: Row) -> None:
    skip_what_this_qemu_has_not(row)
    path = disk / "state"
    with GuestRam(RAM) as source, GuestRam(RAM) as destination:
        fill(source.memory, Contents.SPECKLED)  # before it runs: its firmware lives there as well
        occupied(destination)
        with Qemu(source, run=not row.stop) as vm:
            machine_type = vm.machine_name()
            save(vm, row, path)
        with Serve(driver, destination, machine=machine_type, incoming=True) as end:
            load(end, row, path)
        assert same(source, destination)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_qemu_loads_what_serve_saved(
    driver: Driver, machine_type: str, disk: Path, row: Row
) -> None:
    skip_what_this_qemu_has_not(row)
    path = disk / "state"
    with GuestRam(RAM) as source, GuestRam(RAM) as destination:
        fill(source.memory, Contents.SPECKLED)
        with Serve(driver, source, machine=machine_type) as saver:
            save(saver, row, path)
        with Qemu(destination, incoming=True) as vm:
            load(vm, row, path)
            assert vm.execute("query-status")["status"] == "paused"
        assert same(source, destination)


def test_a_bad_offset_is_an_error_of_migrate_and_changes_nothing(
    driver: Driver, disk: Path
) -> None:
    path = disk / "state"
    replies = []
    with GuestRam(RAM) as ram, contextlib.ExitStack() as stack:
        ends = [
            stack.enter_context(Qemu(ram)),
            stack.enter_context(Serve(driver, ram, compat=True)),
            stack.enter_context(Serve(driver, ram)),
        ]
        for end in ends:
            with pytest.raises(QmpError) as refused:
                end.execute("migrate", {"uri": f"file:{path},offset=0x20M"})
            replies.append((refused.value.error_class, refused.value.desc))
            assert end.execute("query-migrate") == {}
    assert replies[0] == replies[1] == replies[2]
    assert "bad offset" in replies[0][1]
    assert not path.exists()


@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
def test_qemu_takes_a_file_as_fd_until_11(driver: Driver, disk: Path, command: str) -> None:
    """Strict goes on to take it, as 10.0 does; a server that imitates 11.1 refuses it too."""
    if qemu_version() < NO_FILES_AS_FD:
        pytest.skip("this QEMU takes it: the scenarios try that")
    row, incoming = next(r for r in ROWS if r.name == "fd/file"), command == "migrate-incoming"
    with (
        GuestRam(RAM) as ram,
        Qemu(ram, incoming=incoming) as vm,
        Serve(driver, ram, compat=True, incoming=incoming) as server,
    ):
        replies = []
        for end in (vm, server):
            uri = lend(end, row, disk / "state", W)
            with pytest.raises(QmpError, match="fd: migration to a file is not supported") as no:
                end.execute(command, {"uri": uri})
            replies.append((no.value.desc, end.execute("query-migrate")))
        assert replies[0] == replies[1]
