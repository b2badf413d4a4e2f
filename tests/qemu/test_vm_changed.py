"""Increments, and whole snapshots, of guests that were restored instantly: by their changed pages."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import convert, open_snapshot, verify_seal
from pyqmigrate.errors import (
    Cancelled,
    NoSpace,
    NotSupported,
    PyqmigrateError,
    QemuError,
    SnapshotError,
    UsageError,
)
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.page_digests import PageDigests
from pyqmigrate.io.page_table_file import page_table_path, write_page_table
from pyqmigrate.vm import sync
from pyqmigrate.vm.outgoing import changed as changed_method
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.twin import twin
from tests.harness.as_found import AsFound
from tests.harness.covering import covering
from tests.harness.saving import ROOT
from tests.harness.writing_guest import (
    PAGE,
    GuestSetup,
    WritingGuest,
    check_snapshot,
    restore,
    start,
)

pytestmark = pytest.mark.qemu

MIB = 1 << 20
RATE = 30e6
SETUP = GuestSetup(working_set=8 * MIB, filled=24 * MIB)


@pytest.fixture
def guest(disk: Path) -> Iterator[WritingGuest]:
    with start(SETUP, disk, memory="instant", rate=RATE) as guest:
        guest.wait_for_writes(500)
        yield guest


def save(guest: WritingGuest, path: Path, **options: Any) -> VmSaveReport:
    return sync.connect(guest.socket).save(path, **options)


def contents(path: Path) -> dict[str, bytes]:
    with open_snapshot(path) as snapshot:
        return {name: block.read(0, block.length) for name, block in snapshot.blocks.items()}


def devices(path: Path) -> list[tuple[str, int]]:
    with open_snapshot(path) as snapshot:
        return [(s.name, s.instance_id) for s in snapshot.stream.sections]


def assert_restores(setup: GuestSetup, path: Path, disk: Path) -> None:
    """The snapshot, converted, restores both ways, and its guest goes on."""
    whole = disk / "whole.mapped"
    convert(path, whole, to="mapped-ram")
    for mode in ("instant", "load"):
        with restore(setup, whole, disk, mode=mode, paused=False) as restored:
            restored.wait_for_writes(setup.working_pages)
            restored.assert_memory_held()
    whole.unlink()


@pytest.mark.parametrize("machine", covering(["pc", "q35", "microvm"], short=["q35", "microvm"]))
def test_increment_holds_one_instant_and_its_guest_goes_on(machine: str, disk: Path) -> None:
    setup = replace(SETUP, machine=machine)
    with start(setup, disk, memory="instant", rate=RATE) as guest:
        guest.wait_for_writes(500)
        found = AsFound(guest, disk)
        before = guest.position()
        report = save(guest, disk / "monday", base="auto", seal="xxh3-128")
        assert before <= check_snapshot(disk / "monday", setup) <= guest.position()
        found.check(files=["monday", "monday.seal", "monday.vm.json"])
        assert (report.method, report.engine, report.base) == (
            "changed",
            "direct",
            str(disk / "base.mapped"),
        )
        assert report.changed_pages is not None
        assert report.file_size > 1 * MIB
        assert report.bytes_allocated <= report.changed_pages * PAGE * 1.05 + 2 * MIB
        assert verify_seal(disk / "monday").intact
        with open_snapshot(disk / "monday") as snapshot:
            snapshot.verify()
            assert snapshot.format == "increment"
    assert_restores(setup, disk / "monday", disk)


def test_increment_names_a_base_beside_it_by_its_name_alone(
    guest: WritingGuest, disk: Path
) -> None:
    save(guest, disk / "monday", base="auto")
    (disk / "below").mkdir()
    save(guest, disk / "below" / "tuesday", base=disk / "base.mapped")
    with open_snapshot(disk / "monday") as monday:
        assert monday.header.base_path == "base.mapped"
    with open_snapshot(disk / "below" / "tuesday") as tuesday:
        assert tuesday.header.base_path == str(disk / "base.mapped")


def series(guest: WritingGuest, disk: Path, count: int) -> None:
    """Take increments one after the other, and a full save at the same stop as each."""
    rng = random.Random(count)
    for number in range(count):
        guest.wait_for_writes(rng.randrange(200, 1500))
        guest.execute("stop")
        save(guest, disk / "full", engine="direct")
        report = save(guest, disk / f"inc{number}", base="auto", seal="xxh3-128")
        assert report.run_state_after == "paused"
        assert contents(disk / f"inc{number}") == contents(disk / "full")
        assert devices(disk / f"inc{number}") == devices(disk / "full")
        if number % 5 == 0:
            convert(disk / f"inc{number}", disk / "flat", to="mapped-ram")
            assert contents(disk / "flat") == contents(disk / "full")
        guest.execute("cont")
    guest.wait_for_writes(500)
    guest.assert_memory_held()


def test_increments_equal_full_saves_of_the_same_stop(guest: WritingGuest, disk: Path) -> None:
    series(guest, disk, 2)
    assert_restores(SETUP, disk / "inc1", disk)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_fifty_increments_equal_full_saves_of_the_same_stop(
    guest: WritingGuest, disk: Path
) -> None:
    series(guest, disk, 50)


def test_generations_are_each_the_base_of_the_next(disk: Path) -> None:
    generations(disk, 2)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_fifty_generations_are_each_the_base_of_the_next(disk: Path) -> None:
    generations(disk, 50)


def generations(disk: Path, count: int) -> None:
    """Restore, let the guest write, save an increment, flatten it, and restore from that."""
    with start(SETUP, disk, memory="instant", rate=RATE) as guest:
        guest.wait_for_writes(500)
        save(guest, disk / "inc", base="auto")
    for number in range(count):
        base = disk / f"base{number}"
        convert(disk / "inc", base, to="mapped-ram")
        (disk / "inc").unlink()
        with restore(SETUP, base, disk, mode="instant", paused=False) as guest:
            guest.set_rate(RATE)
            guest.wait_for_writes(600)
            guest.execute("stop")
            save(guest, disk / "full", engine="direct")
            save(guest, disk / "inc", base="auto")
            assert contents(disk / "inc") == contents(disk / "full")
            guest.assert_memory_held()
        if number:
            (disk / f"base{number - 1}").unlink()


def test_page_that_became_zero_is_a_hole_with_its_bit_set(guest: WritingGuest, disk: Path) -> None:
    guest.execute("stop")
    page = SETUP.first_page + SETUP.working_pages + 100  # filled once, long ago
    guest.write_ram(page * PAGE, bytes(PAGE))
    report = save(guest, disk / "monday", base="auto")
    with open_snapshot(disk / "monday") as snapshot:
        block = snapshot.blocks[SETUP.block]
        assert block.bitmap[page]
        assert block.read(page * PAGE, PAGE) == bytes(PAGE)
    assert report.bytes_allocated <= report.changed_pages * PAGE
    with open_snapshot(disk / "base.mapped") as base:
        assert base.blocks[SETUP.block].read(page * PAGE, PAGE) != bytes(PAGE)


def test_whole_snapshot_without_a_base_in_the_request(guest: WritingGuest, disk: Path) -> None:
    before = guest.position()
    report = save(guest, disk / "whole", live="changed", seal="xxh3-128")
    assert (report.method, report.base, report.changed_pages) == ("changed", None, None)
    assert before <= check_snapshot(disk / "whole", SETUP) <= guest.position()
    assert verify_seal(disk / "whole").intact
    assert_restores(SETUP, disk / "whole", disk)


def test_deleted_base_still_gives_a_whole_snapshot_and_no_increment(
    guest: WritingGuest, disk: Path
) -> None:
    (disk / "base.mapped").unlink()
    found = AsFound(guest, disk)
    with pytest.raises(NotSupported, match=r"was deleted, moved or replaced.*--method changed"):
        save(guest, disk / "monday", base="auto")
    found.check()
    save(guest, disk / "whole", live="changed")
    check_snapshot(disk / "whole", SETUP)


def test_another_file_is_not_taken_for_the_base(guest: WritingGuest, disk: Path) -> None:
    other = disk / "other"
    other.write_bytes((disk / "base.mapped").read_bytes())
    found = AsFound(guest, disk)
    with pytest.raises(NotSupported, match="another file"):
        save(guest, disk / "monday", base=other)
    other.replace(disk / "base.mapped")
    with pytest.raises(NotSupported, match="was deleted, moved or replaced"):
        save(guest, disk / "monday", base="auto")
    found.check()


def test_increment_does_not_replace_its_base(guest: WritingGuest, disk: Path) -> None:
    found = AsFound(guest, disk)
    (disk / "link").symlink_to("base.mapped")
    for name in ("base.mapped", "link"):
        with pytest.raises(UsageError, match="is the base of the increment"):
            save(guest, disk / name, base="auto")
    found.check(files=["link"])
    guest.wait_for_writes(100)


@pytest.mark.parametrize("how", ["replaced", "removed", "changed"])
def test_base_that_is_replaced_during_the_save_fails_it(
    guest: WritingGuest, disk: Path, how: str
) -> None:
    base = disk / "base.mapped"
    aside = disk / "aside"
    aside.write_bytes(base.read_bytes())
    found = AsFound(guest, disk)

    def interfere(_: object) -> None:
        if how == "replaced" and aside.exists():
            aside.replace(base)
        elif how == "removed":
            base.unlink(missing_ok=True)
        else:
            os.utime(base)

    with pytest.raises(SnapshotError, match=r"the base .* during the save"):
        save(guest, disk / "monday", base="auto", progress=interfere)
    found.check()


def test_guest_that_was_not_restored_instantly_has_no_base(disk: Path) -> None:
    with start(SETUP, disk, rate=RATE) as guest:
        found = AsFound(guest, disk)
        with pytest.raises(NotSupported, match="not restored with mode instant"):
            save(guest, disk / "monday", base="auto")
        found.check()


def test_twin_has_started_when_the_guest_is_stopped(
    guest: WritingGuest, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    launch, stop = twin.launch, SaveTransaction.stop

    async def launched(*args: Any, **options: Any) -> Any:
        started = await launch(*args, **options)
        order.append("twin")
        return started

    async def stopped(self: SaveTransaction) -> None:
        order.append("stop")
        await stop(self)

    monkeypatch.setattr(twin, "launch", launched)
    monkeypatch.setattr(SaveTransaction, "stop", stopped)
    save(guest, disk / "inc", base="auto")
    assert order == ["twin", "stop"]
    with open_snapshot(disk / "inc") as snapshot:
        assert snapshot.stream.description_offset is not None


def test_pause_that_cannot_be_kept_is_not_begun(guest: WritingGuest, disk: Path) -> None:
    found = AsFound(guest, disk)
    with pytest.raises(PyqmigrateError, match="are allowed"):
        save(guest, disk / "monday", base="auto", max_pause=0.001)
    found.check()


def test_pause_that_becomes_too_long_is_ended_at_once(
    guest: WritingGuest, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = AsFound(guest, disk)
    original = changed_method.save_device_sections

    async def slow(*arguments: Any) -> None:
        await original(*arguments)
        time.sleep(0.5)

    monkeypatch.setattr(changed_method, "save_device_sections", slow)
    with pytest.raises(QemuError, match="let go"):
        save(guest, disk / "monday", live="changed", base="auto", max_pause=0.4)
    found.check()


@pytest.mark.parametrize("memory", covering(["memfd", "private"], short=["private"]))
def test_increment_by_digests_of_a_guest_that_was_not_restored(disk: Path, memory: str) -> None:
    base = disk / "base"
    with start(SETUP, disk, memory=memory, rate=RATE) as guest:
        save(guest, base, engine="direct")
        keep_digests(base)
        guest.wait_for_writes(700)
        found = AsFound(guest, disk)
        before = guest.position()
        report = save(guest, disk / "monday", base=base)
        assert before <= check_snapshot(disk / "monday", SETUP) <= guest.position()
        assert report.changed_pages is not None
        assert report.changed_pages * PAGE < SETUP.working_set + 4 * MIB
        found.check(files=["monday", "monday.vm.json"])
        guest.execute("stop")
        save(guest, disk / "full", engine="direct")
        save(guest, disk / "tuesday", base=base)
        assert contents(disk / "tuesday") == contents(disk / "full")
        assert_restores(SETUP, disk / "monday", disk)
        os.utime(base)
        with pytest.raises(NotSupported, match="not of this base"):
            save(guest, disk / "wednesday", base=base)


def keep_digests(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        blocks = [
            RamBlock(name, block.memory(), block.page_size)
            for name, block in snapshot.blocks.items()
        ]
        specs = [BlockSpec(b.name, snapshot.blocks[b.name].length, b.page_size) for b in blocks]
        with PageDigests(blocks) as digests, path.open("rb") as file:
            digests.start_compute().wait()
            identity = identify_snapshot(path, file.fileno())
            write_page_table(page_table_path(path), identity, specs, digests.tables)


# ---- interruptions ------------------------------------------------------------------------------


def command(guest: WritingGuest, *arguments: str) -> list[str]:
    words = ["vm", "save", "--qmp", str(guest.socket), *arguments]
    return [sys.executable, "-m", "pyqmigrate", *words]


def test_command_line_takes_an_increment(guest: WritingGuest, disk: Path) -> None:
    done = subprocess.run(
        command(guest, "--base", "auto", "--json", str(disk / "monday")),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["method"], data["base"]) == ("changed", str(disk / "base.mapped"))
    assert data["changed_pages"] > 0
    assert data["instant"] == "end"


def kill_often(guest: WritingGuest, disk: Path, times: int) -> None:
    rng = random.Random(times)
    started = time.monotonic()
    subprocess.run(command(guest, "--base", "auto", str(disk / "first")), cwd=ROOT, check=True)
    longest = time.monotonic() - started
    found = AsFound(guest, disk)
    for number in range(times):
        path = disk / f"killed{number}"
        saving = subprocess.Popen(
            command(guest, "--base", "auto", str(path)),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.2, longest))
        saving.kill()
        saving.wait()
        found.check(within=60, files=[path.name, f"{path.name}.vm.json"])
        if path.exists():  # it was killed after the publication
            check_snapshot(path, SETUP)
        for left in (path, path.with_name(f"{path.name}.vm.json")):
            left.unlink(missing_ok=True)


def test_killed_saver_leaves_the_guest_as_found(guest: WritingGuest, disk: Path) -> None:
    kill_often(guest, disk, 1)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_saver_killed_fifty_times_leaves_the_guest_as_found(
    guest: WritingGuest, disk: Path
) -> None:
    kill_often(guest, disk, 50)


def test_full_disk_leaves_the_guest_as_found(
    guest: WritingGuest, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyqmigrate.io.output import OutputFile

    found = AsFound(guest, disk)
    monkeypatch.setattr(OutputFile, "free_bytes", lambda self: 1 << 20)
    with pytest.raises(NoSpace, match="MiB are free"):
        save(guest, disk / "monday", base="auto")
    found.check()
    monkeypatch.setattr(OutputFile, "free_bytes", lambda self: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, before[1]))
    try:
        with pytest.raises(PyqmigrateError):
            save(guest, disk / "monday", base="auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found.check()


def test_qemu_that_is_killed_leaves_no_file(
    guest: WritingGuest, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = changed_method.save_device_sections
    files = {path.name for path in disk.iterdir()}

    async def killing(*arguments: Any) -> None:
        await original(*arguments)
        guest.process.kill()
        guest.process.wait()

    monkeypatch.setattr(changed_method, "save_device_sections", killing)
    with pytest.raises(PyqmigrateError):
        save(guest, disk / "monday", base="auto")
    assert {path.name for path in disk.iterdir()} == files


def test_more_changed_pages_than_the_host_has_memory_for_are_not_copied(
    guest: WritingGuest, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = AsFound(guest, disk)
    monkeypatch.setattr(changed_method, "available_memory", lambda: 1 << 20)
    with pytest.raises(NotSupported, match="0 MiB of the host's memory may be used"):
        save(guest, disk / "monday", base="auto")
    found.check()


@pytest.mark.parametrize("commands", [["cont"], ["cont", "stop"]])
def test_guest_that_another_client_resumed_is_not_saved(
    guest: WritingGuest, disk: Path, monkeypatch: pytest.MonkeyPatch, commands: list[str]
) -> None:
    found = AsFound(guest, disk)
    original = changed_method.save_device_sections

    async def meddled(*arguments: Any) -> None:
        await original(*arguments)
        for name in commands:
            guest.execute(name)

    monkeypatch.setattr(changed_method, "save_device_sections", meddled)
    with pytest.raises(QemuError, match="another client resumed the guest"):
        save(guest, disk / "monday", base="auto")
    found.check()


def test_migration_of_another_client_refuses_the_save(guest: WritingGuest, disk: Path) -> None:
    guest.execute("migrate-set-parameters", max_bandwidth=100_000)
    guest.execute("migrate", uri=f"file:{disk}/theirs")
    found = AsFound(guest, disk)
    with pytest.raises(PyqmigrateError, match="under way"):
        save(guest, disk / "monday", base="auto")
    found.check()
    guest.execute("migrate_cancel")


def test_cancelled_save_leaves_the_guest_as_found(guest: WritingGuest, disk: Path) -> None:
    found = AsFound(guest, disk)

    def cancel(_: object) -> None:
        raise Cancelled("by the test")

    with pytest.raises(Cancelled):
        save(guest, disk / "monday", base="auto", progress=cancel)
    found.check()


# ---- other users and file systems ---------------------------------------------------------------

SCRIPT = """
import os, sys
from pathlib import Path
from tests.qemu import test_vm_changed as tests
getattr(tests, sys.argv[1])(Path(sys.argv[2]))
"""


def run_elsewhere(name: str, directory: Path, *before: str) -> None:
    done = subprocess.run(
        [*before, sys.executable, "-c", SCRIPT, name, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def as_nobody(directory: Path) -> None:
    sys.executable = "/usr/bin/python3"  # for the guardian: ours may be in a directory of root's
    with tempfile.TemporaryDirectory() as place:
        SETUP.command(Path(place))  # compiles the guest, whose sources may be there, too
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with start(SETUP, directory, memory="instant", rate=RATE) as guest:
        guest.wait_for_writes(500)
        found = AsFound(guest, directory)
        save(guest, directory / "monday", base="auto", describe=False)
        check_snapshot(directory / "monday", SETUP)
        found.check(files=["monday", "monday.vm.json"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="there is no /usr/bin/python3")
def test_unprivileged_user_saves_a_qemu_of_its_own(disk: Path) -> None:
    os.chown(disk, 65534, 65534)
    disk.chmod(0o755)
    run_elsewhere("as_nobody", disk)


def clones(directory: Path) -> None:
    with start(SETUP, directory, memory="instant", rate=RATE) as guest:
        for _ in range(3):
            guest.wait_for_writes(500)
            before = guest.position()
            report = save(guest, directory / "whole", base="auto", full=True, seal="xxh3-128")
            assert (report.base, report.method) == (None, "changed")
            assert report.bytes_written < SETUP.working_set + 16 * MIB, report
            assert before <= check_snapshot(directory / "whole", SETUP) <= guest.position()
            assert verify_seal(directory / "whole").intact
        guest.execute("stop")
        guest.write_ram((SETUP.first_page + SETUP.working_pages + 9) * PAGE, bytes(PAGE))
        save(guest, directory / "clone", base="auto", full=True)
        save(guest, directory / "full", engine="direct")
        assert contents(directory / "clone") == contents(directory / "full")
        assert devices(directory / "clone") == devices(directory / "full")
    for name, mode in (("whole", "instant"), ("clone", "load")):
        with restore(SETUP, directory / name, directory, mode=mode, paused=False) as guest:
            guest.wait_for_writes(SETUP.working_pages)
            guest.assert_memory_held()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize(
    "kind, make",
    covering(
        [("xfs", ["mkfs.xfs", "-q"]), ("btrfs", ["mkfs.btrfs", "-q"])],
        short=[("xfs", ["mkfs.xfs", "-q"])],
    ),
)
def test_whole_snapshot_shares_its_pages_with_the_base(
    disk: Path, kind: str, make: list[str]
) -> None:
    image, mounted = disk / "image", disk / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(600 * MIB)
    try:
        subprocess.run([*make, str(image)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"{make[0]} is not installed")
    mount = 'mount -o loop "$1" "$2" || exit 77; shift 2; exec "$@"'
    before = ["unshare", "-m", "sh", "-ec", mount, "sh", str(image), str(mounted)]
    if subprocess.run([*before, "true"], capture_output=True).returncode == 77:
        pytest.skip(f"{kind} cannot be mounted")
    run_elsewhere("clones", mounted, *before)


def test_clone_of_the_base_needs_a_file_system_with_reflinks(
    guest: WritingGuest, shm: Path, disk: Path
) -> None:
    found = AsFound(guest, disk)
    with pytest.raises(NotSupported, match="XFS and btrfs"):
        save(guest, shm / "whole", base="auto", full=True)
    found.check()
    assert not list(shm.iterdir())
