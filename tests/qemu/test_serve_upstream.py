"""Scenarios of QEMU's own migration tests that need one memory for both ends, or a cancel.

Their names there: ``mapped-ram/ignore-shared``, ``mode/reboot``, ``mode/exec`` (refused here), and
``cancel/src/after/STATUS``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.serve import Driver, Serve, Witness, imitated
from tests.harness.serve_scenarios import MAPPED, RAM, Row, load, save
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

IGNORE = ("x-ignore-shared",)
REBOOT = (("mode", "cpr-reboot"),)
EXTERNAL = (11, 0)  # from then on QEMU writes and reads such mapped-ram files
ROWS = [
    Row("mapped-ram/ignore-shared", True, (*MAPPED, *IGNORE)),
    Row("mapped-ram/ignore-shared/live", False, (*MAPPED, *IGNORE)),
    Row("mode/reboot", False, IGNORE, REBOOT),
    Row("mode/reboot/mapped-ram", False, (*MAPPED, *IGNORE), REBOOT),
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as started:
        yield started


def skip_where_qemu_cannot(row: Row) -> None:
    if "mapped-ram" in row.capabilities and qemu_version() < EXTERNAL:
        pytest.skip("QEMU before 11.0 cannot leave RAM out of a mapped-ram file")


def check_external(path: Path, row: Row) -> None:
    """RAM is listed in the file, and its content is not there; a fact, not zeros."""
    assert path.stat().st_size < RAM
    if "mapped-ram" not in row.capabilities:
        return
    with open_snapshot(path) as snapshot:
        block = snapshot.blocks["pc.ram"]
        assert (block.external, block.length, block.data_pages) == (True, RAM, 0)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_serve_goes_on_with_the_memory_of_a_qemu(driver: Driver, disk: Path, row: Row) -> None:
    skip_where_qemu_cannot(row)
    path = disk / "state"
    with GuestRam(RAM) as ram:
        fill(ram.memory, Contents.SPECKLED)
        with Qemu(ram, run=not row.stop) as vm:
            machine = vm.machine_name()
            save(vm, row, path)
        check_external(path, row)
        before = bytes(ram.memory)
        with Serve(driver, ram, machine=machine, incoming=True) as end:
            load(end, row, path)
        assert ram.memory[:] == before


@pytest.mark.parametrize("policy", ["strict", "compat"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_qemu_goes_on_with_the_memory_of_serve(
    driver: Driver, disk: Path, row: Row, policy: str
) -> None:
    skip_where_qemu_cannot(row)
    path = disk / "state"
    with GuestRam(RAM) as ram:
        fill(ram.memory, Contents.SPECKLED)
        before = bytes(ram.memory)
        with Qemu(ram, incoming=True) as vm:
            with Serve(driver, ram, machine=vm.machine_name(), compat=policy == "compat") as end:
                save(end, row, path)
            check_external(path, row)
            load(vm, row, path)
            assert vm.execute("query-status")["status"] == "paused"
        assert ram.memory[:] == before


def test_every_verb_says_that_the_content_is_elsewhere(disk: Path) -> None:
    """The same snapshot of a real QEMU to all that read one: none makes zeros of it."""
    row = ROWS[0]
    skip_where_qemu_cannot(row)
    path = disk / "state"
    with GuestRam(RAM) as ram:
        fill(ram.memory, Contents.SPECKLED)
        with Qemu(ram) as vm:
            save(vm, row, path)
        memory = disk / "memory"
        memory.write_bytes(ram.memory)
    told = json.loads(run("info", "--json", path).stdout)
    [block] = [b for b in told["blocks"] if b["name"] == "pc.ram"]
    assert block["external"] is True
    assert "not in this file" in run("unpack", path, disk / "unpacked").stdout
    assert not (disk / "unpacked" / "pc.ram.raw").exists()
    assert run("verify", path).returncode == run("devices", path).returncode == 0
    for form in ("elf", "lime"):
        refused = run("convert", path, disk / form, "--to", form)
        assert refused.returncode == 2
        assert "'pc.ram' is not in this snapshot" in refused.stderr
        assert not (disk / form).exists()
    for form in ("mapped-ram", "stream"):
        assert run("convert", path, disk / form, "--to", form).returncode == 0
        told = json.loads(run("info", "--json", disk / form).stdout)
        assert [b["external"] for b in told["blocks"] if b["name"] == "pc.ram"] == [True]
    given = ("--memory", f"pc.ram={memory}")
    whole = run("convert", path, disk / "whole", "--to", "mapped-ram", *given)
    assert whole.returncode == 0, whole.stderr
    with open_snapshot(disk / "whole") as snapshot:
        target = bytearray(RAM)
        snapshot.load({"pc.ram": target}, blocks=["pc.ram"])
        assert target == memory.read_bytes()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyqmigrate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_reboot_looks_to_a_manager_as_in_qemu(driver: Driver, disk: Path) -> None:
    row = ROWS[2]
    accounts = []
    with (
        GuestRam(RAM) as theirs,
        GuestRam(RAM) as ours,
        Qemu(theirs, run=True) as vm,
        Serve(driver, ours, compat=True) as server,
    ):
        for end in (vm, server):
            witness = Witness(end)
            end.set_capabilities({"events": True, "x-ignore-shared": True})
            witness.ask("migrate-set-parameters", dict(row.parameters))
            witness.ask("migrate", {"uri": f"file:{disk / 'state'}"})
            witness.settle()
            witness.events()
            witness.state()
            accounts.append(witness.account)
    assert accounts[1] == accounts[0]


def test_becoming_another_program_is_refused_as_in_qemu(driver: Driver, disk: Path) -> None:
    """Up to the command: QEMU 11 would become it, and a server says that it cannot."""
    accounts = []
    uri = {"uri": f"file:{disk / 'state'}"}
    with (
        GuestRam(RAM) as theirs,
        GuestRam(RAM) as ours,
        Qemu(theirs) as vm,
        Serve(driver, ours, compat=True) as server,
    ):
        for end in (vm, server):
            witness = Witness(end)
            witness.ask("migrate-set-parameters", {"mode": "cpr-exec"})
            if imitated() >= (11, 1):
                witness.ask("migrate", uri)
            witness.ask("query-migrate")
            accounts.append(witness.account)
        assert accounts[1] == accounts[0]
        if imitated() >= (11, 1):
            server.execute("migrate-set-parameters", {"cpr-exec-command": ["/bin/true"]})
            answer = Witness(server).hear("migrate", uri)
            assert "not possible here" in answer["error"]["desc"]
    assert not (disk / "state").exists()


@pytest.mark.parametrize("status", ["none", "active", "pre-switchover", "completed", "failed"])
def test_a_cancel_looks_to_a_manager_as_in_qemu(driver: Driver, disk: Path, status: str) -> None:
    accounts = []
    with GuestRam(RAM) as theirs, GuestRam(RAM) as ours:
        for ram in (theirs, ours):
            fill(ram.memory, Contents.SPECKLED)
        with Qemu(theirs, run=True) as vm, Serve(driver, ours, compat=True) as server:
            for end in (vm, server):
                accounts.append(cancelled_in(status, Witness(end), disk / "state"))
    assert accounts[1] == accounts[0]


def cancelled_in(status: str, witness: Witness, path: Path) -> list[tuple[str, object]]:
    end = witness.end
    end.set_capabilities(
        {"events": True, "pause-before-switchover": status == "pre-switchover", "mapped-ram": True}
    )
    if status == "active":  # the guest of a server that tracks no changes is stopped by then
        end.execute("stop")
    rate = 1 << 20 if status == "active" else 0
    witness.ask("migrate-set-parameters", {"max-bandwidth": rate})
    uri = "file:/nonexistent/x" if status == "failed" else f"file:{path}"
    if status != "none":
        witness.ask("migrate", {"uri": uri})
        deadline = time.monotonic() + 30
        while end.execute("query-migrate")["status"] != status:
            assert time.monotonic() < deadline, end.execute("query-migrate")
            time.sleep(0.005)
    witness.ask("migrate_cancel")
    if status != "none":
        witness.settle()
        witness.events()
    witness.state()
    witness.ask("cont")
    witness.ask("query-status")
    return witness.account
