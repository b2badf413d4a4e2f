"""Outgoing migrations: states, events, passes, cancels, failures."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, UsageError, open_snapshot
from pyqmigrate.format.device.sections import DeviceSection
from pyqmigrate.migration import Guest, Migration
from pyqmigrate.migration.fdset import FdsetError, FdSets
from pyqmigrate.qapi.address import parse_uri
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import RunState, Status
from tests.harness.migrations import LENGTH, PAGE, Recorder, memory


def loaded(path: Path, offset: int = 0) -> bytes:
    with open_snapshot(path, offset=offset) as snapshot:
        snapshot.verify()
        ram = bytearray(snapshot.blocks["pc.ram"].length)
        snapshot.load({"pc.ram": ram})
    return bytes(ram)


class Changing(Guest):
    """A guest that changes some pages between two looks at it, until it is stopped."""

    def __init__(self, ram: mmap.mmap, rounds: int) -> None:
        self.ram = ram
        self.rounds = rounds
        self.log: list[str] = []
        self._changed: set[int] = set()

    def stop(self) -> None:
        self.log.append("stop")
        self._touch(5, b"last" * 1024)
        self._touch(6, bytes(PAGE))

    def cont(self) -> None:
        self.log.append("cont")

    def _touch(self, page: int, data: bytes) -> None:
        self.ram[page * PAGE : (page + 1) * PAGE] = data
        self._changed.add(page)

    def dirty(self) -> Mapping[str, bytes]:
        self.log.append("dirty")
        bits = bytearray(LENGTH // PAGE // 8)
        for page in self._changed:
            bits[page // 8] |= 1 << page % 8
        self._changed.clear()
        if self.rounds:
            self.rounds -= 1
            for page in range(self.rounds * 40, self.rounds * 40 + 30):
                self._touch(page, bytes(PAGE) if page % 3 == 0 else b"live" * 1024)
        return {"pc.ram": bytes(bits)}


@pytest.mark.parametrize(
    ("capabilities", "direct_io"),
    [
        ({"mapped-ram": True}, False),
        ({"mapped-ram": True, "multifd": True}, False),
        ({"mapped-ram": True, "multifd": True}, True),
    ],
    ids=["single", "multifd", "direct"],
)
@pytest.mark.parametrize("offset", [0, 0x1234])
def test_memory_comes_back_equal(
    disk: Path, capabilities: dict[str, bool], direct_io: bool, offset: int
) -> None:
    ram = memory()
    migration = Migration([RamBlock("pc.ram", ram)])
    migration.set_capabilities(capabilities)
    migration.set_parameters({"direct-io": direct_io, "multifd-channels": 4})
    migration.migrate(parse_uri(f"file:{disk}/snap,offset={offset:#x}"))
    info = migration.wait(60)
    assert info.status is Status.COMPLETED, info
    assert info.ram is not None
    assert info.ram.total == LENGTH
    assert info.ram.normal == LENGTH // PAGE // 3 + 1
    assert info.ram.duplicate == LENGTH // PAGE - info.ram.normal
    assert info.ram.remaining == 0
    assert loaded(disk / "snap", offset) == ram[:]
    assert migration.run_state is RunState.POSTMIGRATE


def test_events_of_a_running_guest_come_in_qemu_s_order(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())])
    recorder = Recorder(migration)
    migration.set_capabilities({"mapped-ram": True})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    migration.wait(60)
    assert recorder.seen == ["setup", "PASS 1", "active", "STOP", "device", "PASS 2", "completed"]


def test_events_come_in_the_order_of_qemu_11_where_that_is_imitated(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())], policy=Policy.COMPAT_11_1)
    recorder = Recorder(migration)
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert migration.wait(60).status is Status.COMPLETED
    assert [word for word in recorder.seen if word != "STOP"] == [
        "setup",
        "active",
        "PASS 2",
        "device",
        "completed",
    ]
    recorder.seen.clear()
    migration.cont()
    with pytest.raises(OSError, match="No such file"):
        migration.migrate(parse_uri("file:/nonexistent/snap"))
    assert recorder.seen == ["RESUME", "setup", "failing", "failed"]


@pytest.mark.parametrize("policy", list(Policy))
def test_a_save_for_a_reboot_stops_the_guest_first(disk: Path, policy: Policy) -> None:
    guest = Changing(memory(), rounds=2)
    migration = Migration([RamBlock("pc.ram", guest.ram)], guest=guest, policy=policy)
    recorder = Recorder(migration)
    migration.set_parameters({"mode": "cpr-reboot"})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert migration.wait(60).status is Status.COMPLETED
    assert recorder.seen[:2] == ["setup", "STOP"]
    assert guest.log == ["stop"]  # and nothing changes afterwards


def test_to_become_another_program_is_refused(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())], policy=Policy.COMPAT_11_1)
    migration.set_parameters({"mode": "cpr-exec"})
    with pytest.raises(UsageError, match="cpr-exec mode requires setting cpr-exec-command"):
        migration.migrate(parse_uri(f"file:{disk}/snap"))
    migration.set_parameters({"cpr-exec-command": ["/bin/true"]})
    with pytest.raises(UsageError, match="set mode to normal"):
        migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert migration.query().status is Status.NONE
    assert list(disk.iterdir()) == []


def test_a_stopped_guest_is_not_stopped_again(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())], run_state=RunState.PAUSED)
    recorder = Recorder(migration)
    migration.set_capabilities({"mapped-ram": True})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    migration.wait(60)
    assert "STOP" not in recorder.seen
    assert migration.run_state is RunState.POSTMIGRATE


def test_memory_that_changes_is_saved_as_it_was_when_the_guest_stopped(disk: Path) -> None:
    ram = memory()
    guest = Changing(ram, rounds=4)
    # No downtime: every round of changes is a pass of its own.
    migration = Migration([RamBlock("pc.ram", ram)], guest=guest)
    migration.set_parameters({"downtime-limit": 0})
    migration.set_capabilities({"mapped-ram": True, "multifd": True})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    info = migration.wait(60)
    assert info.status is Status.COMPLETED, info
    assert loaded(disk / "snap") == ram[:]
    assert guest.log.count("stop") == 1
    assert guest.log.index("stop") == len(guest.log) - 2  # one more look, at a guest that stands
    assert info.ram is not None
    assert info.ram.dirty_sync_count >= 4


def test_pages_that_became_zero_leave_nothing_under_their_clear_bits(disk: Path) -> None:
    ram = memory()
    migration = Migration([RamBlock("pc.ram", ram)], guest=Changing(ram, rounds=4))
    migration.set_parameters({"downtime-limit": 0})
    migration.set_capabilities({"mapped-ram": True})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    migration.wait(60)
    with open_snapshot(disk / "snap") as snapshot:
        block = snapshot.blocks["pc.ram"]
        raw = (disk / "snap").read_bytes()
        clear = [page for page in range(block.num_pages) if not block.bitmap[page]]
        for page in clear:
            at = block.pages_offset + page * PAGE
            assert not any(raw[at : at + PAGE]), page


def test_without_zero_page_detection_every_page_is_written_and_marked(disk: Path) -> None:
    ram = memory()
    migration = Migration([RamBlock("pc.ram", ram)])
    migration.set_capabilities({"mapped-ram": True})
    migration.set_parameters({"zero-page-detection": "none"})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    info = migration.wait(60)
    assert info.ram is not None
    assert (info.ram.normal, info.ram.duplicate) == (LENGTH // PAGE, 0)
    with open_snapshot(disk / "snap") as snapshot:
        assert snapshot.blocks["pc.ram"].zero_pages == 0
    assert loaded(disk / "snap") == ram[:]


def test_it_pauses_before_switchover_until_it_is_told_to_go_on(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())])
    recorder = Recorder(migration)
    migration.set_capabilities({"mapped-ram": True, "pause-before-switchover": True})
    paused = threading.Event()
    migration.subscribe(
        lambda e: paused.set() if (e.data or {}).get("status") == "pre-switchover" else None
    )
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert paused.wait(60)
    assert migration.query().status is Status.PRE_SWITCHOVER
    assert migration.run_state is RunState.FINISH_MIGRATE
    with pytest.raises(UsageError, match="Migration not in expected state: pre-switchover"):
        migration.migrate_continue("device")
    migration.migrate_continue("pre-switchover")
    assert migration.wait(60).status is Status.COMPLETED
    assert recorder.seen == [
        "setup",
        "PASS 1",
        "active",
        "STOP",
        "pre-switchover",
        "device",
        "PASS 2",
        "completed",
    ]


@pytest.mark.parametrize("policy", list(Policy))
def test_a_cancel_before_switchover_lets_the_guest_go_on(disk: Path, policy: Policy) -> None:
    guest = Changing(memory(), rounds=0)
    migration = Migration([RamBlock("pc.ram", guest.ram)], guest=guest, policy=policy)
    recorder = Recorder(migration)
    migration.set_capabilities({"mapped-ram": True, "pause-before-switchover": True})
    paused = threading.Event()
    migration.subscribe(
        lambda e: paused.set() if (e.data or {}).get("status") == "pre-switchover" else None
    )
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert paused.wait(60)
    migration.cancel()
    info = migration.wait(60)
    assert info.status is Status.CANCELLED
    assert info.error == (policy.qemu.interrupted_switchover if policy.compat else "")
    assert recorder.seen[-3:] == ["cancelling", "RESUME", "cancelled"]
    assert migration.run_state is RunState.RUNNING
    assert guest.log[-1] == "cont"
    assert list(disk.iterdir()) == []


def test_a_cancelled_save_leaves_nothing_and_may_be_repeated(disk: Path) -> None:
    ram = memory()
    migration = Migration([RamBlock("pc.ram", ram)])
    migration.set_capabilities({"mapped-ram": True, "multifd": True})
    migration.set_parameters({"max-bandwidth": 1 << 20})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    with pytest.raises(UsageError, match="There's a migration process in progress"):
        migration.set_capabilities({"multifd": False})
    migration.cancel()
    info = migration.wait(10)
    assert (info.status, info.error) == (Status.CANCELLED, "")
    assert list(disk.iterdir()) == []
    assert migration.run_state is RunState.RUNNING
    migration.set_parameters({"max-bandwidth": 0})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert migration.wait(60).status is Status.COMPLETED
    assert loaded(disk / "snap") == ram[:]


def test_bandwidth_can_be_raised_while_it_runs(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())])
    migration.set_capabilities({"mapped-ram": True, "multifd": True})
    migration.set_parameters({"max-bandwidth": 1000})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert migration.query().status in (Status.SETUP, Status.ACTIVE)
    with pytest.raises(UsageError, match="cannot change while a migration is running"):
        migration.set_parameters({"multifd-channels": 7})
    migration.set_parameters({"max-bandwidth": 0})
    assert migration.wait(20).status is Status.COMPLETED


def test_a_target_that_cannot_be_made_fails_in_qemu_s_words(disk: Path) -> None:
    migration = Migration([RamBlock("pc.ram", memory())])
    recorder = Recorder(migration)
    migration.set_capabilities({"mapped-ram": True})
    with pytest.raises(OSError, match="Could not create '/nonexistent/x': No such file"):
        migration.migrate(parse_uri("file:/nonexistent/x"))
    assert recorder.seen == ["setup", "failed"]
    info = migration.query()
    assert info.status is Status.FAILED
    assert info.error == "Could not create '/nonexistent/x': No such file or directory"
    assert migration.run_state is RunState.RUNNING
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    assert migration.wait(60).status is Status.COMPLETED
    assert migration.query().error == ""


def test_what_a_guest_raises_fails_the_migration_and_it_goes_on(disk: Path) -> None:
    class Broken(Guest):
        went_on = False

        def save_devices(self) -> Sequence[DeviceSection]:
            raise RuntimeError("the disk controller is on fire")

        def cont(self) -> None:
            self.went_on = True

    guest = Broken()
    migration = Migration([RamBlock("pc.ram", memory())], guest=guest)
    migration.set_capabilities({"mapped-ram": True})
    migration.migrate(parse_uri(f"file:{disk}/snap"))
    info = migration.wait(60)
    assert (info.status, info.error) == (Status.FAILED, "the disk controller is on fire")
    assert guest.went_on
    assert list(disk.iterdir()) == []


def fdset(path: Path, *flags: int) -> FdSets:
    path.touch()
    sets = FdSets()
    for flag in flags:
        sets.add(os.open(path, flag), 1)
    return sets


def test_two_descriptors_in_a_fdset_carry_a_direct_save(disk: Path) -> None:
    ram = memory()
    sets = fdset(disk / "snap", os.O_WRONLY, os.O_WRONLY | os.O_DIRECT)
    migration = Migration([RamBlock("pc.ram", ram)], fdsets=sets)
    migration.set_capabilities({"mapped-ram": True, "multifd": True})
    migration.set_parameters({"direct-io": True})
    migration.migrate(parse_uri("file:/dev/fdset/1,offset=0x1000"))
    assert migration.wait(60).status is Status.COMPLETED
    sets.remove(1)
    assert sets.query() == []
    assert loaded(disk / "snap", 0x1000) == ram[:]


def test_a_fdset_without_a_direct_member_is_refused_before_the_start(disk: Path) -> None:
    with fdset(disk / "snap", os.O_WRONLY) as sets:
        migration = Migration([RamBlock("pc.ram", memory())], fdsets=sets)
        recorder = Recorder(migration)
        migration.set_capabilities({"mapped-ram": True, "multifd": True})
        migration.set_parameters({"direct-io": True})
        with pytest.raises(FdsetError, match="O_DIRECT"):
            migration.migrate(parse_uri("file:/dev/fdset/1"))
        assert recorder.seen == []
        assert migration.query().status is Status.NONE


def test_where_qemu_would_crash_compat_fails_after_the_answer(disk: Path) -> None:
    with fdset(disk / "snap", os.O_WRONLY) as sets:
        migration = Migration(
            [RamBlock("pc.ram", memory())],
            fdsets=sets,
            policy=Policy.COMPAT,
            parameters=Parameters(),
        )
        migration.set_capabilities({"mapped-ram": True, "multifd": True})
        migration.set_parameters({"direct-io": True})
        migration.migrate(parse_uri("file:/dev/fdset/1"))
        ended = migration.wait(10)
        assert ended.status is Status.FAILED
        assert "matching flags=0x4001" in ended.error
        assert sets.query()[0].fds != ()


def test_rounds_of_migrations_leak_no_descriptor(disk: Path, same_descriptors: None) -> None:
    for _ in range(20):
        with fdset(disk / "snap", os.O_WRONLY, os.O_WRONLY | os.O_DIRECT) as sets:
            migration = Migration([RamBlock("pc.ram", memory(1 << 20))], fdsets=sets)
            migration.set_capabilities({"mapped-ram": True, "multifd": True})
            migration.set_parameters({"direct-io": True})
            migration.migrate(parse_uri("file:/dev/fdset/1"))
            migration.cancel()
            migration.wait(10)
            migration.close()
