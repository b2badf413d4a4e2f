"""What goes wrong, or is asked for, while a save runs; what survives a client, and a full disk.

The same request lists go to a running QEMU and to a compat server, and the accounts are compared.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.qmp.client import QmpClient
from tests.harness.compare_memory import assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.file_systems import why_not
from tests.harness.machine import GuestRam, Qemu, QemuDied
from tests.harness.serve import Serve, Witness
from tests.harness.serve_refusals import (
    MULTIFD,
    PLAIN,
    RAM,
    SET_1,
    D,
    Ends,
    W,
    add,
    configure,
    ends,
    run_on,
    saved_ram,
    take_back,
)

__all__ = ["ends"]

pytestmark = pytest.mark.qemu

SLOW = 4 << 20
MAPPED = {"mapped-ram": True, "multifd": False}


def both(ends: Ends) -> list[Witness]:
    return [Witness(ends.qemu), Witness(ends.compat)]


def begin_slowly(end: Witness, uri: str) -> None:
    """A save of a stopped guest that takes seconds, unless it is sped up."""
    end.events()
    end.ask("stop")
    end.ask("migrate-set-parameters", {"max-bandwidth": SLOW})
    assert end.ask("migrate", {"uri": uri}) == {"return": {}}
    while end.end.execute("query-migrate")["status"] == "setup":
        pass


def speed_up(end: Witness) -> None:
    end.ask("migrate-set-parameters", {"max-bandwidth": 0})
    end.settle()
    end.events()
    end.state()


def assert_saved(ends: Ends, end: Witness, path: Path, offset: int = 0) -> None:
    assert_same_memory(saved_ram(path, offset), ends.ram(end.end).memory)


# ---- remove-fd during a save ----------------------------------------------------------------


def remove_during_save(end: Witness, path: Path) -> None:
    configure(end, MULTIFD, direct=True)
    add(end, path, W)
    add(end, path, W | D)
    begin_slowly(end, SET_1)
    end.state()
    member = end.end.execute("query-fdsets")[0]["fds"][0]["fd"]
    end.ask("remove-fd", {"fdset-id": 1})
    end.ask("query-fdsets")
    end.ask("remove-fd", {"fdset-id": 1})
    assert "error" in end.hear("remove-fd", {"fdset-id": 1, "fd": member})
    end.ask("remove-fd", {"fdset-id": 1, "fd": 999})
    # A set that only loans keep alive can be filled again, and is then a set like any other.
    add(end, path, W)
    end.ask("query-fdsets")
    end.ask("remove-fd", {"fdset-id": 1})
    end.ask("query-fdsets")
    speed_up(end)
    end.ask("remove-fd", {"fdset-id": 1})


def test_removing_the_members_of_a_set_does_not_disturb_the_save(ends: Ends, disk: Path) -> None:
    qemu, compat = both(ends)
    for name, end in (("qemu", qemu), ("compat", compat)):
        remove_during_save(end, disk / name)
        assert_saved(ends, end, disk / name, 4096)
        run_on(end)
    assert compat.account == qemu.account
    emptied = ("query-fdsets null", {"return": [{"fds": [], "fdset-id": 1}]})
    assert compat.account.count(emptied) == 2
    assert ends.compat.execute("query-fdsets") == []


def test_strict_lets_members_go_during_a_save(ends: Ends, disk: Path) -> None:
    strict = Witness(ends.strict)
    remove_during_save(strict, disk / "state")
    assert_saved(ends, strict, disk / "state", 4096)
    run_on(strict)
    assert ends.strict.execute("query-fdsets") == []


# ---- what survives a client -----------------------------------------------------------------


def reconnect(end: Qemu | Serve) -> None:
    if isinstance(end, Serve):
        end.disconnect()
        return
    heard = end.qmp.events
    end.qmp.close()
    end.qmp = QmpClient.connect(end.socket)
    end.qmp.events = heard


def lose_client(end: Witness, path: Path) -> None:
    configure(end, MAPPED)
    add(end, path, W)
    add(end, path, W, fdset=7)
    end.ask("query-fdsets")
    reconnect(end.end)
    end.ask("query-fdsets")
    end.ask("stop")
    reconnect(end.end)
    end.ask("query-fdsets")
    end.ask("remove-fd", {"fdset-id": 7})
    end.ask("migrate", {"uri": SET_1})
    end.settle()
    end.state()
    take_back(end)
    run_on(end)


def test_sets_outlive_the_client_that_made_them(ends: Ends, disk: Path) -> None:
    witnesses = [*both(ends), Witness(ends.strict)]
    for number, end in enumerate(witnesses):
        lose_client(end, disk / str(number))
    qemu, compat, strict = (end.account for end in witnesses)
    assert compat == qemu
    # Nothing here is refused by strict: the same answers but for what was done before.
    assert strict == qemu
    sets = [reply for request, reply in qemu if request == "query-fdsets null"]
    assert [len(reply["return"]) for reply in sets[:3]] == [2, 2, 2]


def links(end: Qemu | Serve, path: Path) -> int:
    """How many descriptors of the process are of this file."""
    found = 0
    for entry in Path(f"/proc/{end.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += entry.readlink() == path
    return found


def leave_over(end: Witness, path: Path, other: Path) -> int:
    """A descriptor that an error left pending goes to the next command that takes one."""
    path.touch()
    other.touch()
    for arguments in ({"fdset_id": 1}, {"fdset-id": "1"}, {"fdset-id": 1.5}, {"opaque": 1}):
        with path.open("wb") as file:
            end.ask("add-fd", arguments, fd=file.fileno())
    end.ask("add-fd", {"fdset-id": 1})  # brings none, and gets the last of those four
    end.ask("query-fdsets")
    end.ask("add-fd", {"fdset-id": 1})
    with other.open("wb") as file:
        end.ask("add-fd", {"fdset-id": -1}, fd=file.fileno())  # taken, and closed
    end.ask("add-fd", {"fdset-id": 1})
    left = links(end.end, path)
    end.account.append(("left", left))
    end.account.append(("other left", links(end.end, other)))
    take_back(end)
    end.account.append(("removed", links(end.end, path)))
    with path.open("wb") as file:
        end.ask("add-fd", {"fdset_id": 1}, fd=file.fileno())
    reconnect(end.end)
    end.ask("add-fd", {"fdset-id": 1})
    end.account.append(("after hanging up", links(end.end, path)))
    return left


def test_a_descriptor_left_over_by_an_error_goes_to_the_next_command(
    ends: Ends, disk: Path
) -> None:
    witnesses = [*both(ends), Witness(ends.strict)]
    path, other = (disk / name for name in ("left", "taken"))
    assert [leave_over(end, path, other) for end in witnesses] == [1, 1, 1]
    qemu, compat, strict = (end.account for end in witnesses)
    assert compat == qemu
    assert strict == qemu
    assert ("after hanging up", 0) in qemu


# ---- parameters and capabilities in flight --------------------------------------------------

# Raising multifd-channels is not among them: QEMU 10.0.2 dies of it.
HARMLESS: list[dict[str, Any]] = [
    {"multifd-channels": 1},
    {"direct-io": True},
    {"zero-page-detection": "none"},
    {"multifd-zlib-level": 3},
    {"downtime-limit": 200},
    {"max-bandwidth": SLOW + 1},
    {"multifd-channels": 0},
    {"direct-io": "on"},
    {"multifd-channels": 1, "max-bandwidth": -2},
    {"zero-page-detection": "legacy", "downtime-limit": 2000001},
    {"max-bandwidth": SLOW},
]
RESTORED = {"zero-page-detection": "multifd", "multifd-zlib-level": 1, "downtime-limit": 300}


def change_in_flight(end: Witness, path: Path) -> None:
    configure(end, MULTIFD)
    begin_slowly(end, f"file:{path}")
    for change in HARMLESS:
        end.ask("migrate-set-parameters", change)
    end.ask("query-migrate-parameters")
    for entries in ([], [{"capability": "events", "state": True}]):
        end.ask("migrate-set-capabilities", {"capabilities": entries})
    end.ask("migrate", {"uri": f"file:{path}"})
    end.ask("migrate-continue", {"state": "pre-switchover"})
    end.ask("query-status")
    speed_up(end)
    end.ask("migrate-set-parameters", {**RESTORED, "direct-io": False})


def test_compat_takes_changes_in_flight_as_qemu_does(ends: Ends, disk: Path) -> None:
    path = disk / "state"
    compat = Witness(ends.compat)
    change_in_flight(compat, path)
    assert_saved(ends, compat, path)
    run_on(compat)
    # A QEMU whose channels were lowered forgets to end one, and hangs in a later save.
    with GuestRam(RAM) as ram:
        fill(ram.memory, Contents.SPECKLED)
        with Qemu(ram, run=True) as vm:
            qemu = Witness(vm)
            change_in_flight(qemu, path)
            assert_same_memory(saved_ram(path), ram.memory)
            run_on(qemu)
    assert compat.account == qemu.account


def compress_in_flight(end: Witness, path: Path) -> None:
    """The conflict with mapped-ram is judged by what was in force before: accepted once."""
    configure(end, MAPPED)
    begin_slowly(end, f"file:{path}")
    for change in (
        {"multifd-compression": "zlib"},
        {"multifd-compression": "none"},
        {"max-bandwidth": 0},
    ):
        end.ask("migrate-set-parameters", change)
    end.ask("migrate_cancel")
    end.settle()
    end.events()
    end.state()
    end.ask("migrate", {"uri": f"file:{path}"})
    end.ask("query-migrate")
    end.end.set_capabilities({"mapped-ram": False})
    end.ask("migrate-set-parameters", {"multifd-compression": "none"})
    run_on(end)


def test_compat_takes_compression_in_flight_once_as_qemu_does(ends: Ends, disk: Path) -> None:
    qemu, compat = both(ends)
    for end in (qemu, compat):
        compress_in_flight(end, disk / "state")
    assert compat.account == qemu.account


def test_compat_lives_when_more_channels_are_asked_for_in_flight(ends: Ends, disk: Path) -> None:
    """QEMU 10.0.2 dies of it, so there is nothing to compare."""
    compat = Witness(ends.compat)
    configure(compat, MULTIFD)
    begin_slowly(compat, f"file:{disk / 'state'}")
    compat.ask("migrate-set-parameters", {"multifd-channels": 7})
    speed_up(compat)
    result = ends.compat.execute("query-migrate")["status"]
    assert result in ("completed", "failed")
    if result == "completed":
        assert_saved(ends, compat, disk / "state")
    run_on(compat)


FIXED = "'{}' cannot change while a migration is running; set it before, or migrate_cancel first"
NO_COMPRESSION = "leave multifd-compression none and tls-creds empty, or switch mapped-ram off"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"multifd-channels": 7}, FIXED),
        ({"multifd-channels": 1}, FIXED),
        ({"direct-io": True}, FIXED),
        ({"zero-page-detection": "none"}, FIXED),
        ({"direct-io": True, "max-bandwidth": 5}, FIXED),
        ({"mode": "cpr-reboot"}, FIXED),
        ({"multifd-compression": "zlib"}, NO_COMPRESSION),
        ({"tls-creds": "t"}, NO_COMPRESSION),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_strict_refuses_in_flight_what_cannot_have_effect(
    ends: Ends, disk: Path, change: dict[str, Any], text: str
) -> None:
    strict, name = Witness(ends.strict), next(iter(change))
    configure(strict, MULTIFD)
    begin_slowly(strict, f"file:{disk / 'state'}")
    before = ends.strict.execute("query-migrate-parameters")
    answer = strict.ask("migrate-set-parameters", change)
    assert answer["error"]["class"] == "GenericError"
    assert text.format(name) in answer["error"]["desc"]
    assert ends.strict.execute("query-migrate-parameters") == before
    assert ends.strict.execute("query-migrate")["status"] == "active"
    speed_up(strict)
    assert ends.strict.execute("query-migrate")["status"] == "completed"
    assert_saved(ends, strict, disk / "state")
    run_on(strict)


# ---- a full disk ----------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, mounted for another process and reached through its root."""
    if reason := why_not():
        pytest.skip(reason)
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    script = 'mount -t tmpfs -o size=8m none "$1"; echo mounted; exec cat'
    with subprocess.Popen(
        [*unshare, "sh", "-ec", script, "sh", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mounted\n"
        yield Path(f"/proc/{holder.pid}/root{tmp_path}")
        assert holder.stdin is not None
        holder.stdin.close()


SPACELESS = {
    "plain": (PLAIN, False),
    "mapped-ram": (MAPPED, False),
    "multifd": (MULTIFD, False),
    "direct": (MULTIFD, True),
}


@dataclass(frozen=True)
class Way:
    """How the full disk is named; ``kept``: whether our part of the file stays."""

    name: str
    uri: str
    kept: bool

    def __str__(self) -> str:
        return self.name


# A file that begins at an offset, or is lent, is written in place: what was there is gone, as
# with QEMU. A file of our own making appears when it is whole, or not at all.
WAYS = [
    Way("path", "file:{file}", False),
    Way("offset", "file:{file},offset=4096", True),
    Way("fdset", SET_1, True),
]


def fill_disk(end: Witness, full: Path, disk: Path, kind: str, way: Way) -> bool:
    """Saves where there is no room, then elsewhere; whether something was left."""
    capabilities, direct = SPACELESS[kind]
    configure(end, capabilities, direct=direct)
    path = full / "state"
    if way.uri == SET_1:
        add(end, path, W)
        if direct:
            add(end, path, W | D)
    end.ask("stop")
    end.events()
    assert end.ask("migrate", {"uri": way.uri.format(file=path)}) == {"return": {}}
    end.settle()
    end.events()
    end.state()
    take_back(end)
    end.account.append(("descriptors", links(end.end, path)))
    kept = path.exists()
    path.unlink(missing_ok=True)
    time.sleep(0.1 if isinstance(end.end, Qemu) else 0)
    end.ask("migrate", {"uri": f"file:{disk / 'elsewhere'}"})
    end.settle()
    end.state()
    run_on(end)
    return kept


def ask_qemu(full: Path, disk: Path, kind: str, way: Way) -> Iterator[list[tuple[str, Any]]]:
    """What QEMU makes of it, each time in a process of its own.

    It calls a save failed before its channels have ended: when it lets go of what they had is not
    the same every time, and a save that is begun too soon afterwards hangs, or kills it.
    """
    answers = 0
    for _ in range(4):
        with GuestRam(RAM) as ram, contextlib.suppress(QemuDied):
            fill(ram.memory, Contents.SPECKLED)
            with Qemu(ram, run=True) as vm:
                witness = Witness(vm)
                assert fill_disk(witness, full, disk, kind, way), "QEMU removed the file"
                answers += 1
                yield witness.account
    assert answers, "QEMU died four times"


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way.name == "fdset" else [pytest.mark.long]) for way in WAYS],
    ids=[str(way) for way in WAYS],
)
@pytest.mark.parametrize("kind", SPACELESS)
def test_compat_fails_on_a_full_disk_as_qemu_does(
    ends: Ends, full_disk: Path, disk: Path, kind: str, way: Way
) -> None:
    compat = Witness(ends.compat)
    kept = fill_disk(compat, full_disk, disk, kind, way)
    for account in ask_qemu(full_disk, disk, kind, way):
        if account == compat.account:
            break
    else:
        assert compat.account == account
    failure = {"status": "failed", "error-desc": "Unable to write to file: No space left on device"}
    assert ("query-migrate null", {"return": failure}) in compat.account
    assert kept == way.kept


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way.name == "fdset" else [pytest.mark.long]) for way in WAYS],
    ids=[str(way) for way in WAYS],
)
@pytest.mark.parametrize("kind", SPACELESS)
def test_strict_fails_on_a_full_disk_with_the_space_it_needs_and_the_guest_runs_on(
    ends: Ends, full_disk: Path, disk: Path, kind: str, way: Way
) -> None:
    strict, path = Witness(ends.strict), full_disk / "state"
    capabilities, direct = SPACELESS[kind]
    configure(strict, capabilities, direct=direct)
    if way.uri == SET_1:
        for flags in (W, W | D) if direct else (W,):
            add(strict, path, flags)
    assert strict.ask("migrate", {"uri": way.uri.format(file=path)}) == {"return": {}}
    strict.settle()
    result = ends.strict.execute("query-migrate")
    assert result["status"] == "failed"
    assert re.search(r"need\w* 2\d MiB and \d MiB are free: No space left", result["error-desc"])
    assert ends.strict.execute("query-status") == {"status": "running", "running": True}
    take_back(strict)
    assert path.exists() == way.kept
    assert links(ends.strict, path) == 0
    strict.ask("migrate", {"uri": f"file:{disk / 'elsewhere'}"})
    assert ends.strict.wait()["status"] == "completed"
    run_on(strict)


@pytest.mark.parametrize("policy", ["compat", "strict"])
def test_a_path_through_the_root_of_another_process_is_written_where_it_leads(
    ends: Ends, full_disk: Path, tmp_path: Path, policy: str
) -> None:
    """/proc/PID/root is a link whose text is ``/``, but it leads to that process's own root."""
    end = Witness(ends.compat if policy == "compat" else ends.strict)
    configure(end, MAPPED)
    ram = ends.ram(end.end).memory
    before = bytes(ram[: 28 << 20])
    ram[: 28 << 20] = bytes(28 << 20)  # what is left fits
    try:
        end.ask("migrate", {"uri": f"file:{full_disk / 'state'}"})
        assert end.end.wait()["status"] == "completed"
        assert (full_disk / "state").exists()
        assert list(tmp_path.iterdir()) == []
        assert_saved(ends, end, full_disk / "state")
    finally:
        ram[: 28 << 20] = before
        run_on(end)
