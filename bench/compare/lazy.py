"""Lazy restores: how soon a guest speaks, beside the other modes, and what its pages cost.

The first byte is measured through the command, as a user meets it: from QEMU's start (a script tells
when, and becomes QEMU), and from the moment at which another monitor of that QEMU has answered its first
command. A store with 20 ms a request is an object store of the tests in a process of its own.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyqmigrate
from bench.compare.contenders import SharedRam
from bench.disk import Disk
from bench.results import OURS, Sample
from pyqmigrate import open_snapshot, seal, vm
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.store import Store, add
from pyqmigrate.vm import sync
from tests.harness.contents import Contents, fill
from tests.harness.lazy_guests import server_of
from tests.harness.machine import BINARY, Qemu
from tests.harness.unpacked import newer_qemu
from tests.harness.walking_guest import WalkingGuest

__all__ = [
    "AFTER_EXEC_WORK",
    "BYTE_WORK",
    "FIRST_RUN",
    "LATENCY_WORK",
    "PUSH_WORK",
    "REMOTE",
    "SECOND_RUN",
    "WORKLOAD_WORK",
    "lazy",
]

BYTE_WORK = "first byte after QEMU's monitor answers"
AFTER_EXEC_WORK = "first byte after QEMU's start"
PUSH_WORK, LATENCY_WORK = "lazy push", "lazy fault"
WORKLOAD_WORK = "lazy workload, 20 ms a request"
FIRST_RUN, SECOND_RUN, REMOTE = "first run", "recorded", "lazy 8 GiB, 20 ms a request"
_MIB, _GIB = 1 << 20, 1 << 30
_SIZES = {"64 MiB": 64 * _MIB, "1 GiB": _GIB, "8 GiB": 8 * _GIB}
_DATA = 128 * _MIB  # of the guest's memory, at most; the rest was never touched
_MODES = ("lazy", "instant", "load")
_ROUNDS, _REMOTE_ROUNDS, _PUSH_ROUNDS = 7, 5, 3
_DELAY = 0.02  # seconds
_PUSHED = _GIB
_SAMPLE = 0.01  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")
_WALKED = 8 * _MIB
_RECORD = 4.0  # seconds
_PYQMIGRATE = str(Path(sys.executable).with_name("pyqmigrate"))

Add = Callable[[str, str, str, Sample], None]


def lazy(directory: Path, disk: Disk, chatterer: Callable[[Path], Path], add_sample: Add) -> None:
    """Measure all rows; ``chatterer`` makes the guest's firmware in a directory."""
    if not shutil.which(BINARY):
        return
    with tempfile.TemporaryDirectory(prefix="lazy-", dir=directory) as name:
        place = Path(name)
        # As pip leaves it; in a tree of one's own it may not be.
        compileall.compile_dir(Path(pyqmigrate.__file__).parent, quiet=1)
        bios = chatterer(place)
        for row in (_first_bytes, _remote_byte, _workload, _push, _faults):
            try:
                row(place, disk, bios, add_sample)
            except (PyqmigrateError, AssertionError) as error:
                print(f"{row.__name__}: not measured: {error}", file=sys.stderr, flush=True)


def _first_bytes(place: Path, disk: Disk, bios: Path, add_sample: Add) -> None:
    path = place / "guest.mapped"
    for name, size in _SIZES.items():
        _save(path, size, bios, Contents.RUNS, min(_DATA, size // 2))
        for number in range(_ROUNDS):
            for mode in _MODES:
                if mode == "load" and number >= _REMOTE_ROUNDS:
                    continue
                probe = _Probe(place, ["--mode", mode, str(path)], size, bios)
                for work, seconds in probe.run().items():
                    add_sample(work, OURS, f"{mode} {name}", Sample(seconds))
        disk.clear(path)


def _remote_byte(place: Path, disk: Disk, bios: Path, add_sample: Add) -> None:
    path, size, cache = place / "remote.mapped", _SIZES["8 GiB"], place / "cache"
    _save(path, size, bios, Contents.RUNS, _DATA)
    with _remote(path) as name:
        disk.clear(path)
        for _ in range(_REMOTE_ROUNDS):
            shutil.rmtree(cache, ignore_errors=True)
            words = ["--mode", "lazy", "--cache", str(cache), name]
            for work, seconds in _Probe(place, words, size, bios).run().items():
                add_sample(work, OURS, REMOTE, Sample(seconds))


def _workload(place: Path, disk: Disk, _bios: Path, add_sample: Add) -> None:
    """The walk of a guest over its working set: first with what the server chooses, then as recorded."""
    guest = WalkingGuest(place, _WALKED, cluster=16, spread=2048)
    guest.save()
    guest.mode = "lazy"
    seal(guest.path)
    cache = place / "cache"
    with _remote(guest.path) as guest.name:

        def walk(run: str) -> None:
            shutil.rmtree(cache, ignore_errors=True)
            seconds, report = guest.seconds_to_walk(cache=cache)
            assert report.lazy is not None
            facts = {"total_seconds": report.total_seconds}
            add_sample(WORKLOAD_WORK, OURS, run, Sample(seconds, facts=facts))

        walk(FIRST_RUN)
        guest.record(_RECORD)
        for _ in range(_PUSH_ROUNDS):
            walk(SECOND_RUN)
    disk.clear(guest.path)


def _push(place: Path, disk: Disk, bios: Path, add_sample: Add) -> None:
    """All pages of a stopped guest."""
    path = place / "push.mapped"
    _save(path, _PUSHED + _GIB // 4, bios, Contents.DENSE, _PUSHED)
    with path.open("rb") as file:  # it was written past the page cache
        while file.read(16 * _MIB):
            pass
    command = _command(_PUSHED + _GIB // 4, bios)
    for _ in range(_PUSH_ROUNDS):
        seconds, cpu = asyncio.run(_pushed(path, command))
        facts = {"gib_a_second": _PUSHED / _GIB / seconds, "cpu_a_gib": cpu / (_PUSHED / _GIB)}
        add_sample(PUSH_WORK, OURS, "1 GiB, dense", Sample(seconds, cpu, facts))
    disk.clear(path)


async def _pushed(path: Path, command: list[str]) -> tuple[float, float]:
    """Return how long the pages took, and the processor time of the server for them."""
    null = subprocess.DEVNULL
    guest = await vm.restore(
        path, command, mode="lazy", paused=True, stdin=null, stdout=null, stderr=null
    )
    start = time.perf_counter()
    try:
        server = server_of(guest)
        assert guest.lazy is not None
        assert server is not None
        first = last = _processor_seconds(server)
        completion = asyncio.ensure_future(guest.lazy.completed())
        while not completion.done():
            await asyncio.wait([completion], timeout=_SAMPLE)
            with contextlib.suppress(OSError):  # it has ended
                last = _processor_seconds(server)
        await completion
        return time.perf_counter() - start, last - first
    finally:
        await guest.end()


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _TICKS


def _faults(place: Path, disk: Disk, _bios: Path, add_sample: Add) -> None:
    """The mean latency of a fault, by the counter of a newer QEMU."""
    newer = newer_qemu()
    if not newer.exists():
        raise AssertionError("no QEMU with a counter of latencies (.ci/ensure-system newer-qemu)")
    directory = place / "faults"
    directory.mkdir()
    guest = WalkingGuest(directory, _WALKED, cluster=16, spread=1024)
    guest.save()
    for _ in range(_PUSH_ROUNDS):
        facts = asyncio.run(_fault_latency(guest, newer))
        add_sample(LATENCY_WORK, OURS, "local file", Sample(facts["seconds"], facts=facts))
    disk.clear(guest.path)


async def _fault_latency(guest: WalkingGuest, newer: Path) -> dict[str, Any]:
    command = [str(newer), *guest.command[1:], "-global", "migration.postcopy-blocktime=on"]
    command[command.index("-M") + 1] = _machine_of(guest.path)
    null = subprocess.DEVNULL
    restored = await vm.restore(
        guest.path, command, mode="lazy", paused=False, stdin=null, stdout=null, stderr=null
    )
    try:
        assert restored.lazy is not None
        state = await restored.lazy.completed()
        answer = await restored.monitor.execute("query-migrate")
        latency = answer.get("postcopy-latency")
        assert latency is not None, "this QEMU has no counter of latencies"
        return {"seconds": latency / 1e9, "faults": state.faults, "server": state.fault_seconds}
    finally:
        await restored.end()


def _machine_of(path: Path) -> str:
    with open_snapshot(path) as snapshot:
        return snapshot.machine


def _save(path: Path, size: int, bios: Path, contents: Contents, data: int) -> None:
    """Save a guest that runs, with so much data in its memory."""
    with SharedRam(size, present=False) as ram:
        with memoryview(ram.memory)[:data] as memory:
            fill(memory, contents)
        with Qemu(ram, bios=bios, run=True) as qemu:
            qemu.qmp.close()
            sync.connect(qemu.socket).save(path, then="quit")


def _command(size: int, bios: Path, program: str = BINARY) -> list[str]:
    words = [program, "-accel", "tcg", "-nodefaults", "-display", "none", "-machine", "pc"]
    return [*words, "-m", f"{size >> 20}M", "-bios", str(bios), "-serial", "stdio"]


class _Probe:
    """One ``vm restore``, and when things happen in it, in seconds."""

    def __init__(self, place: Path, words: list[str], size: int, bios: Path) -> None:
        self._started, self._qmp = place / "started", place / "probe.qmp"
        script = place / "qemu"
        script.write_text(f'#!/bin/sh\necho > "{self._started}"\nexec {BINARY} "$@"\n')
        script.chmod(0o755)
        self._command = [_PYQMIGRATE, "vm", "restore", *words, "--qmp", str(self._qmp), "--"]
        self._command += _command(size, bios, str(script))
        self._times: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Restore; return the seconds by the names of works."""
        self._started.unlink(missing_ok=True)
        os.mkfifo(self._started)
        threads = [threading.Thread(target=work) for work in (self._start, self._monitor)]
        null = subprocess.DEVNULL
        with subprocess.Popen(
            self._command, stdin=null, stdout=subprocess.PIPE, stderr=null
        ) as process:
            for thread in threads:
                thread.start()
            assert process.stdout is not None
            said = os.read(process.stdout.fileno(), 1)
            spoke = time.perf_counter()
            for thread in threads:
                thread.join(60)
            process.terminate()
        if said != b".":
            raise AssertionError(f"{' '.join(self._command)}: the guest did not speak")
        return {
            BYTE_WORK: spoke - self._times["monitor"],
            AFTER_EXEC_WORK: spoke - self._times["start"],
        }

    def _start(self) -> None:
        with self._started.open() as fifo:
            fifo.read()
        self._times["start"] = time.perf_counter()

    def _monitor(self) -> None:
        deadline = time.perf_counter() + 30
        while time.perf_counter() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as monitor:
                monitor.connect(str(self._qmp))
                monitor.sendall(b'{"execute":"qmp_capabilities"}\n')
                answers = b""
                while answers.count(b"\n") < 2:  # the greeting, and the answer
                    answers += monitor.recv(1 << 16)
                self._times["monitor"] = time.perf_counter()
                return
            time.sleep(0.001)


_SERVER = """
import json, sys, time
from tests.harness.quick_objects import QuickObjectStore
server = QuickObjectStore()
print(json.dumps(server.environment), flush=True)
for line in sys.stdin:
    server.delay = float(line)
    print(flush=True)
"""


@contextlib.contextmanager
def _remote(path: Path) -> Iterator[str]:
    """Yield the name of a snapshot in an object store that waits 20 ms before each answer."""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as server:
        try:
            assert server.stdin is not None
            assert server.stdout is not None
            os.environ.update(json.loads(server.stdout.readline()))
            with Store.create("s3://bucket/lazy") as store:
                add(store, path, name="guest")
            server.stdin.write(f"{_DELAY}\n")
            server.stdin.flush()
            server.stdout.readline()
            yield "s3://bucket/lazy#guest"
        finally:
            server.kill()
