"""Loads that are refused or fail, and what may be tried again afterwards.

A QEMU whose source could not be opened is of no use any more, so each case has a QEMU and a
compat server of its own; their accounts are compared. One strict server takes all refusals and
then loads.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import RamBlock
from pyqmigrate.migration import Migration
from pyqmigrate.qapi.status import RunState, Status
from tests.harness.compare_memory import assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.serve import Driver, Serve, Witness
from tests.harness.serve_refusals import (
    DSYNC,
    MULTIFD,
    OLD,
    PLAIN,
    RW,
    SET_1,
    SYNC,
    D,
    R,
    Refused,
    W,
    add,
    take_back,
)

pytestmark = pytest.mark.qemu

RAM = 16 << 20
MAPPED = {"mapped-ram": True, "multifd": False}

NO_MATCH = "Failed to find file descriptor with matching flags=0x0"
NO_DIRECT = "Failed to find file descriptor with matching flags=0x4000"
NO_DUP = "Failed to dup() given file descriptor fd="
NO_PARSE = "Could not parse fdset /dev/fdset/"
ADD_PLAIN = re.escape("no plain (not O_DIRECT) member for a load; add open(file, O_RDONLY)")
ADD_DIRECT = re.escape("no O_DIRECT member for a load; add open(file, O_RDONLY|O_DIRECT)")
EXACT = re.escape("O_RDWR; access modes must match exactly: open with open(file, O_RDONLY)")
TWICE = r"dup\(\)s of one open .* open the file twice: .*O_RDONLY\), and .*O_RDONLY\|O_DIRECT\)"
NO_SYNC = "open without O_SYNC and O_DSYNC"

REFUSED = [
    Refused("write-only", (W,), NO_MATCH, ADD_PLAIN),
    Refused("read-write", (RW,), NO_MATCH, EXACT),
    Refused("only-direct-member", (R | D,), NO_MATCH, ADD_PLAIN, direct=True),
    Refused("no-direct-member", (R,), NO_DIRECT, ADD_DIRECT, direct=True),
    Refused("direct-member-of-other-mode", (R, W | D), NO_DIRECT, ADD_DIRECT, direct=True),
    Refused("dup-pair", (R,), NO_MATCH, TWICE, direct=True, dup=True),
    Refused("sync", (R | SYNC,), NO_DUP, NO_SYNC),
    Refused("dsync-direct", (R, R | D | DSYNC), NO_DUP, NO_SYNC, direct=True),
    Refused("missing-set", (), "Failed to find fdset /dev/fdset/1", "Failed to find fdset /dev"),
    Refused("trailing-text", (R,), NO_PARSE + "1x", NO_PARSE, uri="file:/dev/fdset/1x"),
    Refused(
        "missing-file",
        (),
        "Could not open '/nonexistent/x': No such file or directory",
        "Could not open '/nonexistent/x': No such file",
        uri="file:/nonexistent/x",
    ),
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as started:
        yield started


@pytest.fixture(scope="module")
def machine_type() -> str:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        return vm.machine_name()


@pytest.fixture(scope="module")
def contents() -> Iterator[GuestRam]:
    with GuestRam(RAM) as ram:
        fill(ram.memory, Contents.SPECKLED)
        yield ram


@pytest.fixture(scope="module")
def strict(driver: Driver) -> Iterator[Serve]:
    with GuestRam(RAM) as ram, Serve(driver, ram, incoming=True) as server:
        yield server


@contextlib.contextmanager
def waiting(driver: Driver) -> Iterator[tuple[Witness, Witness, GuestRam, GuestRam]]:
    """A QEMU and a compat server that wait, and their memories."""
    with (
        GuestRam(RAM) as theirs,
        GuestRam(RAM) as ours,
        Qemu(theirs, incoming=True) as vm,
        Serve(driver, ours, incoming=True, compat=True) as server,
    ):
        yield Witness(vm), Witness(server), theirs, ours


def save(path: Path, contents: GuestRam, machine: str, capabilities: dict[str, bool]) -> None:
    source = Migration(
        [RamBlock("pc.ram", contents.memory)], machine=machine, run_state=RunState.PAUSED
    )
    source.set_capabilities(capabilities)
    source.migrate(f"file:{path}")
    assert source.wait(30).status is Status.COMPLETED
    source.close()


def configure(end: Witness, capabilities: dict[str, bool], *, direct: bool = False) -> None:
    end.end.set_capabilities({"events": True, **capabilities})
    end.ask("migrate-set-parameters", {"multifd-channels": 2, "direct-io": direct})


def load(end: Witness, uri: str) -> dict[str, Any]:
    return end.ask("migrate-incoming", {"uri": uri, "exit-on-error": False})


def ask_for_refusal(end: Witness, case: Refused, path: Path) -> dict[str, Any]:
    path.write_bytes(OLD)
    configure(end, MULTIFD if case.direct else PLAIN, direct=case.direct)
    for flags in case.lent:
        add(end, path, flags, dup=case.dup)
    end.state()
    answer = load(end, case.uri)
    end.events()
    end.state()
    return answer


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_compat_refuses_a_load_in_qemu_s_words_and_can_not_try_again(
    driver: Driver, disk: Path, case: Refused
) -> None:
    with waiting(driver) as (qemu, compat, _, _):
        for end in (qemu, compat):
            answer = ask_for_refusal(end, case, disk / "state")
            assert answer["error"]["desc"].startswith(case.qemu)
            # Whatever is handed in now, it is too late; only what is wrong with the address is
            # still found first.
            add(end, disk / "state", R)
            add(end, disk / "state", R | D)
            load(end, SET_1)
            load(end, "file:x,offset=zz")
            end.ask("cont")
            end.state()
            take_back(end)
        assert compat.account == qemu.account
        again = "Illegal migration incoming state: setup"
        assert [a["error"]["desc"] for q, a in qemu.account if SET_1 in q][-1] == again
        assert ("events", ["setup"]) in qemu.account


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_strict_refuses_a_load_and_nothing_changes(
    strict: Serve, disk: Path, case: Refused
) -> None:
    end = Witness(strict)
    descriptors = strict.descriptors()
    answer = ask_for_refusal(end, case, disk / "state")
    end.hear("remove-fd", {"fdset-id": 1})
    assert answer["error"]["class"] == "GenericError"
    assert re.search(case.strict, answer["error"]["desc"])
    assert strict.execute("query-migrate").get("status", "none") == "none"
    assert strict.execute("query-status") == {"status": "inmigrate", "running": False}
    assert strict.execute("query-fdsets") == []
    assert strict.descriptors() == descriptors


def test_strict_refuses_a_set_of_different_files(strict: Serve, disk: Path) -> None:
    end = Witness(strict)
    configure(end, MULTIFD, direct=True)
    for name, flags in (("first", R), ("second", R | D)):
        (disk / name).write_bytes(OLD)
        add(end, disk / name, flags)
    answer = load(end, SET_1)
    take_back(end)
    assert "are different files; open one file for all members" in answer["error"]["desc"]
    assert strict.execute("query-migrate").get("status", "none") == "none"


def test_strict_loads_after_failed_opens(
    driver: Driver, disk: Path, contents: GuestRam, machine_type: str
) -> None:
    path = disk / "state"
    save(path, contents, machine_type, MULTIFD)
    with GuestRam(RAM) as ram, Serve(driver, ram, incoming=True) as server:
        end = Witness(server)
        configure(end, MULTIFD, direct=True)
        for uri in ("file:/nonexistent/x", "file:/dev/fdset/1", "file:x,offset=zz"):
            assert "error" in load(end, uri)
        add(end, path, R)
        assert "error" in load(end, "file:/dev/fdset/1")
        add(end, path, R | D)
        assert load(end, "file:/dev/fdset/1") == {"return": {}}
        assert server.wait() == {"status": "completed"}
        assert_same_memory(ram.memory, contents.memory)
        assert "already been started" in load(end, f"file:{path}")["error"]["desc"]


def test_compat_loads_after_errors_that_come_before_the_open_as_qemu_does(
    driver: Driver, disk: Path, contents: GuestRam, machine_type: str
) -> None:
    path = disk / "state"
    save(path, contents, machine_type, MULTIFD)
    with waiting(driver) as (qemu, compat, theirs, ours):
        for end, ram in ((qemu, theirs), (compat, ours)):
            configure(end, {"mapped-ram": False, "multifd": True})
            for uri in ("zz", "file:x,offset=zz", f"file:{path}", "exec:cat", "defer"):
                assert "error" in load(end, uri)
            end.ask("migrate-incoming", {})
            end.state()
            configure(end, MULTIFD, direct=True)
            add(end, path, R)
            add(end, path, R | D)
            assert load(end, "file:/dev/fdset/1") == {"return": {}}
            end.hear("remove-fd", {"fdset-id": 1})  # what is on loan is not disturbed
            end.settle()
            end.events()
            end.state()
            assert_same_memory(ram.memory, contents.memory)
            assert "error" in load(end, f"file:{path}")
            assert "error" in load(end, "zz")
            end.ask("cont")
            end.ask("query-status")
        assert compat.account == qemu.account
        assert ("query-migrate null", {"return": {"status": "completed"}}) in qemu.account


BROKEN = {
    "empty": (PLAIN, b""),
    "junk": (PLAIN, OLD),
    "empty-mapped": (MAPPED, b""),
    "junk-multifd": (MULTIFD, OLD),
}


def fail_to_load(end: Witness, path: Path, capabilities: dict[str, bool]) -> None:
    configure(end, capabilities)
    end.ask("migrate-incoming", {"uri": f"file:{path}", "exit-on-error": False})
    while end.end.execute("query-migrate")["status"] in ("setup", "active"):
        pass
    end.events()
    end.state()
    load(end, f"file:{path}")
    end.ask("cont")
    end.state()


@pytest.mark.parametrize("kind", BROKEN)
def test_compat_fails_a_load_in_qemu_s_words(driver: Driver, disk: Path, kind: str) -> None:
    capabilities, content = BROKEN[kind]
    path = disk / "state"
    path.write_bytes(content)
    with waiting(driver) as (qemu, compat, _, _):
        for end in (qemu, compat):
            fail_to_load(end, path, capabilities)
        assert compat.account == qemu.account
        assert ("events", ["setup", "active", "failed"]) in qemu.account


@pytest.mark.parametrize("kept", [100, 1 << 20, 6 << 20])
@pytest.mark.parametrize("saved", [PLAIN, MAPPED], ids=["plain", "mapped-ram"])
def test_compat_fails_a_load_of_a_file_that_was_cut_in_qemu_s_words(
    driver: Driver,
    disk: Path,
    contents: GuestRam,
    machine_type: str,
    saved: dict[str, bool],
    kept: int,
) -> None:
    path = disk / "state"
    save(path, contents, machine_type, saved)
    os.truncate(path, kept)
    with waiting(driver) as (qemu, compat, _, _):
        for end in (qemu, compat):
            fail_to_load(end, path, saved)
        assert compat.account == qemu.account


@pytest.mark.parametrize("saved", [PLAIN, MAPPED], ids=["plain", "mapped-ram"])
def test_compat_fails_a_load_with_the_wrong_mapped_ram_in_qemu_s_words(
    driver: Driver, disk: Path, contents: GuestRam, machine_type: str, saved: dict[str, bool]
) -> None:
    path = disk / "state"
    save(path, contents, machine_type, saved)
    with waiting(driver) as (qemu, compat, _, _):
        for end in (qemu, compat):
            fail_to_load(end, path, PLAIN if saved is MAPPED else MAPPED)
        assert compat.account == qemu.account


@pytest.mark.parametrize("kind", BROKEN)
def test_strict_fails_a_load_with_the_reason(driver: Driver, disk: Path, kind: str) -> None:
    capabilities, content = BROKEN[kind]
    path = disk / "state"
    path.write_bytes(content)
    with GuestRam(RAM) as ram, Serve(driver, ram, incoming=True) as server:
        end = Witness(server)
        fail_to_load(end, path, capabilities)
        result = server.execute("query-migrate")
        assert result["status"] == "failed"
        assert result["error-desc"].startswith("load of migration failed: ")
        assert len(result["error-desc"]) > len("load of migration failed: Invalid argument")
        assert server.execute("query-status")["status"] == "inmigrate"


def test_a_failed_load_ends_the_process_unless_it_is_asked_not_to(
    driver: Driver, disk: Path
) -> None:
    """The status is our own: this program's table of exit codes has 4 for it, QEMU says 1."""
    path = disk / "state"
    path.write_bytes(OLD)
    with waiting(driver) as (qemu, compat, _, _):
        for end in (qemu, compat):
            with contextlib.suppress(ConnectionError, AssertionError):
                end.end.execute("migrate-incoming", {"uri": f"file:{path}"})
        assert isinstance(qemu.end, Qemu)
        assert qemu.end.process.wait(20) == 1
        assert compat.end.process.wait(20) == 4


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_compat_loads_from_different_files_as_qemu_does(
    driver: Driver, disk: Path, contents: GuestRam, machine_type: str, direct: bool
) -> None:
    """The newest member that serves is taken, whichever file it is of."""
    first, second = disk / "first", disk / "second"
    save(first, contents, machine_type, MULTIFD)
    with GuestRam(RAM) as other:
        fill(other.memory, Contents.SPECKLED, seed=5)
        save(second, other, machine_type, MULTIFD)
        with waiting(driver) as (qemu, compat, theirs, ours):
            for end in (qemu, compat):
                configure(end, MULTIFD, direct=direct)
                add(end, first, R)
                add(end, second, R | D if direct else R)
                assert load(end, "file:/dev/fdset/1") == {"return": {}}
                end.settle()
                end.events()
                end.state()
                take_back(end)
            assert compat.account == qemu.account
            assert_same_memory(ours.memory, theirs.memory)
            if not direct:
                assert_same_memory(ours.memory, other.memory)


def test_two_loads_through_one_descriptor_need_a_rewind(
    driver: Driver, disk: Path, contents: GuestRam, machine_type: str
) -> None:
    """In compat a stream without offset begins where the descriptor stands, as in QEMU."""
    path = disk / "state"
    save(path, contents, machine_type, MAPPED)
    fd = os.open(path, R)
    os.lseek(fd, 4096, os.SEEK_SET)
    try:
        with waiting(driver) as (qemu, compat, _, _):
            for end in (qemu, compat):
                configure(end, MAPPED)
                end.ask("add-fd", {"fdset-id": 1}, fd=fd)
                load(end, "file:/dev/fdset/1")
                while end.end.execute("query-migrate")["status"] in ("setup", "active"):
                    pass
                end.events()
                end.state()
                os.lseek(fd, 4096, os.SEEK_SET)
            assert compat.account == qemu.account
        with GuestRam(RAM) as ram, Serve(driver, ram, incoming=True) as strict:
            asked = Witness(strict)
            configure(asked, MAPPED)
            asked.ask("add-fd", {"fdset-id": 1}, fd=fd)
            answer = load(asked, "file:/dev/fdset/1")
            assert "rewind it (lseek to 0), or give offset=0x1000" in answer["error"]["desc"]
            os.lseek(fd, 0, os.SEEK_SET)
            assert load(asked, "file:/dev/fdset/1") == {"return": {}}
            assert strict.wait() == {"status": "completed"}
            assert_same_memory(ram.memory, contents.memory)
    finally:
        os.close(fd)
