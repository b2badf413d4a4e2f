"""QEMU's own file migration scenarios, with our server saving, loading, or both.

The names, capabilities, parameters, URIs and descriptors are those of QEMU's migration tests;
RAM is compared every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import QemuRefused
from tests.harness.contents import Contents, fill
from tests.harness.covering import covering
from tests.harness.machine import GuestRam, Qemu
from tests.harness.serve import Driver, Serve
from tests.harness.serve_scenarios import (
    NO_FILES_AS_FD,
    RAM,
    ROWS,
    Row,
    W,
    lend,
    load,
    missing_in_this_qemu,
    occupied,
    same,
    save,
    skip_what_this_qemu_has_not,
)
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as started:
        yield started


@pytest.fixture(scope="module")
def machine_type() -> str:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        return vm.machine_name()


# The strict server writes what the other one does. What QEMU saved is read with each capability,
# each kind of descriptor and each kind of zero pages.
COMPAT = {"file", "file/offset/fdset", "multifd/file/mapped-ram/fdset/dio", "fd/file"}
SAVED_BY_QEMU = {
    "file/offset",
    "file/mapped-ram/live",
    "multifd/file/mapped-ram/dio",
    "multifd/file/mapped-ram/fdset",
    "multifd/file/mapped-ram/zero-page/legacy",
    "multifd/file/mapped-ram/zero-page/none",
    "fd/file",
}


@pytest.mark.parametrize(
    ("row", "policy"),
    covering(
        ((row, policy) for row in ROWS for policy in ("strict", "compat")),
        short=[
            *((row, "strict") for row in ROWS),
            *((row, "compat") for row in ROWS if row.name in COMPAT),
        ],
    ),
    ids=str,
)
def test_serve_and_qemu_load_what_serve_saved(
    driver: Driver, machine_type: str, disk: Path, row: Row, policy: str
) -> None:
    """QEMU loads what the strict server saved; the other one writes the same file."""
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
        if not compat and not missing_in_this_qemu(row):
            with GuestRam(RAM) as fresh, Qemu(fresh, incoming=True) as vm:
                load(vm, row, path)
                assert vm.execute("query-status")["status"] == "paused"
                assert same(source, fresh)


@pytest.mark.parametrize(
    "row", covering(ROWS, [row for row in ROWS if row.name in SAVED_BY_QEMU]), ids=str
)
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
            with pytest.raises(QemuRefused) as refused:
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
            with pytest.raises(QemuRefused, match="fd: migration to a file is not supported") as no:
                end.execute(command, {"uri": uri})
            replies.append((no.value.desc, end.execute("query-migrate")))
        assert replies[0] == replies[1]
