"""The scenarios once more with the server imitating QEMU, and those about identity and shared RAM.

One QEMU and one compat server save all rows, each loaded by a fresh process of the other kind.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import open_snapshot
from tests.harness.compare_memory import assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.serve import Driver, Serve, Witness
from tests.harness.serve_scenarios import (
    RAM,
    ROWS,
    Row,
    configure,
    load,
    occupied,
    same,
    save,
    skip_what_this_qemu_has_not,
)

pytestmark = pytest.mark.qemu

UUID = uuid.UUID("0b4a8a3e-53a7-4a51-9e2c-6b5e0a5f0f11")
OTHER_UUID = uuid.UUID("7d1e33b0-05a5-4ff6-8a1a-52d7c5a8e0cc")
MAPPED = ("mapped-ram",)
SMALL = 8 << 20
# The plainest row and the one with everything; the others in the long run.
FEW = [
    pytest.param(row, marks=[] if row in (ROWS[0], ROWS[-2]) else [pytest.mark.long])
    for row in ROWS
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as started:
        yield started


@pytest.fixture(scope="module")
def savers(driver: Driver) -> Iterator[tuple[Qemu, GuestRam, Serve, GuestRam, str]]:
    """A running QEMU and a compat server, each with its memory, and the type of the machine."""
    with GuestRam(RAM) as theirs, GuestRam(RAM) as ours, contextlib.ExitStack() as stack:
        fill(theirs.memory, Contents.SPECKLED)
        fill(ours.memory, Contents.SPECKLED)
        vm = stack.enter_context(Qemu(theirs, run=True))
        name = vm.machine_name()
        server = stack.enter_context(Serve(driver, ours, machine=name, compat=True))
        yield vm, theirs, server, ours, name


def reset(end: Qemu | Serve) -> None:
    Witness(end).rest()
    end.set_capabilities({"mapped-ram": False, "multifd": False})
    end.execute("migrate-set-parameters", {"direct-io": False, "multifd-channels": 2})


@pytest.mark.parametrize("row", FEW, ids=[str(row) for row in ROWS])
def test_compat_loads_what_qemu_saved(
    driver: Driver, savers: tuple[Qemu, GuestRam, Serve, GuestRam, str], disk: Path, row: Row
) -> None:
    skip_what_this_qemu_has_not(row)
    vm, source, _, _, machine = savers
    reset(vm)
    save(vm, row, disk / "state")
    with GuestRam(RAM) as ram:
        occupied(ram)
        with Serve(driver, ram, machine=machine, incoming=True, compat=True) as end:
            load(end, row, disk / "state")
            state = "paused" if row.stop else "running"
            assert end.execute("query-status")["status"] == state
        assert same(source, ram)


@pytest.mark.parametrize("row", FEW, ids=[str(row) for row in ROWS])
def test_qemu_loads_what_compat_saved(
    savers: tuple[Qemu, GuestRam, Serve, GuestRam, str], disk: Path, row: Row
) -> None:
    skip_what_this_qemu_has_not(row)
    _, _, server, source, _ = savers
    reset(server)
    save(server, row, disk / "state")
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        load(vm, row, disk / "state")
        assert vm.execute("query-status")["status"] == "paused"
        assert same(source, ram)


@pytest.mark.parametrize("policy", ["strict", "compat"])
def test_a_guest_that_was_loaded_is_saved_again_and_qemu_loads_that(
    driver: Driver, savers: tuple[Qemu, GuestRam, Serve, GuestRam, str], disk: Path, policy: str
) -> None:
    """QEMU to server to QEMU: afterwards a destination is a source like any other."""
    vm, source, _, _, machine = savers
    row = next(row for row in ROWS if row.name == "multifd/file/mapped-ram/dio")
    reset(vm)
    save(vm, row, disk / "first")
    with GuestRam(RAM) as ram, GuestRam(RAM) as last:
        compat = policy == "compat"
        with Serve(driver, ram, machine=machine, incoming=True, compat=compat) as end:
            load(end, row, disk / "first")
            end.execute("cont")
            save(end, row, disk / "second")
            assert end.execute("query-migrate")["ram"]["total"] >= RAM
        with Qemu(last, incoming=True) as third:
            load(third, row, disk / "second")
        assert same(source, last)


# ---- validate-uuid --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "capabilities"),
    [("strict", MAPPED), ("compat", ())],
    ids=["strict-mapped-ram", "compat-plain"],
)
@pytest.mark.parametrize("validated", [False, True], ids=["off", "on"])
def test_a_server_without_a_uuid_loads_a_stream_that_has_one(
    driver: Driver, disk: Path, validated: bool, capabilities: tuple[str, ...], policy: str
) -> None:
    row = Row("uuid", True, (*capabilities, "validate-uuid"))
    with GuestRam(SMALL) as source, GuestRam(SMALL) as ram:
        fill(source.memory, Contents.SPECKLED)
        with Qemu(source, extra=["-uuid", str(UUID)]) as vm:
            machine = vm.machine_name()
            save(vm, row, disk / "state")
        with (disk / "state").open("rb") as file:
            assert UUID.bytes in file.read(4096)
        compat = policy == "compat"
        with Serve(driver, ram, machine=machine, incoming=True, compat=compat) as end:
            load(end, row if validated else Row("plain", True, capabilities), disk / "state")
        assert_same_memory(ram.memory, source.memory)


@pytest.mark.parametrize(
    ("policy", "capabilities"),
    [("strict", MAPPED), ("compat", ())],
    ids=["strict-mapped-ram", "compat-plain"],
)
@pytest.mark.parametrize(
    ("told", "local"), [(UUID, UUID), (None, UUID), (UUID, None)], ids=["same", "source", "none"]
)
def test_a_uuid_that_is_equal_or_not_set_on_one_side_passes(
    driver: Driver,
    disk: Path,
    told: uuid.UUID | None,
    local: uuid.UUID | None,
    capabilities: tuple[str, ...],
    policy: str,
) -> None:
    row = Row("uuid", True, (*capabilities, "validate-uuid"))
    compat = policy == "compat"
    with GuestRam(SMALL) as source, GuestRam(SMALL) as theirs, GuestRam(SMALL) as ours:
        fill(source.memory, Contents.SPECKLED)
        extra = ["-uuid", str(local)] if local else []
        with Qemu(theirs, incoming=True, extra=extra) as vm:
            machine = vm.machine_name()
            with Serve(
                driver, source, machine=machine, compat=compat, uuid=str(told or "")
            ) as saver:
                save(saver, row, disk / "state")
            load(vm, row, disk / "state")
        assert_same_memory(theirs.memory, source.memory)
        with Serve(
            driver, ours, machine=machine, compat=compat, uuid=str(local or ""), incoming=True
        ) as end:
            load(end, row, disk / "state")
        assert_same_memory(ours.memory, source.memory)


def load_with_other_uuid(end: Witness, row: Row, path: Path) -> None:
    configure(end.end, row)
    end.ask("migrate-incoming", {"uri": f"file:{path}", "exit-on-error": False})
    while end.end.execute("query-migrate")["status"] in ("setup", "active"):
        pass
    end.events()
    end.state()


@pytest.mark.parametrize("saver", ["qemu", "serve"])
@pytest.mark.parametrize("capabilities", [(), MAPPED], ids=["plain", "mapped-ram"])
def test_another_uuid_fails_a_load_as_in_qemu(
    driver: Driver, disk: Path, capabilities: tuple[str, ...], saver: str
) -> None:
    path = disk / "state"
    row = Row("uuid", True, (*capabilities, "validate-uuid"))
    with contextlib.ExitStack() as stack:
        source, theirs, ours, plain = (stack.enter_context(GuestRam(SMALL)) for _ in range(4))
        other = str(OTHER_UUID)
        vm = stack.enter_context(Qemu(theirs, incoming=True, extra=["-uuid", other]))
        machine = vm.machine_name()
        with (
            Qemu(source, extra=["-uuid", str(UUID)])
            if saver == "qemu"
            else Serve(driver, source, machine=machine, uuid=str(UUID))
        ) as end:
            save(end, row, path)
        waiting = {"machine": machine, "incoming": True, "uuid": other}
        compat = stack.enter_context(Serve(driver, ours, compat=True, **waiting))
        strict = stack.enter_context(Serve(driver, plain, **waiting))
        accounts = []
        for one in (vm, compat, strict):
            witness = Witness(one)
            load_with_other_uuid(witness, row, path)
            accounts.append(witness.account)
        assert accounts[1] == accounts[0]
        reason = f"UUID received is {UUID} and local is {other}"
        assert reason in vm.stderr()
        assert reason in strict.execute("query-migrate")["error-desc"]


# ---- x-ignore-shared ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "capabilities"),
    [("strict", MAPPED), ("compat", ())],
    ids=["strict-mapped-ram", "compat-plain"],
)
def test_memory_that_is_not_shared_comes_from_qemu_with_ignore_shared_on(
    driver: Driver, disk: Path, capabilities: tuple[str, ...], policy: str
) -> None:
    row = Row("ignore-shared", True, (*capabilities, "x-ignore-shared"))
    with GuestRam(SMALL) as size, GuestRam(SMALL) as ram, Qemu(size, private=True, run=True) as vm:
        machine = vm.machine_name()
        save(vm, row, disk / "state")
        compat = policy == "compat"
        with Serve(driver, ram, machine=machine, incoming=True, compat=compat) as end:
            load(end, row, disk / "state")
        assert_same_memory(ram.memory, vm.read_blocks()["pc.ram"])


@pytest.mark.parametrize("policy", ["strict", "compat"])
def test_shared_memory_that_qemu_left_out_stays_as_it_is(
    driver: Driver, disk: Path, policy: str
) -> None:
    """The stream has no page of it: the server's memory is the very file that QEMU's was."""
    row = Row("ignore-shared", True, ("x-ignore-shared",))
    with GuestRam(SMALL) as ram:
        fill(ram.memory, Contents.SPECKLED)
        with Qemu(ram) as vm:
            machine = vm.machine_name()
            save(vm, row, disk / "state")
        before = ram.memory[:]
        assert (disk / "state").stat().st_size < SMALL // 2
        compat = policy == "compat"
        with Serve(driver, ram, machine=machine, incoming=True, compat=compat) as end:
            load(end, row, disk / "state")
        assert_same_memory(ram.memory, before)


def test_qemu_loads_what_was_saved_without_its_shared_memory(driver: Driver, disk: Path) -> None:
    """Both have the same file for memory, as a manager does that restarts in place."""
    row = Row("ignore-shared", True, ("x-ignore-shared",))
    with GuestRam(SMALL) as ram:
        fill(ram.memory, Contents.SPECKLED)
        before = ram.memory[:]
        with Qemu(ram, incoming=True) as vm:
            with Serve(driver, ram, machine=vm.machine_name()) as saver:
                save(saver, row, disk / "state")
            assert (disk / "state").stat().st_size < SMALL // 2
            load(vm, row, disk / "state")
        assert_same_memory(ram.memory, before)


def save_without_shared(end: Witness, path: Path) -> dict[str, object]:
    configure(end.end, Row("ignore-shared", True, (*MAPPED, "x-ignore-shared")))
    end.ask("stop")
    answer = end.ask("migrate", {"uri": f"file:{path}"})
    if "return" in answer:
        end.settle()
    end.events()
    end.state()
    end.ask("cont")
    end.ask("query-status")
    return answer


def test_shared_memory_is_left_out_of_a_mapped_ram_file_as_in_qemu(
    driver: Driver, disk: Path
) -> None:
    """10.0.2 fails at the end of such a save. QEMU 11 and the strict server complete it."""
    path = disk / "state"
    with GuestRam(SMALL) as theirs, GuestRam(SMALL) as ours:
        for ram in (theirs, ours):
            fill(ram.memory, Contents.SPECKLED)
        with (
            Qemu(theirs, run=True) as vm,
            Serve(driver, ours, compat=True) as compat,
            Serve(driver, ours) as strict,
        ):
            accounts = []
            for end in (vm, compat):
                witness = Witness(end)
                assert save_without_shared(witness, path) == {"return": {}}
                accounts.append(witness.account)
            assert accounts[1] == accounts[0]
            path.unlink(missing_ok=True)
            assert save_without_shared(Witness(strict), path) == {"return": {}}
            assert strict.execute("query-migrate")["status"] == "completed"
        with open_snapshot(path) as snapshot:
            assert snapshot.blocks["pc.ram"].external
