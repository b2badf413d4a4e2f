"""``pyqmigrate.vm`` on a real QEMU: its saves beside QEMU's own, and restores."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.compare.contenders import ANONYMOUS, Contender, SharedRam, touch
from bench.compare.installed import installed_command
from bench.disk import Disk
from bench.results import OURS, QEMU, Sample
from pyqmigrate.vm import sync
from tests.harness.contents import Contents, fill
from tests.harness.machine import BINARY, Mode, Qemu

__all__ = [
    "INSTANT_WORK",
    "MEMFD_FULL",
    "MEMFD_WIDE",
    "MEMFD_WORK",
    "RESTORE_WORK",
    "SERIAL_WORK",
    "VM_DIRECT",
    "VM_QEMU",
    "chatterer",
    "memfd_of",
    "memfd_savers",
    "restores",
    "vm_savers",
]

VM_DIRECT, VM_QEMU = "vm save, engine direct", "vm save, engine qemu"
INSTANT_WORK, RESTORE_WORK = "instant restore", "restore of a cold file"
SERIAL_WORK = "start to serial output"
MEMFD_WORK, MEMFD_FULL, MEMFD_WIDE = "vm save memfd", "1 GiB, full", "16 GiB, 1 GiB touched"
_GIB, _MIB = 1 << 30, 1 << 20
_INSTANT_SIZES = (1, 4, 8)  # GiB
_INSTANT_DATA = 256 << 20  # bytes; the rest of the memory was never touched
_INSTANT_ROUNDS = 5
_SERIAL_ROUNDS = 9
_LOAD_CHANNELS = (2, 8, 16, 32, 64, 128)  # of QEMU's own loads

# A guest that writes a byte to its serial port for ever, a little apart: from 0xff00 on
#   mov $0x3f8,%dx; mov $'.',%al; 1: out %al,%dx; xor %cx,%cx; 2: loop 2b; jmp 1b
# and in the place where a processor starts, 0xfff0, a jump there.
_CHATTERS = {0xFF00: bytes.fromhex("baf803b02eee31c9e2feebf9"), 0xFFF0: bytes.fromhex("e90dff")}


def vm_savers(ram: SharedRam, path: Path, channels: int) -> list[Contender]:
    """Both engines of ``vm save``; the time is the report's, up to the moment of the name."""
    if not shutil.which(BINARY):
        return []
    return [
        Contender(OURS, name, partial(_save, ram, path, engine, channels))
        for name, engine in ((VM_DIRECT, "direct"), (VM_QEMU, "qemu"))
    ]


def _save(ram: SharedRam, path: Path, engine: str, channels: int) -> Sample:
    with Qemu(ram, extra=["-mem-prealloc"]) as vm:
        return _timed_save(vm, path, engine, channels)


def _timed_save(vm: Qemu, path: Path, engine: str, channels: int) -> Sample:
    vm.qmp.close()  # a monitor serves one client
    start = time.perf_counter()
    report = sync.connect(vm.socket).save(path, engine=engine, channels=channels)
    seconds = time.perf_counter() - start
    used = {name: setting.value for name, setting in report.settings.items()}
    return Sample(seconds, facts={"settings": str(used), "why": report.why})


def memfd_savers(path: Path, channels: int) -> list[Contender]:
    """Saves by engine direct of guests whose RAM is a memfd with 1 GiB of data."""
    if not shutil.which(BINARY):
        return []
    return [
        Contender(OURS, name, partial(_save_memfd, path, size, channels))
        for name, size in ((MEMFD_FULL, _GIB), (MEMFD_WIDE, 16 * _GIB))
    ]


def _save_memfd(path: Path, size: int, channels: int) -> Sample:
    memory = [
        "-machine",
        "pc,memory-backend=pc.ram",
        "-m",
        f"{size >> 20}M",
        "-object",
        f"memory-backend-memfd,id=pc.ram,size={size},share=on",
    ]
    with SharedRam(_MIB, present=False) as unused, Qemu(unused, memory=memory) as vm:
        # What is there already are a few pages of firmware; all the rest is ours to choose.
        fd = os.open(memfd_of(vm.process.pid, size), os.O_RDWR | os.O_CLOEXEC)
        try:
            random = np.random.default_rng(0)
            for piece in random.choice(size // _MIB, _GIB // _MIB, replace=False):
                os.pwrite(fd, random.bytes(_MIB), int(piece) * _MIB)
            held = os.fstat(fd).st_blocks * 512
            sample = _timed_save(vm, path, "direct", channels)
            sample.facts["grown_bytes"] = os.fstat(fd).st_blocks * 512 - held
            return sample
        finally:
            os.close(fd)


def memfd_of(pid: int, size: int) -> Path:
    """The memfd of ``size`` bytes that a process has open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if entry.readlink().name.startswith("memfd:") and entry.stat().st_size == size:
            return entry
    raise AssertionError(f"process {pid} has no memfd of {size} bytes")


def restores(
    size: int, path: Path, disk: Disk, repeat: int, add: Callable[[str, str, str, Sample], None]
) -> None:
    """Instant restores of several sizes, until the guest speaks, and loads of ``size`` bytes,
    half of them zero."""
    if not shutil.which(BINARY):
        return
    for gib in _INSTANT_SIZES:
        with _saved(gib * _GIB, path, min(_INSTANT_DATA, gib * _GIB)):
            for _ in range(_INSTANT_ROUNDS):
                add(INSTANT_WORK, OURS, f"{gib} GiB", _restore(path, gib * _GIB, "instant"))
        disk.clear(path)
    with tempfile.TemporaryDirectory(prefix="chatter-") as name:
        bios = chatterer(Path(name))
        command = installed_command(Path(name) / "installed")
        bare = path.with_name(f"{path.name}-bare")  # beside which no record is
        with _saved(size, path, size, bios=bios):
            bare.hardlink_to(path)
            for _ in range(_SERIAL_ROUNDS):
                add(SERIAL_WORK, QEMU, "fresh", _until_it_speaks(_command(size, bios)))
                for what, snapshot in (("", path), (", no record", bare)):
                    ours = [str(command), "vm", "restore", str(snapshot), "--"]
                    sample = _until_it_speaks([*ours, *_command(size, bios)])
                    add(SERIAL_WORK, OURS, f"vm restore, instant{what}", sample)
        disk.clear(path, bare)
    with _saved(size, path, size):
        runs: list[tuple[str, str, Callable[[], Sample]]] = [
            (OURS, "vm restore, load", partial(_restore, path, size, "load"))
        ]
        for count in _LOAD_CHANNELS:
            mode = Mode(channels=count, multifd=True, direct_io=True)
            runs.append((QEMU, str(mode), partial(_load, path, size, mode)))
        for n in range(max(repeat, 5)):
            # Everybody follows everybody else as often: a disk has a memory of what came before.
            for side, who, run in runs[n % len(runs) :] + runs[: n % len(runs)]:
                disk.make_cold(path)
                touch(size, ANONYMOUS)
                add(RESTORE_WORK, side, who, run())
    disk.clear(path)


@contextlib.contextmanager
def _saved(size: int, path: Path, data: int, bios: Path | None = None) -> Iterator[None]:
    """A snapshot of a guest with ``size`` bytes of RAM; one with ``bios`` is running."""
    with SharedRam(size, present=False) as ram:
        with memoryview(ram.memory)[:data] as memory:
            fill(memory, Contents.RUNS)
        with Qemu(ram, bios=bios, run=bios is not None) as vm:
            vm.qmp.close()
            sync.connect(vm.socket).save(path, then="quit")
    yield


def _command(size: int, bios: Path | None = None) -> list[str]:
    """Memory is QEMU's own, as with any command line that does not speak of it."""
    return [
        BINARY,
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "pc",
        "-m",
        f"{size >> 20}M",
        *(["-bios", str(bios), "-serial", "stdio"] if bios else []),
    ]


def _restore(path: Path, size: int, mode: str) -> Sample:
    with Path(os.devnull).open("r+b") as null:
        guest = sync.restore(
            path, _command(size), mode=mode, paused=True, stdin=null, stdout=null, stderr=null
        )
    guest.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guest.process.wait(30)
    report = guest.report
    return Sample(
        report.load_seconds,
        facts={
            "start_seconds": report.start_seconds,
            "total_seconds": report.total_seconds,
            "settings": str(report.settings),
        },
    )


def _load(path: Path, size: int, mode: Mode) -> Sample:
    memory = ["-machine", "pc", "-m", f"{size >> 20}M"]
    with SharedRam(_MIB, present=False) as unused, Qemu(unused, incoming=True, memory=memory) as vm:
        start = time.perf_counter()
        vm.load(path, mode, limit=900)
        return Sample(time.perf_counter() - start)


def chatterer(directory: Path) -> Path:
    """Make the firmware of a guest that does nothing but write to its serial port."""
    image = bytearray(64 << 10)
    for at, code in _CHATTERS.items():
        image[at : at + len(code)] = code
    path = directory / "chatter.bin"
    path.write_bytes(image)
    return path


def _until_it_speaks(command: Sequence[str]) -> Sample:
    """From starting the command to the first byte from the guest's serial port."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            said = os.read(process.stdout.fileno(), 1)
            seconds = time.perf_counter() - start
        finally:
            process.terminate()
    if said != b".":
        raise AssertionError(f"{' '.join(command)}: the guest did not speak")
    return Sample(seconds)
