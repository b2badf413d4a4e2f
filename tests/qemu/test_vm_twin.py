"""A stopped twin describes the device state that xen-save-devices-state writes without description."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import open_snapshot
from pyqmigrate.cli import main
from pyqmigrate.errors import NotSupported
from pyqmigrate.export.convert import convert
from pyqmigrate.export.image import ImageReport
from pyqmigrate.format.device.cpu import cpu_registers
from pyqmigrate.snapshot.devices import devices
from pyqmigrate.vm.guest.inspect import inspect
from pyqmigrate.vm.incoming.incoming_settings import Incoming
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.plan.check import check
from pyqmigrate.vm.qemu.launch import QemuSession
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.twin import describing, twin
from pyqmigrate.vm.twin.describing import Describing
from pyqmigrate.vm.twin.twin import describe_snapshot
from tests.harness.bare import BareQemu
from tests.harness.saving import Source, source, wait_until

pytestmark = pytest.mark.qemu

MIB = 1 << 20
# Stands for nothing that a twin knows, and has no state: the device state is the same without it.
FORWARD = "guestfwd=tcp:10.0.2.9:1-cmd:cat"


def machines(disk: Path) -> dict[str, tuple[str, ...]]:
    """Command lines with every kind of image, network and console; files in ``disk``."""
    for name, size in (("a", 16), ("b", 40), ("c", 8), ("d", 1), ("sd", 16)):
        with (disk / f"{name}.img").open("wb") as file:
            file.truncate(size * MIB)
    return {
        "pc": (
            "-drive",
            f"file={disk}/a.img,format=raw,if=virtio,cache=none",
            "-drive",
            f"file={disk}/b.img,format=raw,if=ide",
            "-cdrom",
            f"{disk}/c.img",
            "-drive",
            f"file={disk}/d.img,format=raw,if=floppy",
            "-device",
            "virtio-scsi-pci",
            "-drive",
            f"file={disk}/sd.img,format=raw,if=none,id=s",
            "-device",
            "scsi-hd,drive=s",
            "-netdev",
            "user,id=n0,hostfwd=tcp:127.0.0.1:0-:22",
            "-device",
            "virtio-net-pci,netdev=n0",
            "-chardev",
            f"socket,id=c0,path={disk}/c0,server=on,wait=off",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtserialport,chardev=c0",
            "-smp",
            "2",
            "-vga",
            "std",
            "-parallel",
            f"file:{disk}/parallel",
        ),
        "q35": (
            "-drive",
            f"if=pflash,unit=0,format=raw,file={disk}/d.img",
            "-blockdev",
            json.dumps(
                {
                    "driver": "raw",
                    "node-name": "top",
                    "file": {"driver": "file", "filename": f"{disk}/a.img"},
                }
            ),
            "-device",
            "virtio-blk-pci,drive=top",
            "-device",
            "ich9-ahci,id=ahci",
            "-blockdev",
            f"driver=file,node-name=b,filename={disk}/b.img",
            "-device",
            "ide-hd,drive=b,bus=ahci.1",
            "-device",
            "qemu-xhci",
            "-drive",
            f"file={disk}/c.img,format=raw,if=none,id=u",
            "-device",
            "usb-storage,drive=u",
            "-device",
            "usb-tablet",
            "-netdev",
            "socket,id=n0,udp=127.0.0.1:9,localaddr=127.0.0.1:0",
            "-device",
            "e1000e,netdev=n0",
            "-nic",
            "user,model=rtl8139",
            "-object",
            "rng-random,id=r,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=r",
            "-audiodev",
            "none,id=a",
            "-device",
            "intel-hda",
            "-device",
            "hda-duplex,audiodev=a",
            "-device",
            "sdhci-pci",
            "-drive",
            f"file={disk}/sd.img,format=raw,if=none,id=sd",
            "-device",
            "sd-card,drive=sd",
            "-device",
            "pvpanic",
            "-device",
            "virtio-balloon-pci",
        ),
        "microvm": (
            "-drive",
            f"file={disk}/a.img,format=raw,if=none,id=a",
            "-device",
            "virtio-blk-device,drive=a",
            "-netdev",
            "user,id=n0",
            "-device",
            "virtio-net-device,netdev=n0",
        ),
    }


@pytest.fixture(params=["pc", "q35", "microvm"])
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def described_as(path: Path) -> list[dict[str, Any]]:
    """What the file's description says of its devices."""
    with open_snapshot(path) as snapshot:
        description = snapshot.stream.description
        assert description is not None
        return list(description["devices"])


def test_device_state_is_described_as_migrate_describes_it(
    machine: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, words = watch_twin(monkeypatch)
    extra = machines(disk)[machine]
    if machine == "q35":
        extra = extra[2:]  # its guest is firmware in the place of pflash
    with source(disk, machine=machine, memory="private", extra=extra) as guest:
        # The first leaves the guest as it was; afterwards it is postmigrate.
        guest.vm.execute("stop")
        ours = guest.save(disk / "ours", engine="direct")
        theirs = guest.save(disk / "theirs", engine="qemu")
    assert not any("describ" in note for note in ours.notes)
    assert described_as(disk / "ours") == described_as(disk / "theirs")
    found, expected = devices(disk / "ours"), devices(disk / "theirs")
    assert found.described
    assert [d.explained for d in found.devices] == [d.explained for d in expected.devices]
    registers = cpu_registers(found.devices)
    assert registers == cpu_registers(expected.devices)
    report = convert(disk / "ours", disk / "elf", to="elf")
    assert isinstance(report, ImageReport)
    assert report.cpus == len(registers) == (2 if machine == "pc" else 1)
    assert_nothing_of_the_guest(files, words, disk)
    assert theirs.engine == "qemu"


def watch_twin(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Lists that get what every twin has open or mapped, and its command line, once it answers."""
    files: list[str] = []
    words: list[str] = []
    real = twin.take_in

    async def watched(qemu: QemuSession, incoming: Incoming) -> float:
        process = Path(f"/proc/{qemu.process.pid}")
        files.extend(str(fd.readlink()) for fd in (process / "fd").iterdir())
        maps = (process / "maps").read_text().splitlines()
        files.extend(fields[5] for line in maps if len(fields := line.split(maxsplit=5)) > 5)
        words.extend((process / "cmdline").read_text().split("\0"))
        return await real(qemu, incoming)

    monkeypatch.setattr(twin, "take_in", watched)
    return files, words


def assert_nothing_of_the_guest(files: list[str], words: list[str], disk: Path) -> None:
    """A twin has nothing open in ``disk`` but the firmware that it was given, which QEMU reads and
    closes; no socket of its own but its monitor's, and a listener for that."""
    assert files
    assert words
    assert [name for name in files if name.startswith(str(disk))] == []
    assert len([name for name in files if name.startswith("socket:")]) <= 3
    own = {"-bios", "-L"}
    named = [word for n, word in enumerate(words) if str(disk) in word and words[n - 1] not in own]
    assert named == []


def save_bare(qemu: BareQemu, path: Path) -> VmSaveReport:
    """A save, once the monitor answers."""

    async def answers(monitor: Monitor) -> None:
        await monitor.execute("query-status")

    qemu.run(answers)
    return asyncio.run(save(qemu.socket, path))


def test_flash_is_stood_in_for(disk: Path) -> None:
    with BareQemu("-M", "q35", "-m", "32", *machines(disk)["q35"]) as qemu:
        report = save_bare(qemu, disk / "s")
    assert not any("describ" in note for note in report.notes)
    assert devices(disk / "s").described


@pytest.mark.parametrize("memory", ["private", "memfd"])
def test_guest_whose_firmware_has_run_is_described(memory: str, disk: Path) -> None:
    """Its ROMs are where the device kvm-tpr-opt looks for them, and a virtio queue was used."""
    # mov $0x3f8, %dx; mov $'A', %al; out %al, (%dx); jmp .
    sector = b"\xba\xf8\x03\xb0A\xee\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
    (disk / "boot").write_bytes(sector.ljust(MIB, b"\0"))
    (disk / "serial").touch()
    words = [
        "-m",
        "32",
        "-serial",
        f"file:{disk}/serial",
        "-drive",
        f"file={disk}/boot,format=raw,if=virtio",
    ]
    if memory == "memfd":
        words += ["-object", "memory-backend-memfd,id=m,size=32M", "-M", "pc,memory-backend=m"]
    with BareQemu(*words, run=True) as qemu:
        wait_until(lambda: (disk / "serial").read_bytes() == b"A", "the guest has booted")
        report = save_bare(qemu, disk / "s")
    assert not any("describ" in note for note in report.notes)
    assert cpu_registers(devices(disk / "s").devices)
    with open_snapshot(disk / "s") as snapshot:
        asyncio.run(describe_snapshot(snapshot))


def test_twin_has_the_network_headers_of_a_tap(disk: Path) -> None:
    tap = ("-netdev", "tap,id=n,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n")
    with BareQemu("-m", "32", *tap) as qemu:
        try:
            report = save_bare(qemu, disk / "s")
        except AssertionError:
            if qemu.process.poll() is None:
                raise
            pytest.skip(f"no tap device can be made here: {qemu.stderr()}")
    assert not any("describ" in note for note in report.notes)
    assert devices(disk / "s").described


@pytest.mark.parametrize("memory", ["memfd", "private"])
def test_running_guest_goes_on_before_it_is_described(
    memory: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    real = twin.take_in

    async def looked(qemu: QemuSession, incoming: Incoming) -> float:
        states.append(guest.status())
        return await real(qemu, incoming)

    monkeypatch.setattr(twin, "take_in", looked)
    with source(disk, memory=memory) as guest:
        guest.save(disk / "described")
        assert states == ["running"]
        guest.save(disk / "plain", describe=False)
        assert states == ["running"]
        guest.files |= {"described", "plain"}
        guest.assert_as_before()
        assert guest.save(disk / "last", then="quit").notes == ()
    assert devices(disk / "last").described
    assert devices(disk / "described").described
    assert cpu_registers(devices(disk / "described").devices)
    assert not devices(disk / "plain").described


def pyqmigrate(*arguments: str, code: int = 0) -> str:
    """What the command says, on both streams."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(arguments) == code, said.getvalue()
    return said.getvalue()


def test_save_that_could_not_be_described_is_described_later(disk: Path) -> None:
    forwarded = ("-netdev", f"user,id=n0,{FORWARD}", "-device", "virtio-net-pci,netdev=n0")
    with source(disk, memory="private", extra=forwarded) as guest:
        words = Path(f"/proc/{guest.vm.process.pid}/cmdline").read_text().split("\0")[:-1]
        report = guest.save(disk / "s")
        [note] = [note for note in report.notes if "describ" in note]
        assert "guestfwd" in note and "--describe" in note
        guest.save(disk / "known", engine="qemu")
    assert not devices(disk / "s").described
    s = str(disk / "s")
    assert "--describe" in pyqmigrate("devices", s)
    assert "no registers" in pyqmigrate("convert", s, str(disk / "elf"), "--to", "elf")
    command = [word.replace(f",{FORWARD}", "") for word in words]
    assert "guestfwd" in pyqmigrate("devices", s, "--describe", "--", *words, code=5)
    told = json.loads(pyqmigrate("devices", s, "cpu", "--json", "--describe", "--", *command))
    assert told["described"] is True
    assert "guestfwd" in pyqmigrate("devices", s, "--describe", code=5), "of the record"
    (disk / "s.vm.json").unlink()
    assert "command line after --" in pyqmigrate("devices", s, "--describe", code=2)
    for form in ("mapped-ram", "stream", "elf"):
        target = str(disk / form)
        said = pyqmigrate("convert", s, target, "--to", form, "--describe", "--", *command)
        assert "registers of 1 CPU" in said or form != "elf"
        if form != "elf":
            assert described_as(disk / form) == described_as(disk / "known")
            assert cpu_registers(devices(disk / form).devices)


def test_snapshot_is_described_from_its_record(disk: Path) -> None:
    with source(disk, memory="private", extra=machines(disk)["pc"]) as guest:
        guest.save(disk / "s", describe=False)
        guest.save(disk / "known")
    for image in disk.glob("*.img"):
        image.unlink()  # their sizes are in the record
    s = str(disk / "s")
    assert "--describe" in pyqmigrate("devices", s)
    pyqmigrate("convert", s, str(disk / "new"), "--to", "mapped-ram", "--describe")
    assert described_as(disk / "new") == described_as(disk / "known")


def test_guest_that_a_bios_has_started_is_described(disk: Path) -> None:
    """What the BIOS and its drivers have in memory, a twin has not: queues, routines."""
    machines(disk)  # makes images
    drive = f"file={disk}/a.img,format=raw,if=virtio"
    with BareQemu("-m", "64", "-drive", drive, run=True) as qemu:

        def has_read() -> bool:
            (stats, *_) = qemu.run(lambda monitor: monitor.execute("query-blockstats"))
            return bool(stats["stats"]["rd_operations"])

        wait_until(has_read, "the BIOS does not read the disk")
        qemu.run(lambda monitor: monitor.execute("stop"))
        report = asyncio.run(save(qemu.socket, disk / "s", engine="direct"))
        asyncio.run(save(qemu.socket, disk / "theirs", engine="qemu"))
    assert not [note for note in report.notes if "without its description" in note]
    assert described_as(disk / "s") == described_as(disk / "theirs")
    listed = pyqmigrate("devices", str(disk / "s"))
    assert "real_tpr_addr" in listed
    assert "/virtio-blk" in listed


def test_record_that_others_may_write_is_not_run(disk: Path) -> None:
    with source(disk, memory="private") as guest:
        guest.save(disk / "s", describe=False)
    (disk / "s.vm.json").chmod(0o666)
    assert "another user" in pyqmigrate("devices", str(disk / "s"), "--describe", code=2)


def test_snapshot_is_not_described_by_another_machine(disk: Path) -> None:
    with source(disk, memory="private", extra=("-device", "virtio-rng-pci")) as guest:
        words = Path(f"/proc/{guest.vm.process.pid}/cmdline").read_text().split("\0")[:-1]
        guest.save(disk / "s", describe=False)
    with open_snapshot(disk / "s") as snapshot:
        for other in (["-device", "virtio-balloon-pci"], ["-smp", "2"]):
            with pytest.raises(NotSupported) as caught:
                asyncio.run(describe_snapshot(snapshot, [*words, *other]))
            assert "\n" not in str(caught.value)
        assert asyncio.run(describe_snapshot(snapshot, words))


def test_check_reports_why_there_is_no_twin(disk: Path) -> None:
    forwarded = ("-netdev", f"user,id=n0,{FORWARD}", "-device", "virtio-net-pci,netdev=n0")
    for extra, expected in ((forwarded, [True]), ((), [])):
        with BareQemu("-m", "32", *extra) as qemu:
            report = qemu.run(check)
        assert ["without its description" in note for note in report.notes] == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root saves the guests of others")
def test_twin_is_of_the_user_that_its_original_is(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users: list[list[str]] = []
    real = twin.take_in

    async def looked(qemu: QemuSession, incoming: Incoming) -> float:
        status = Path(f"/proc/{qemu.process.pid}/status").read_text()
        users.extend(line.split()[1:] for line in status.splitlines() if line[:3] in ("Uid", "Gid"))
        return await real(qemu, incoming)

    monkeypatch.setattr(twin, "take_in", looked)
    nobody = ["setpriv", "--reuid=65534", "--regid=65533", "--clear-groups", "--"]
    disk.chmod(0o777)
    with BareQemu("-m", "32", before=nobody, socket=disk / "qmp", cwd=Path("/")) as qemu:
        report = save_bare(qemu, disk / "s")
    assert report.notes == ()
    assert users == [["65534"] * 4, ["65533"] * 4]


def test_original_in_a_container_has_no_twin(disk: Path) -> None:
    apart = ["unshare", "--map-root-user", "--mount", "--"]
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    with BareQemu("-m", "32", before=apart) as qemu:
        report = save_bare(qemu, disk / "s")
    if report.engine == "direct":
        assert any("container" in note for note in report.notes)


def test_device_that_was_plugged_in_is_reported(disk: Path) -> None:
    with source(disk, memory="private") as guest:
        guest.vm.execute("device_add", {"driver": "virtio-rng-pci", "id": "late"})
        report = guest.save(disk / "s")
        guest.files |= {"s"}
        guest.assert_as_before()
    assert any("without its description" in note for note in report.notes)
    with open_snapshot(disk / "s") as snapshot:
        snapshot.verify()
    assert not devices(disk / "s").described


HANGING = """
import asyncio, sys
from pyqmigrate.vm.twin import twin
async def hang(qemu, incoming):
    print(qemu.process.pid, flush=True)
    await asyncio.sleep(600)
twin.take_in = hang
from pyqmigrate.cli import main
sys.exit(main())
"""


@pytest.fixture
def hanging(disk: Path) -> Iterator[tuple[Source, subprocess.Popen[bytes], int]]:
    """A save whose twin hangs, and the twin's process."""
    with source(disk, memory="private") as guest:
        saver = guest.start_save(disk / "s", program=HANGING)
        assert saver.stdout is not None
        try:
            yield guest, saver, int(saver.stdout.readline())
        finally:
            saver.kill()
            saver.communicate()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_twin_outlives_its_save(
    hanging: tuple[Source, subprocess.Popen[bytes], int], number: signal.Signals
) -> None:
    guest, saver, pid = hanging
    assert is_alive(pid)
    os.kill(saver.pid, number)
    wait_until(lambda: not is_alive(pid), "the twin lives on")
    saver.wait(30)
    guest.assert_as_before(within=20)


def test_save_is_whole_whatever_becomes_of_its_twin(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> float:
        raise RecursionError("deep")

    monkeypatch.setattr(twin, "take_in", fail)
    with source(disk, memory="private") as guest:
        report = guest.save(disk / "s")
        guest.files |= {"s"}
        guest.assert_as_before()
    assert any("without its description (deep)" in note for note in report.notes)
    with open_snapshot(disk / "s") as snapshot:
        snapshot.verify()


@pytest.mark.parametrize("waits", [False, True])
def test_twin_that_was_started_ahead_ends_if_there_is_nothing_to_describe(
    waits: bool, disk: Path
) -> None:
    children = Path(f"/proc/{os.getpid()}/task")

    def qemus() -> list[str]:
        pids = " ".join((task / "children").read_text() for task in children.iterdir()).split()
        programs = [Path(f"/proc/{pid}/exe").readlink().name for pid in pids]
        return [program for program in programs if program.startswith("qemu")]

    async def started(guest: Source) -> int:
        async with await Monitor.connect(guest.socket) as monitor:
            with await inspect(monitor) as found:
                async with Describing(found) as describing:
                    describing.start_ahead()
                    if waits:
                        while not describing._twin.done():  # type: ignore[union-attr]
                            await describing.until_ready()
                        return len(qemus())
        return 0

    with source(disk, memory="private") as guest:
        before = len(qemus())
        during = asyncio.run(started(guest))
        assert len(qemus()) == before
        assert not waits or during == before + 1
        guest.assert_as_before()


def test_twin_that_takes_too_long_is_ended(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []

    async def hang(qemu: QemuSession, incoming: Incoming) -> float:
        pids.append(qemu.process.pid)
        await asyncio.sleep(600)
        return 0.0

    monkeypatch.setattr(twin, "take_in", hang)
    with source(disk, memory="private") as guest:
        monkeypatch.setattr(describing, "TIMEOUT", 2.0)
        report = guest.save(disk / "s")
        guest.files |= {"s"}
        guest.assert_as_before()
    assert [is_alive(pid) for pid in pids] == [False]
    assert any("took longer than 2 s" in note for note in report.notes)
    with open_snapshot(disk / "s") as snapshot:
        snapshot.verify()
