"""Who saves and loads, each from the same memory and to the same directory.

A contender is run once at a time, with the clock on what it is there for and nothing else: QEMU
is started before and its RAM mapped and present, so that neither is part of its time. A save
ends with its fsync, a load when the memory is complete.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import pyqmigrate
from bench.disk import Disk
from bench.results import FIO, OURS, QEMU, Sample
from tests.harness.machine import BINARY, GuestRam, MigrationFailed, Mode, Qemu

__all__ = [
    "ANONYMOUS",
    "SHARED",
    "Contender",
    "SharedRam",
    "fio_read_contenders",
    "load_contenders",
    "save_contenders",
    "save_ours",
    "sync_file",
    "touch",
]

SHARED, ANONYMOUS = "shared file", "anonymous"
_LIMIT = 900.0  # seconds for one QEMU migration
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Contender:
    """``run()`` does the work once. ``side`` is who it is: OURS, QEMU, FIO or LIBVIRT."""

    side: str
    name: str
    run: Callable[[], Sample]


class SharedRam(GuestRam):
    """Guest RAM in a nameless file on tmpfs, which QEMU and we map alike.

    With ``present`` every page is there from the start, zero ones too: as in a guest that has
    run for a while, and so that no contender pays for another's first touch.
    """

    def __init__(self, length: int, *, present: bool) -> None:
        self.length = length
        self.fd = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self.fd, length)
            if present:
                os.posix_fallocate(self.fd, 0, length)
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if present else 0)
            self.memory = mmap.mmap(self.fd, length, flags)
        except BaseException:
            os.close(self.fd)
            raise


# --- saves ----------------------------------------------------------------------------------------


def save_contenders(
    ram: SharedRam, path: Path, disk: Disk, channels: int, data: int
) -> list[Contender]:
    """``path`` does not exist when one of them starts. ``data`` is how many bytes fio writes; 0
    leaves it out."""
    contenders = [
        Contender(
            OURS,
            "file memory",
            partial(save_ours, path, pyqmigrate.FileMemory(ram.fd), channels, disk),
        ),
        Contender(OURS, "buffer", partial(save_ours, path, ram.memory, channels, disk)),
    ]
    if data and shutil.which("fio"):
        contenders += [
            Contender(FIO, name, partial(_fio_write, path, data, channels, one_file))
            for name, one_file in (("a file a job", False), ("one file", True))
        ]
    if shutil.which(BINARY):
        direct = Mode(channels=channels, multifd=True, direct_io=True)
        modes = {
            "defaults": direct,
            "zero detection legacy": replace(direct, zero_pages="legacy"),
            "zero detection none": replace(direct, zero_pages="none"),
            "buffered": Mode(channels=channels, multifd=True),
        }
        contenders += [
            Contender(QEMU, name, partial(_save_qemu, ram, path, mode))
            for name, mode in modes.items()
        ]
    return contenders


def save_ours(path: Path, memory: Any, channels: int, disk: Disk) -> Sample:
    """Save ``memory`` once."""
    cpu, start = time.process_time(), time.perf_counter()
    report = pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", memory)], channels=channels)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Sample(
        seconds,
        cpu,
        {
            "cached_bytes": disk.cached_bytes(path),
            "data_pages": report.data_pages,
            "bytes_written": report.bytes_written,
            "bytes_allocated": report.bytes_allocated,
            "direct_io": report.direct_io,
            "reason": report.direct_io_reason,
        },
    )


def _save_qemu(ram: SharedRam, path: Path, mode: Mode) -> Sample:
    with Qemu(ram, extra=["-mem-prealloc"]) as vm:
        if not mode.direct_io:  # the page cache takes new memory
            touch(ram.length, SHARED)
        cpu, start = _cpu_of(vm.process.pid), time.perf_counter()
        vm.start_save(path, mode)
        result = vm.wait(_LIMIT)
        sync_file(path)
        seconds, cpu = time.perf_counter() - start, _cpu_of(vm.process.pid) - cpu
        if result["status"] != "completed":
            raise MigrationFailed(result, vm.stderr())
    return Sample(seconds, cpu, {"bytes_allocated": path.stat().st_blocks * 512})


def _fio_write(path: Path, data: int, jobs: int, one_file: bool) -> Sample:
    share = _share(data, jobs)
    directory = path.parent / "fio"
    directory.mkdir()
    try:
        if one_file:  # at its full size from the start, as ours is
            file = directory / "one"
            file.touch()
            os.truncate(file, share * jobs)
            where = [f"--filename={file}", f"--offset_increment={share}"]
        else:
            where = [f"--directory={directory}"]
        return _fio(["--rw=write", "--fallocate=none", "--end_fsync=1", *where], share, jobs)
    finally:
        shutil.rmtree(directory)


# --- loads ----------------------------------------------------------------------------------------


def load_contenders(
    source: SharedRam, path: Path, channels: Sequence[int], *, fio: bool
) -> list[Contender]:
    """``path``, a snapshot of ``source``, is out of the page cache when one of them starts."""
    checked: set[str] = set()

    def ours(kind: str, count: int, clear: str) -> Contender:
        name = f"{kind}, {count} channels" + ("" if clear == "zero" else f", clear={clear}")

        def run() -> Sample:
            sample = _load_ours(
                path, source if name not in checked else None, source.length, kind, count, clear
            )
            checked.add(name)
            return sample

        return Contender(OURS, name, run)

    contenders = [ours(kind, n, "zero") for kind in (SHARED, ANONYMOUS) for n in channels]
    contenders.append(ours(ANONYMOUS, channels[0], "leave"))
    if fio:
        contenders += fio_read_contenders(path)
    if shutil.which(BINARY):
        both = [
            Mode(channels=n, multifd=True, direct_io=direct)
            for n in (2, 8)
            for direct in (True, False)
        ]
        modes = [(SHARED, mode) for mode in [*both, Mode()]]
        modes += [(ANONYMOUS, mode) for mode in both]
        contenders += [
            Contender(QEMU, f"{kind}, {mode}", partial(_load_qemu, path, source.length, kind, mode))
            for kind, mode in modes
        ]
    return contenders


def fio_read_contenders(path: Path) -> list[Contender]:
    """fio reading all of ``path`` directly, with some numbers of jobs; none without fio."""
    if not shutil.which("fio"):
        return []
    size = path.stat().st_size
    return [
        Contender(FIO, f"{jobs} jobs", partial(_fio_read, path, size, jobs)) for jobs in (1, 2, 4)
    ]


def _load_ours(
    path: Path, expected: SharedRam | None, length: int, kind: str, channels: int, clear: str
) -> Sample:
    touch(length, kind)
    with _fresh_memory(length, kind) as ram:
        memory = pyqmigrate.FileMemory(ram.fd) if kind == SHARED else ram.memory
        cpu, start = time.process_time(), time.perf_counter()
        with pyqmigrate.open_snapshot(path) as snapshot:
            report = snapshot.load({"pc.ram": memory}, channels=channels, clear=clear)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        if expected is not None and not _equal(expected.memory, ram.memory):
            raise AssertionError(f"the memory that was loaded ({kind}) differs")
    return Sample(
        seconds,
        cpu,
        {"data_bytes": report.data_pages * mmap.PAGESIZE, "direct_io": report.direct_io},
    )


def touch(length: int, kind: str) -> None:
    """Uses as much memory of the kind once, and gives it back.

    A virtual machine that reports its free pages to its host loses them, and has to get them
    again at a tenth of the speed: right after this, everybody finds them there.
    """
    piece = bytes(2 << 20)
    with _fresh_memory(length, kind) as ram:
        for at in range(0, length, len(piece)):
            end = min(at + len(piece), length)
            ram.memory[at:end] = piece[: end - at]


def _fresh_memory(length: int, kind: str) -> GuestRam:
    return SharedRam(length, present=False) if kind == SHARED else _AnonymousRam(length)


class _AnonymousRam(GuestRam):
    """In huge pages where there are any, as QEMU asks for with its own."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)


def _load_qemu(path: Path, length: int, kind: str, mode: Mode) -> Sample:
    with (
        SharedRam(length, present=False) as ram,
        Qemu(ram, incoming=True, private=kind == ANONYMOUS) as vm,
    ):
        touch(length, kind)
        cpu, start = _cpu_of(vm.process.pid), time.perf_counter()
        vm.load(path, mode, limit=_LIMIT)
        seconds, cpu = time.perf_counter() - start, _cpu_of(vm.process.pid) - cpu
    return Sample(seconds, cpu)


def _fio_read(path: Path, size: int, jobs: int) -> Sample:
    share = _share(size, jobs)
    if share * jobs > size:
        share -= 1 << 20
    where = [f"--filename={path}", f"--offset_increment={share}"]
    return _fio(["--rw=read", *where], share, jobs)


# --- shared by both -------------------------------------------------------------------------------


def _fio(arguments: list[str], share: int, jobs: int) -> Sample:
    """fio's own clock, of the slowest job: its start-up is not counted, its fsync is."""
    command = [
        "fio",
        "--name=job",
        "--bs=1M",
        "--ioengine=psync",
        "--direct=1",
        f"--numjobs={jobs}",
        f"--size={share}",
        "--output-format=json",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    output = json.loads(done.stdout[done.stdout.index("{") :])
    kind = "write" if "--rw=write" in arguments else "read"
    seconds = max(job[kind]["runtime"] for job in output["jobs"]) / 1000
    return Sample(seconds, facts={"data_bytes": share * jobs})


def _share(size: int, jobs: int) -> int:
    return -(-size // jobs // (1 << 20)) * (1 << 20)


def _cpu_of(pid: int) -> float:
    """User and system seconds of all threads of a process, those that have ended too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def sync_file(path: Path) -> None:
    """Sync the file, for a contender that has not: what was written is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _equal(one: mmap.mmap, other: mmap.mmap, step: int = 64 << 20) -> bool:
    return all(
        np.array_equal(
            np.frombuffer(one, np.uint64, min(step, len(one) - at) // 8, at),
            np.frombuffer(other, np.uint64, min(step, len(other) - at) // 8, at),
        )
        for at in range(0, len(one), step)
    )
