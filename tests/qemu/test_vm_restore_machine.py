"""Restores into a machine that is not quite the one that was saved, and of guests that stood still.

The guests have no program of their own: they are saved before their first instruction.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import vm
from pyqmigrate.errors import PyqmigrateError, QemuError, UsageError
from pyqmigrate.format.device.sections import global_state
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.incoming.saved_machine import read_saved_machine
from pyqmigrate.vm.record.place import record_path
from tests.harness.machine import BINARY
from tests.harness.unpacked import unpacked

pytestmark = pytest.mark.qemu

TCG = ["-accel", "tcg"]
MACHINE = ["-M", "q35", "-m", "16", "-nodefaults", "-display", "none"]
NET = ["-device", "virtio-net-pci,addr=3"]


def save(path: Path, *arguments: str, engine: str = "qemu", accel: str = "tcg") -> Path:
    """A snapshot of the machine with these arguments."""
    qmp = path.with_suffix(".qmp")
    command = [BINARY, "-accel", accel, *MACHINE, *arguments, "-S"]
    with subprocess.Popen(
        [*command, "-qmp", f"unix:{qmp},server=on,wait=off"], stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not listens(qmp):
                assert process.poll() is None
                time.sleep(0.01)
            asyncio.run(vm.connect(qmp).save(path, engine=engine, then="quit"))
        finally:
            process.kill()
    record_path(path).unlink()  # what the stream itself says is compared here
    return path


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture(scope="module", params=["qemu", "direct"])
def one(module_disk: Path, request: pytest.FixtureRequest) -> Path:
    """With one processor and no device, saved by either engine."""
    return save(module_disk / f"one-{request.param}", engine=request.param)


@pytest.fixture(scope="module")
def two(module_disk: Path) -> Path:
    """With two processors, a network device and a serial port, by engine direct."""
    return save(module_disk / "two", "-smp", "2", *NET, "-serial", "null", engine="direct")


async def _restored(path: Path, words: list[str], mode: str, **options: object) -> RestoreReport:
    guest: RestoredVm = await restore(path, words, mode=mode, **options)  # type: ignore[arg-type]
    await guest.end()
    return guest.report


def report(path: Path, *arguments: str, mode: str = "instant", **options: object) -> RestoreReport:
    words = [BINARY, *TCG, *MACHINE, *arguments]
    return asyncio.run(_restored(path, words, mode, **options))


def refusal(path: Path, *arguments: str, mode: str = "instant") -> str:
    with pytest.raises(PyqmigrateError) as caught:
        report(path, *arguments, mode=mode)
    assert isinstance(caught.value, UsageError)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_more_processors_are_a_note(one: Path, mode: str) -> None:
    (note,) = (n for n in report(one, "-smp", "2", mode=mode).notes if "CPU" in n)
    assert note.startswith("the command line makes 2 CPUs and the snapshot has 1")


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_load_that_fails_says_what_is_different(tmp_path: Path, mode: str) -> None:
    """A disk has as many queues as there are processors, and QEMU tells of its PCI registers only."""
    disk = ["-blockdev", "null-co,node-name=n,size=1048576", "-device", "virtio-blk-pci,drive=n"]
    path = save(tmp_path / "s", *disk)
    with pytest.raises(QemuError, match="perhaps because the command line makes 2 CPUs and the"):
        report(path, "-smp", "2", *disk, mode=mode)


def test_fewer_processors_are_refused(two: Path) -> None:
    for words in (["-smp", "1"], []):  # said, and found when QEMU answers
        said = refusal(two, *words, *NET, "-serial", "null")
        assert said == "the command line makes 1 CPU and the snapshot has 2: give -smp 2"


def test_same_machine_has_no_note(two: Path) -> None:
    assert not [
        note
        for note in report(two, "-smp", "2", *NET, "-serial", "null").notes
        if "snapshot has" in note or "not know" in note
    ]


def test_missing_device_is_refused_before_the_load(two: Path) -> None:
    said = refusal(two, "-smp", "2", "-serial", "null")
    assert "virtio-net at PCI address 03.0 is missing" in said
    said = refusal(two, "-smp", "2", *NET)
    assert "1 isa-serial in the snapshot, 0 in QEMU" in said
    said = refusal(two, "-smp", "2", "-device", "e1000,addr=3,romfile=", "-serial", "null")
    assert "e1000 at PCI address 03.0 is virtio-net in the snapshot" in said


def test_device_that_was_not_there_is_a_note(one: Path) -> None:
    notes = report(one, "-device", "virtio-rng-pci,addr=4,id=rng", "-serial", "null").notes
    assert (
        "virtio-rng-pci 'rng' at PCI address 04.0 is not in the snapshot: the guest does not "
        "know it" in notes
    )
    assert "1 isa-serial in QEMU, 0 in the snapshot: the guest does not know it" in notes


@pytest.mark.parametrize(
    ("state", "meaning"),
    [
        ("internal-error", "system_reset"),
        ("io-error", "cont retries it"),
        ("guest-panicked", "its kernel had crashed"),
        ("shutdown", "it had shut down"),
        ("paused", "cont resumes it"),
    ],
)
def test_guest_that_was_stopped_comes_back_in_its_state(
    one: Path, tmp_path: Path, state: str, meaning: str
) -> None:
    path = tmp_path / "guest"
    path.write_bytes(one.read_bytes())
    with open_snapshot(path) as snapshot:
        (section,) = (s for s in snapshot.stream.sections if s.name == "globalstate")
        assert read_saved_machine(snapshot).run_state == "prelaunch"
    with path.open("r+b") as file:
        file.seek(section.body_offset)
        file.write(global_state(state).data)
    found = report(path)
    assert found.run_state == state
    assert f"the guest is {state}, as it was when it was saved: " in found.notes[-1]
    assert meaning in found.notes[-1]
    if state in ("internal-error", "shutdown", "guest-panicked"):
        found = report(path, paused=False)
        assert found.run_state == state
        assert "cannot simply be resumed" in found.notes[-1]


def test_guest_that_ran_runs_and_one_that_is_wanted_paused_does_not(
    one: Path, tmp_path: Path
) -> None:
    path = tmp_path / "guest"
    path.write_bytes(one.read_bytes())
    with open_snapshot(path) as snapshot:
        (section,) = (s for s in snapshot.stream.sections if s.name == "globalstate")
    with path.open("r+b") as file:
        file.seek(section.body_offset)
        file.write(global_state("running").data)
    assert report(path).run_state == "running"
    assert report(path, "-S").run_state == "paused"
    assert report(path, paused=True).run_state == "paused"
    assert report(one, paused=False).run_state == "running"


@pytest.fixture(scope="module")
def kvm(module_disk: Path) -> Path:
    """Saved under KVM, which need not run a guest for that."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened")
    return save(module_disk / "kvm", accel="kvm")


def test_snapshot_of_kvm_is_refused_by_tcg_before_the_load(kvm: Path) -> None:
    assert refusal(kvm).endswith("give -accel kvm")  # before QEMU starts
    words = [BINARY, *MACHINE]  # QEMU chooses TCG
    with pytest.raises(UsageError, match=r"saved under KVM .*'kvmclock'"):
        asyncio.run(_restored(kvm, words, "load"))


def test_snapshot_of_kvm_goes_on_under_kvm_and_one_of_tcg_with_a_note(kvm: Path, one: Path) -> None:
    words = [BINARY, "-accel", "kvm", *MACHINE]
    assert not [n for n in asyncio.run(_restored(kvm, words, "load")).notes if "TSC" in n]
    notes = asyncio.run(_restored(one, [*words, "-S"], "load")).notes
    assert [note for note in notes if "saved without KVM" in note and "TSC jumps" in note]


@pytest.fixture
def no_temporary_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file is made")

    for name in ("mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryFile"):
        monkeypatch.setattr(f"tempfile.{name}", refused)
    yield


@pytest.mark.usefixtures("no_temporary_files")
@pytest.mark.parametrize("mode", ["instant", "load"])
def test_restore_needs_no_temporary_file_and_any_monitor_path(
    one: Path, tmp_path: Path, mode: str
) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    qmp = directory / "guest,1.qmp"

    async def run() -> None:
        guest = await restore(one, [BINARY, *TCG, *MACHINE], mode=mode, qmp=f"unix:{qmp}")
        try:
            async with await vm.Monitor.connect(qmp) as monitor:
                assert (await monitor.execute("query-status"))["status"] == "prelaunch"
        finally:
            await guest.end()

    asyncio.run(run())
    assert not qmp.exists(), "QEMU left its socket"


@pytest.mark.long
def test_newer_qemu_has_its_monitor_as_an_object(one: Path, tmp_path: Path) -> None:
    program = str(unpacked("newer-qemu") / "run" / "qemu-system-x86_64")
    own = ["-object", "monitor-qmp,id=m,chardev=c", "-chardev", "null,id=c"]
    command = [program, *TCG, "-M", "pc-q35-10.0", *MACHINE[2:], *own]
    assert asyncio.run(_monitors(one, command, tmp_path / "q")) == {
        "m",
        "pyqmigrate",
        "pyqmigrate-qmp",
    }


def test_older_qemu_has_its_monitor_by_an_option(one: Path, tmp_path: Path) -> None:
    assert asyncio.run(_monitors(one, [BINARY, *TCG, *MACHINE], tmp_path / "q")) == set()


async def _monitors(path: Path, command: list[str], qmp: Path) -> set[str]:
    """The objects of a restored QEMU that are monitors, asked for at ``qmp``."""
    guest = await restore(path, command, qmp=qmp)
    try:
        async with await vm.Monitor.connect(qmp) as monitor:
            objects = await monitor.execute("qom-list", {"path": "/objects"})
            return {str(each["name"]) for each in objects if "monitor-qmp" in each["type"]}
    finally:
        await guest.end()
