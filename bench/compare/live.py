"""Saves of running guests, and increments: what the guest notices of them, watched from outside.

A pause is the longest time without progress that GapRecorder sees while the save runs. The guest of
tests/harness/writing_guest.py writes at a set speed in a pattern that shows any wrong page, and the
first file of each kind is held against it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.disk import Disk
from bench.results import OURS, Sample
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.io.working_set_file import working_set_path
from pyqmigrate.qmp.client import QmpClient
from pyqmigrate.vm import sync
from tests.harness.gaps import GapRecorder
from tests.harness.linux_guest import Console, LinuxGuest
from tests.harness.machine import BINARY
from tests.harness.walking_guest import WalkingGuest
from tests.harness.writing_guest import GuestSetup, WritingGuest, check_snapshot, restore, start

__all__ = [
    "AGAIN",
    "BACKGROUND_WORK",
    "CLONES_WORK",
    "CONVERGE_WORK",
    "COST_WORK",
    "INCREMENT_WORK",
    "INSTANT",
    "LINUX_WORK",
    "MEMFD",
    "STOPPED",
    "PRECOPY_WORK",
    "PRIVATE",
    "RECORDED",
    "ROWS",
    "UNRECORDED",
    "WORKING_SET_WORK",
    "live",
]

CONVERGE_WORK, BACKGROUND_WORK = "live converge, 50 MB/s", "live background"
PRECOPY_WORK, INCREMENT_WORK = "live precopy, idle guest", "increment"
LINUX_WORK, AGAIN = "increment of an idle Linux", "restore to running"
CLONES_WORK, WORKING_SET_WORK = "ten clones", "walk of the working set, cold"
COST_WORK = "guest after a save / before"
STOPPED, MEMFD, PRIVATE = "guest stopped", "memfd, 4 KiB pages", "private, huge pages"
INSTANT = "instant"
RECORDED, UNRECORDED = "with its record", "without"

_GIB, _MIB = 1 << 30, 1 << 20
_HOT = 64 * _MIB  # the working set of saves; the rest of the memory is written once
_IDLE = 4096.0 * 20  # bytes a second
_STEADY = 50e6
_BEFORE = 1.0  # seconds in which the speed of a guest is measured
_CHANGED = (40, 400)  # MiB
_WALKED = 300 * _MIB
_WALKED_MEMORY = 3 * _GIB  # at most, of that guest
_CLUSTER = 16  # pages
_CLONES = 10
_RECORD_SECONDS = 5
_LINUX_IDLE = 3.0  # seconds before an increment
_MAX_PAUSE = 0.02  # seconds

Add = Callable[[str, str, str, Sample], None]


@dataclass
class _Run:
    """What all rows need."""

    size: int
    directory: Path
    disk: Disk
    repeat: int
    add: Add
    checked: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        return self.directory / "live.snapshot"

    @property
    def base(self) -> Path:
        return self.directory / "base.mapped"

    def clear(self, *paths: Path) -> None:
        """Remove files, with what belongs to them, and wait until the disk is quiet."""
        beside = [other for path in paths for other in path.parent.glob(f"{path.name}.*")]
        self.disk.clear(*paths, *beside)

    def setup(self, hot: int = _HOT, verify: bool = False) -> GuestSetup:
        """A guest whose memory is all written, ``hot`` bytes of it again and again."""
        filled = self.size - hot - 8 * _MIB
        return GuestSetup("pc", self.size, working_set=hot, filled=filled, verify=verify)

    def hot(self) -> int:
        return min(_HOT, self.size // 8)

    def check(self, kind: str, setup: GuestSetup) -> None:
        """The first file of a kind must hold one instant of the guest."""
        if kind not in self.checked:
            check_snapshot(self.path, setup)
            self.checked.add(kind)


def live(
    size: int, directory: Path, disk: Disk, repeat: int, add: Add, rows: Sequence[str]
) -> None:
    """Measure the named rows of :data:`ROWS`, with guests of ``size`` bytes."""
    if not shutil.which(BINARY):
        return
    run = _Run(size, directory, disk, repeat, add)
    for name in rows:
        try:
            ROWS[name](run)
        except (PyqmigrateError, AssertionError, TypeError) as error:
            print(f"{name} was not measured: {error}", file=sys.stderr, flush=True)
        run.clear(run.path, run.base)


def _save(
    run: _Run, guest: WritingGuest, kind: str, *, before: float = _BEFORE, **options: Any
) -> Sample:
    """Save; the sample has the whole time, and its facts what the guest noticed."""
    run.clear(run.path)
    with GapRecorder(guest) as gaps:
        first, started = guest.pages_written(), time.monotonic()
        time.sleep(before)
        written, began = guest.pages_written(), time.monotonic()
        report = sync.connect(guest.socket).save(run.path, **options)
        during, ended = guest.pages_written(), time.monotonic()
    found = gaps.between(began, ended)
    middle = (began + ended) / 2
    usual = max(1e-9, (written - first) / (began - started))
    halves = [
        max((gap.seconds for gap in found if (gap.started_at < middle) is early), default=0.0)
        for early in (True, False)
    ]
    file = run.path.stat()
    run.check(kind, guest.setup)
    guest.wait_until_running()
    facts = {
        "pause": max(halves),
        "pause_early": halves[0],
        "pause_late": halves[1],
        "speed": (during - written) / (ended - began) / usual,
        "allocated_bytes": file.st_blocks * 512,
        "downtime_reported": report.downtime,
        "method": str(getattr(report, "method", None)),
        "rounds": getattr(report, "rounds", None),
        "changed_pages": getattr(report, "changed_pages", None),
        "load_average": os.getloadavg()[0],
    }
    return Sample(ended - began, facts=facts)


def _converge(run: _Run) -> None:
    """In turns with engine qemu, which stops the guest."""
    with start(run.setup(run.hot()), run.directory, rate=_STEADY) as guest:
        for _ in range(run.repeat):
            sample = _save(run, guest, CONVERGE_WORK, live="converge", max_pause=_MAX_PAUSE)
            run.add(CONVERGE_WORK, OURS, "converge", sample)
            run.add(CONVERGE_WORK, OURS, STOPPED, _save(run, guest, STOPPED, engine="qemu"))


def _background(run: _Run) -> None:
    """The guest writes as fast as it can. Huge pages are split by the first save of a guest, so
    each has a guest of its own."""
    for name, memory in ((MEMFD, "memfd"), (PRIVATE, "private")):
        for _ in range(run.repeat):
            with start(run.setup(run.hot()), run.directory, memory=memory) as guest:
                sample = _save(run, guest, f"{BACKGROUND_WORK} {name}", live="background")
            run.add(BACKGROUND_WORK, OURS, name, sample)


def _precopy(run: _Run) -> None:
    """In turns with engine direct of the stopped guest; a quarter of the size as well."""
    for size in (run.size, run.size // 4):
        part = _Run(size, run.directory, run.disk, run.repeat, run.add)
        name = f"{size / _GIB:g} GiB"
        with start(part.setup(part.hot()), run.directory, rate=_IDLE) as guest:
            for _ in range(run.repeat):
                sample = _save(part, guest, PRECOPY_WORK, live="precopy")
                run.add(PRECOPY_WORK, OURS, name, sample)
                part.clear(part.path)
                guest.execute("stop")
                began = time.monotonic()
                sync.connect(guest.socket).save(part.path, engine="direct", then="pause")
                plain = Sample(time.monotonic() - began)
                guest.execute("cont")
                run.add(PRECOPY_WORK, OURS, f"{name}, {STOPPED}", plain)


def _make_base(run: _Run, setup: GuestSetup) -> None:
    run.clear(run.base)
    with start(setup, run.directory, rate=_IDLE) as guest:
        sync.connect(guest.socket).save(run.base, engine="direct")


@contextlib.contextmanager
def _changed(run: _Run, setup: GuestSetup) -> Iterator[WritingGuest]:
    """A guest restored from the base that has rewritten its working set, and is idle now."""
    with restore(setup, run.base, run.directory, paused=False) as guest:
        guest.set_rate(None)
        guest.wait_for_writes(setup.working_pages)
        guest.set_rate(_IDLE)
        yield guest


def _increments(run: _Run) -> None:
    """Increments, each of a guest that was restored from the base; and restores of them, in turns
    with instant restores of the base."""
    for mib in _CHANGED:
        setup = run.setup(min(mib * _MIB, run.size // 4))
        _make_base(run, setup)
        for _ in range(run.repeat):
            with _changed(run, setup) as guest:
                sample = _save(run, guest, f"{INCREMENT_WORK} {mib}", base="auto")
            sample.facts["working_set"] = setup.working_set
            run.add(INCREMENT_WORK, OURS, f"{mib} MiB changed", sample)
        for _ in range(max(run.repeat, 5)):
            for name, path in ((INSTANT, run.base), (f"increment of {mib} MiB", run.path)):
                run.add(AGAIN, OURS, f"{name}, base of {mib}", _restore(run, setup, path))


def _restore(run: _Run, setup: GuestSetup, path: Path) -> Sample:
    began = time.monotonic()
    with restore(setup, path, run.directory, paused=False) as guest:
        guest.wait_until_running()
        return Sample(time.monotonic() - began)


def _linux(run: _Run) -> None:
    """Increments of a Linux with a shell that waits. The pause is that between QEMU's events."""
    with tempfile.TemporaryDirectory(prefix="linux-", dir=run.directory) as name:
        guest = LinuxGuest(Path(name), megabytes=run.size >> 20)
        with guest.boot():
            sync.connect(guest.qmp).save(run.base)
        for number in range(run.repeat):
            run.clear(run.path)
            sockets = [Path(name) / f"{which}-{number}" for which in ("console", "save", "watch")]
            monitors = [f"unix:{path},server=on,wait=off" for path in sockets[1:]]
            command = guest.command(sockets[0])
            command += [word for monitor in monitors for word in ("-qmp", monitor)]
            vm = sync.restore(
                run.base, command, mode="instant", paused=False, stdin=subprocess.DEVNULL
            )
            try:
                with Console(sockets[0]) as console, QmpClient.connect(sockets[2]) as watch:
                    console.wait()
                    time.sleep(_LINUX_IDLE)
                    began = time.monotonic()
                    report = sync.connect(sockets[1]).save(run.path, base="auto")
                    seconds = time.monotonic() - began
                    console.run("true")
                    watch.execute("query-status")
                    facts = {
                        "pause": _pause(watch.events),
                        "downtime_reported": report.downtime,
                        "allocated_bytes": run.path.stat().st_blocks * 512,
                    }
                run.add(LINUX_WORK, OURS, f"{run.size / _GIB:g} GiB", Sample(seconds, facts=facts))
            finally:
                vm.process.kill()
                vm.process.wait()


def _pause(events: Sequence[dict[str, Any]]) -> float:
    """The longest time from a STOP to a RESUME, by QEMU's clock."""
    longest, stopped = 0.0, None
    for event in events:
        at = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        if event["event"] == "STOP":
            stopped = at
        elif event["event"] == "RESUME" and stopped is not None:
            longest = max(longest, at - stopped)
    return longest


def _clones(run: _Run) -> None:
    """Ten increments of one base, a guest from each, all of their memory read: who shares what."""
    setup = run.setup(min(_CHANGED[0] * _MIB, run.size // 4))
    _make_base(run, setup)
    increments = [run.directory / f"clone-{number}.increment" for number in range(_CLONES)]
    try:
        with _changed(run, setup) as guest:
            for path in increments:
                sync.connect(guest.socket).save(path, base="auto")
                guest.set_rate(None)
                guest.wait_for_writes(setup.working_pages // 2)
                guest.set_rate(_IDLE)
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            guests = [
                stack.enter_context(restore(setup, path, run.directory, paused=False))
                for path in increments
            ]
            seconds = time.monotonic() - began
            for guest in guests:
                guest.wait_until_running()
                guest.execute("stop")
            for guest in guests:
                _read_all(guest)
            shares = [_shares(guest) for guest in guests]
        facts = {
            "memory_pss": sum(memory for memory, _ in shares),
            "process_pss": sum(whole for _, whole in shares),
            "base_bytes": setup.ram,
            "changed_bytes": _CLONES * setup.working_set,
        }
        run.add(CLONES_WORK, OURS, f"{_CLONES} increments", Sample(seconds, facts=facts))
    finally:
        run.clear(*increments)


def _read_all(guest: WritingGuest) -> None:
    with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:
        for offset in range(0, guest.setup.ram, 16 * _MIB):
            os.pread(memory.fileno(), 16 * _MIB, guest.ram_address + offset)


def _shares(guest: WritingGuest) -> tuple[int, int]:
    """The proportional share, in bytes, of its RAM and of the whole process."""
    memory = whole = 0
    inside = False
    for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first = int(area[1], 16)
            inside = guest.ram_address <= first < guest.ram_address + guest.setup.ram
        elif share := re.match(r"Pss:\s+(\d+) kB", line):
            whole += int(share[1]) << 10
            memory += int(share[1]) << 10 if inside else 0
    return memory, whole


def _working_set(run: _Run) -> None:
    """Instant restores of a cold file, with and without the record of an earlier one, until the
    guest has read each page of its working set."""
    size = min(_WALKED, run.size // 4)
    spread = min(run.size, _WALKED_MEMORY) * 3 // 4 // size * _CLUSTER
    with tempfile.TemporaryDirectory(prefix="walking-", dir=run.directory) as name:
        guest = WalkingGuest(Path(name), size, cluster=_CLUSTER, spread=spread)
        guest.save()
        guest.record(_RECORD_SECONDS)
        record = working_set_path(guest.path)
        aside = record.with_name("aside")
        for _ in range(max(run.repeat, 3)):
            _add_walk(run, guest, RECORDED)
            record.rename(aside)
            _add_walk(run, guest, UNRECORDED)
            aside.rename(record)


def _add_walk(run: _Run, guest: WalkingGuest, name: str) -> None:
    run.clear()
    seconds, report = guest.seconds_to_walk()
    facts = {"running": report.total_seconds, "prefetched_bytes": report.prefetched_bytes}
    run.add(WORKING_SET_WORK, OURS, name, Sample(seconds, facts=facts))


def _cost(run: _Run) -> None:
    """The speed of a guest while nothing is saved: after a save by each method, against before."""
    setup = run.setup(run.hot())
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "converge": ("memfd", {"live": "converge", "max_pause": _MAX_PAUSE}),
        "background": ("memfd", {"live": "background"}),
        "precopy": ("memfd", {"live": "precopy"}),
        "changed": ("instant", {"base": "auto"}),
    }
    for name, (memory, options) in methods.items():
        try:
            with _guest(run, setup, memory) as guest:
                for _ in range(run.repeat):
                    guest.set_rate(None)
                    before = _speed(guest)
                    guest.set_rate(_IDLE)
                    run.clear(run.path)
                    sync.connect(guest.socket).save(run.path, **options)
                    guest.set_rate(None)
                    facts = {"speed": _speed(guest) / before}
                    run.add(COST_WORK, OURS, name, Sample(0.0, facts=facts))
        except (PyqmigrateError, AssertionError, TypeError) as error:
            print(f"{COST_WORK}, {name}: not measured: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _guest(run: _Run, setup: GuestSetup, memory: str) -> Iterator[WritingGuest]:
    if memory != "instant":
        with start(setup, run.directory, memory=memory) as guest:
            yield guest
        return
    _make_base(run, setup)
    with _changed(run, setup) as guest:
        yield guest


def _speed(guest: WritingGuest) -> float:
    """The best of three half seconds: other processes of the host disturb."""
    rates = []
    for _ in range(3):
        first, began = guest.pages_written(), time.monotonic()
        time.sleep(_BEFORE / 2)
        rates.append((guest.pages_written() - first) / (time.monotonic() - began))
    return max(rates)


ROWS: dict[str, Callable[[_Run], None]] = {
    "converge": _converge,
    "background": _background,
    "precopy": _precopy,
    "increments": _increments,
    "linux": _linux,
    "clones": _clones,
    "working-set": _working_set,
    "cost": _cost,
}
