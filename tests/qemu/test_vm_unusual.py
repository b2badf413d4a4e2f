"""Guests and QEMUs that are not the usual: saved so that they restore, or refused untouched."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import vm
from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import inspect
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.covering import covering
from tests.harness.machine import BINARY
from tests.harness.pattern_guest import build
from tests.harness.saved import RAM, memory_of, serial_says

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PC = ["-M", "pc", "-m", str(RAM >> 20)]
FILE = [
    "-M",
    "pc,memory-backend=ram0",
    "-m",
    str(RAM >> 20),
    "-object",
    f"memory-backend-file,id=ram0,size={RAM},share=on,mem-path=/dev/shm",
]
HUGE = f"memory-backend-memfd,id=ram0,size={RAM},hugetlb=on,hugetlbsize=2M"


async def found(monitor: Monitor) -> list[Any]:
    """What a save leaves as it was."""
    asked = (
        "query-status",
        "query-migrate-capabilities",
        "query-migrate-parameters",
        "query-fdsets",
    )
    return [await monitor.execute(command) for command in asked]


async def prepared(monitor: Monitor, commands: list[tuple[str, dict[str, Any]]]) -> None:
    for command, arguments in commands:
        await monitor.execute(command, arguments)


def restores(path: Path, arguments: list[str], memory: dict[str, bytes], run_state: str) -> None:
    """A restored guest has this memory, and goes on as it was."""
    command = [BINARY, "-accel", "tcg", "-nodefaults", "-display", "none", *arguments]

    async def run() -> None:
        guest = await vm.restore(path, command, paused=True)
        try:
            if guest.lazy is not None:  # pages that are missing cannot be read from outside
                await guest.lazy.completed()
            assert_same_blocks(await memory_of(guest.monitor, guest.process.pid), memory)
            if run_state not in ("paused", "prelaunch"):
                await guest.monitor.execute("cont")
                assert (await guest.monitor.execute("query-status"))["status"] == run_state
        finally:
            await guest.end()

    asyncio.run(run())


def dimm(backend: str) -> tuple[list[str], list[str], list[tuple[str, dict[str, Any]]]]:
    """Memory plugged in while the guest runs; the command line that has it from the beginning."""
    kind, _, options = backend.partition(",")
    given = dict(option.split("=") for option in options.split(",") if option)
    share = {"share": True} if given.pop("share", "") else {}
    plugged = [
        ("object-add", {"qom-type": kind, "id": "more", "size": 64 * MIB, **share, **given}),
        ("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "more"}),
    ]
    started = ["-M", "pc", "-m", "32M,slots=2,maxmem=1G"]
    later = ["-object", f"{backend},id=more,size=64M", "-device", "pc-dimm,id=dimm,memdev=more"]
    return started, [*started, *later], plugged


def fixed(*arguments: str) -> tuple[list[str], list[str], list[tuple[str, dict[str, Any]]]]:
    return [*arguments], [*arguments], []


GUESTS = {
    "memory plugged in": dimm("memory-backend-ram"),
    "shared memory plugged in": dimm("memory-backend-file,share=on,mem-path=/dev/shm"),
    "a shared and a private node": fixed(
        "-M",
        "pc",
        "-m",
        "48M",
        "-object",
        "memory-backend-file,id=m0,size=24M,share=on,mem-path=/dev/shm",
        "-object",
        "memory-backend-ram,id=m1,size=24M",
        "-numa",
        "node,memdev=m0",
        "-numa",
        "node,memdev=m1",
    ),
    "nvdimm": fixed(
        "-M",
        "pc,nvdimm=on",
        "-m",
        "32M,slots=2,maxmem=1G",
        "-object",
        "memory-backend-ram,id=nv,size=32M",
        "-device",
        "nvdimm,memdev=nv,id=nv0",
    ),
    "virtio-pmem": fixed(
        "-M",
        "pc",
        "-m",
        "32M,slots=2,maxmem=1G",
        "-object",
        "memory-backend-ram,id=nv,size=32M",
        "-device",
        "virtio-pmem-pci,memdev=nv,id=nv0",
    ),
    "ivshmem, the master": fixed(
        "-M",
        "pc",
        "-m",
        "32M",
        "-object",
        "memory-backend-file,id=iv,size=4M,share=on,mem-path=/dev/shm",
        "-device",
        "ivshmem-plain,memdev=iv,master=on",
    ),
    "a machine that is none": fixed("-M", "none", "-m", "32M"),
    "huge pages": fixed("-M", "pc,memory-backend=ram0", "-m", str(RAM >> 20), "-object", HUGE),
    "one instruction at a time": fixed(*PC, "-accel", "tcg,one-insn-per-tb=on"),
    "a sandbox": fixed(
        *PC, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ),
}


# Each kind of guest; both engines where memory was plugged in, or is of two kinds.
SHORT = [
    ("memory plugged in", "qemu"),
    ("shared memory plugged in", "direct"),
    ("a shared and a private node", "direct"),
    ("a shared and a private node", "qemu"),
    ("nvdimm", "direct"),
    ("virtio-pmem", "qemu"),
    ("ivshmem, the master", "direct"),
    ("a machine that is none", "qemu"),
    ("huge pages", "direct"),
    ("one instruction at a time", "direct"),
    ("a sandbox", "qemu"),
]


@pytest.mark.parametrize(
    ("kind", "engine"),
    covering(((kind, engine) for kind in GUESTS for engine in ("direct", "qemu")), SHORT),
)
def test_guest_of_an_unusual_kind_is_saved(kind: str, engine: str, disk: Path) -> None:
    started, later, commands = GUESTS[kind]
    if kind == "huge pages":
        free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        if not free.exists() or int(free.read_text()) * 2 * MIB < 2 * RAM:
            pytest.skip("no huge pages are set aside here (vm.nr_hugepages)")
    with BareQemu(*started, run=True) as qemu:
        qemu.run(lambda monitor: prepared(monitor, [*commands, ("stop", {})]))
        before = qemu.run(found)
        report = asyncio.run(vm.connect(qemu.socket).save(disk / "snapshot", engine=engine))
        assert report.engine == engine
        after = qemu.run(found)
        assert after[1:] == before[1:]
        assert after[0]["status"] == ("paused" if engine == "direct" else "postmigrate")
        memory = qemu.run(lambda monitor: memory_of(monitor, qemu.process.pid))
    restores(disk / "snapshot", later, memory, "paused")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-M", "none"], "no memory"),
        (
            [
                "-M",
                "pc",
                "-m",
                "32M",
                "-device",
                "ivshmem-plain,memdev=iv",
                "-object",
                "memory-backend-file,id=iv,size=4M,share=on,mem-path=/dev/shm",
            ],
            "peer mode",
        ),
        ([*PC, "-incoming", "defer"], "incoming"),
        ([*PC, "--preconfig"], "initialization"),
    ],
    ids=["no memory", "ivshmem, a peer", "not loaded yet", "no machine yet"],
)
@pytest.mark.parametrize("engine", ["auto", "direct", "qemu"])
def test_guest_that_cannot_be_saved_is_refused_untouched(
    arguments: list[str], words: str, engine: str, disk: Path
) -> None:
    with BareQemu(*arguments, run=True) as qemu:

        async def status(monitor: Monitor) -> Any:
            return await monitor.execute("query-status")

        before = qemu.run(status)
        with pytest.raises(QemuError, match=words):
            asyncio.run(vm.connect(qemu.socket).save(disk / "snapshot", engine=engine))
        assert qemu.run(status) == before
    assert list(disk.iterdir()) == []


def started_otherwise(directory: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Words before the command, and at its end."""
    inside = directory / "root"
    inside.mkdir()
    return {
        "another user": ([], ["-run-with", "user=nobody"]),
        "chroot": ([], ["-run-with", f"chroot={inside}"]),
        "another user in a chroot": ([], ["-run-with", f"chroot={inside},user=nobody"]),
        "namespaces": (["unshare", "-m", "-p", "-f", "--kill-child"], []),
    }


MEMORY = {"private": PC, "file": FILE}


@pytest.mark.parametrize(
    ("how", "memory", "engine"),
    covering(
        (
            (how, memory, engine)
            for how in ("another user", "chroot", "another user in a chroot", "namespaces")
            for memory in MEMORY
            for engine in ("direct", "qemu")
        ),
        short=[
            ("another user", "private", "direct"),
            ("another user", "file", "qemu"),
            ("chroot", "file", "direct"),
            ("another user in a chroot", "private", "direct"),
            ("another user in a chroot", "file", "qemu"),
            ("namespaces", "private", "direct"),
            ("namespaces", "private", "qemu"),
        ],
    ),
)
def test_qemu_that_sees_another_system_is_saved(
    how: str, memory: str, engine: str, disk: Path
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root may do that")
    before, after = started_otherwise(disk)[how]
    image, serial = build(disk, RAM), disk / "serial"
    machine = [*MEMORY[memory], "-bios", str(image)]
    with BareQemu(*machine, "-serial", f"file:{serial}", *after, run=True, before=before) as qemu:
        serial_says(serial, 2)
        settings = qemu.run(found)
        report = asyncio.run(
            vm.connect(qemu.socket).save(disk / "snapshot", engine=engine, then="pause")
        )
        assert report.engine == engine
        assert qemu.run(found)[1:] == settings[1:]

        async def its_memory(monitor: Monitor) -> dict[str, bytes]:
            with await inspect(monitor) as guest:
                assert guest.pid is not None
                return await memory_of(monitor, guest.pid)

        at_the_end = qemu.run(its_memory)
    restores(disk / "snapshot", [*machine, "-serial", "null"], at_the_end, "running")


def program(directory: Path, code: bytes) -> Path:
    """A firmware that does this in real mode, and then nothing more."""
    image = bytearray(b"\x90" * (64 << 10))
    image[: len(code) + 4] = b"\xfa" + code + b"\xf4\xeb\xfd"
    image[0xFFF0:0xFFF5] = b"\xea\x00\x00\x00\xf0"
    path = directory / "program"
    path.write_bytes(image)
    return path


def _out(port: int, value: int, size: int) -> bytes:
    """Instructions that write ``size`` bytes to a port."""
    load, store = {1: (b"\xb0", b"\xee"), 2: (b"\xb8", b"\xef")}.get(
        size, (b"\x66\xb8", b"\x66\xef")
    )
    number = value.to_bytes(4, "little")[:size]
    return load + number + b"\xba" + port.to_bytes(2, "little") + store


def _power_management(state: int) -> bytes:
    """Asks the PIIX4 of machine pc for a sleeping state: 0 off, 1 to RAM."""
    place = 0x80000000 | 1 << 11 | 3 << 8
    return b"".join(
        [
            _out(0xCF8, place | 0x40, 4),
            _out(0xCFC, 0x601, 4),
            _out(0xCF8, place | 0x80, 4),
            _out(0xCFC, 1, 1),
            _out(0x604, 0x2000 | state << 10, 2),
        ]
    )


STATES: dict[str, tuple[bytes, list[str]]] = {
    "suspended": (_power_management(1), []),
    "shutdown": (_power_management(0), ["-no-shutdown"]),
    "guest-panicked": (_out(0x505, 1, 1), ["-device", "pvpanic", "-action", "panic=pause"]),
    "prelaunch": (b"", ["-S"]),
}


def in_state(qemu: BareQemu, state: str) -> None:
    async def wait(monitor: Monitor) -> None:
        deadline = time.monotonic() + 20
        while (await monitor.execute("query-status"))["status"] != state:
            assert time.monotonic() < deadline, f"the guest does not become {state}"
            await asyncio.sleep(0.02)

    qemu.run(wait)


@pytest.mark.parametrize("memory", [PC, FILE], ids=["private", "file"])
@pytest.mark.parametrize("state", STATES)
def test_guest_stays_in_the_state_that_it_is_in(state: str, memory: list[str], disk: Path) -> None:
    code, extra = STATES[state]
    machine = [*memory, "-bios", str(program(disk, code)), *(w for w in extra if w != "-S")]
    with BareQemu(*machine, *(w for w in extra if w == "-S"), run=True) as qemu:
        in_state(qemu, state)
        before = qemu.run(found)
        report = asyncio.run(vm.connect(qemu.socket).save(disk / "snapshot"))
        assert (report.run_state_before, report.run_state_after) == (state, state)
        assert qemu.run(found) == before
        content = qemu.run(lambda monitor: memory_of(monitor, qemu.process.pid))
    restores(disk / "snapshot", machine, content, state if state == "suspended" else "paused")


def test_sleeping_guest_is_not_migrated_and_wakes(disk: Path) -> None:
    """QEMU 10.0.2 aborts when a guest that was migrated in its sleep is to go on."""
    with BareQemu(*FILE, "-bios", str(program(disk, _power_management(1))), run=True) as qemu:
        in_state(qemu, "suspended")
        with pytest.raises(NotSupported, match="wake it first"):
            asyncio.run(vm.connect(qemu.socket).save(disk / "snapshot", engine="qemu"))
        asyncio.run(vm.connect(qemu.socket).save(disk / "snapshot"))

        async def wake(monitor: Monitor) -> None:
            await monitor.execute("system_wakeup")

        qemu.run(wake)
        in_state(qemu, "suspended")  # its program puts it to sleep again
