"""A store with snapshots of a Linux guest, against the plain files.

The guest of tests/harness/linux_guest.py has files of this host's Python and documentation in its root
directory, and works on them. Snapshots: after that work (``first``), 8 seconds and a minute later, and of
another boot.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyqmigrate
from bench.compare.store_restores import first_bytes
from bench.disk import Disk
from bench.results import OURS, Sample
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.mount.private import open_private
from pyqmigrate.store import Store, add, get
from pyqmigrate.vm import sync
from tests.harness.linux_guest import Console, LinuxGuest
from tests.harness.machine import BINARY

__all__ = [
    "ADD_WORK",
    "COPY",
    "COPY_ALONE",
    "COPY_WORK",
    "DIFF_WORK",
    "FAULT_WORK",
    "FIRST",
    "FLEET_WORK",
    "LATER",
    "MOUNTED",
    "PLAIN",
    "WALK_WORK",
    "store",
]

ADD_WORK, COPY_WORK, DIFF_WORK = "store add", "store get", "diff of a sealed pair"
WALK_WORK, FAULT_WORK, FLEET_WORK = "walk, cold", "random faults, cold", "fleet verify of objects"
FIRST, LATER, MUCH_LATER, OTHER = "first", "8 s later", "a minute later", "another boot"
COPY, COPY_ALONE, PLAIN, MOUNTED = "cp and sync", "cp", "plain file", "mounted store"

_MIB, _GIB = 1 << 20, 1 << 30
_MEMORY = _GIB  # of the guest, at most
_FILES = 128 * _MIB  # of this host, in the guest, at most; an eighth of its memory
_SOURCES = ("/usr/lib/python3*/**/*", "/usr/share/doc/**/*")
_FAULTS = 20_000
_PAGE = mmap.PAGESIZE
_OBJECTS, _OBJECT_PAGES = 200, 2048
_FLEET = [sys.executable, "-m", "pyqmigrate", "fleet", "verify", "s3://bucket/fleet/"]
_FLEET += ["--jobs", "4", "--quiet"]
_WORK = """
mkdir /tmp/w
cat /bin/f* > /tmp/w/all; gzip -1 /tmp/w/all
dd if=/dev/urandom of=/tmp/w/random bs=1M count={random} 2>/dev/null
cat /bin/f?00 | tr -cs A-Za-z '\\n' | sort > /tmp/w/words
(while :; do date >> /tmp/w/log; md5sum /tmp/w/log > /tmp/w/sum; echo > /dev/ttyS0; sleep 0.1; done) > /dev/null 2>&1 &
"""
_MORE_WORK = "cat /bin/f?1? | tr -cs A-Za-z '\\n' | sort -u > /tmp/w/more"

Add = Callable[[str, str, str, Sample], None]


@dataclass(frozen=True)
class _Run:
    directory: Path
    size: int
    disk: Disk
    repeat: int
    add: Add
    guests: list[LinuxGuest] = field(default_factory=list)

    def snapshot(self, name: str) -> Path:
        return self.directory / f"{name.replace(' ', '-')}.mapped"


def store(size: int, directory: Path, disk: Disk, repeat: int, add: Add) -> None:
    """Measure everything, with a guest of ``size`` bytes, at most 1 GiB."""
    with tempfile.TemporaryDirectory(prefix="store-", dir=directory) as name:
        run = _Run(Path(name), min(size, _MEMORY), disk, repeat, add)
        if shutil.which(BINARY):
            _make_snapshots(run)
            for row in (_adds, _copies, _walks, _diffs, _restores):
                try:
                    row(run)
                except (PyqmigrateError, AssertionError) as error:
                    print(f"{row.__name__} was not measured: {error}", file=sys.stderr, flush=True)
        _fleet(run)


def _make_snapshots(run: _Run) -> None:
    size = run.size
    files = dict(_host_files(min(_FILES, size // 8)))
    for boot, moments in enumerate(((FIRST, LATER, MUCH_LATER), (OTHER,))):
        directory = run.directory / f"guest{boot}"
        directory.mkdir()
        guest = LinuxGuest(directory, megabytes=size >> 20, files=files)
        run.guests.append(guest)
        with guest.boot() as console:
            _work(console, _WORK.format(random=size // _MIB // 25))
            for moment in moments:
                if moment == LATER:
                    time.sleep(8)
                if moment == MUCH_LATER:
                    _work(console, _MORE_WORK)
                    time.sleep(45)
                path = run.snapshot(moment)
                sync.connect(guest.qmp).save(path, engine="direct", seal="xxh3-128")


def _work(console: Console, commands: str) -> None:
    console.run(commands, timeout=300)


def _host_files(limit: int) -> Iterator[tuple[str, bytes]]:
    """Yield regular files of this host, ``limit`` bytes of them, under short names."""
    total = number = 0
    for pattern in _SOURCES:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            if path.is_symlink() or not path.is_file() or total >= limit:
                continue
            data = path.read_bytes()
            total += len(data)
            yield f"bin/f{number:05}", data
            number += 1


def _adds(run: _Run) -> None:
    """Into a new store each time, from files that are in the page cache."""
    for _ in range(run.repeat):
        shutil.rmtree(run.directory / "store", ignore_errors=True)
        run.disk.clear()
        with Store.create(run.directory / "store") as opened:
            for moment in (FIRST, LATER, MUCH_LATER, OTHER):
                path = run.snapshot(moment)
                path.read_bytes()
                cpu, start = time.process_time(), time.perf_counter()
                report = add(opened, path)
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                stored = report.new_bytes + report.snapshot_bytes
                facts = {"stored": stored, "data_bytes": report.data_bytes}
                run.add(
                    ADD_WORK,
                    OURS,
                    f"{moment}, {stored / _MIB:.1f} MiB",
                    Sample(seconds, cpu, facts),
                )


def _copies(run: _Run) -> None:
    """A plain file from the store, and from a plain file: both to the fsync, the source cold. And cp
    alone, which leaves the file in the page cache."""
    source, target = run.snapshot(FIRST), run.directory / "copy"
    for number in range(run.repeat):
        for who in random.Random(number).sample((OURS, COPY, COPY_ALONE), 3):
            run.disk.clear(target)
            _make_cold(run)
            cpu, start = _processor(), time.perf_counter()
            if who == OURS:
                with Store.open(run.directory / "store") as opened:
                    get(opened, source.name, target)
            else:
                subprocess.run(["cp", "--sparse=always", source, target], check=True)
                if who == COPY:
                    subprocess.run(["sync", target], check=True)
            run.add(
                COPY_WORK, who, "1 file", Sample(time.perf_counter() - start, _processor() - cpu)
            )
            assert _same(source, target)
            target.unlink()


def _walks(run: _Run) -> None:
    """All of the file through a mapping as QEMU's, and pages of it in random order."""
    path = run.snapshot(FIRST)
    for number in range(run.repeat):
        for who in random.Random(number).sample((MOUNTED, PLAIN), 2):
            for work, touch in ((WALK_WORK, _walk), (FAULT_WORK, _fault)):
                with contextlib.ExitStack() as stack:
                    shown = path
                    if who == MOUNTED:
                        place = run.directory / "store"
                        shown = stack.enter_context(open_private(place)).path / path.name
                    _make_cold(run)
                    cpu, start = _processor(), time.perf_counter()
                    touched = touch(shown)
                    seconds = time.perf_counter() - start
                    facts = {"bytes": touched}
                    run.add(work, OURS, who, Sample(seconds, _processor() - cpu, facts))


def _walk(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(memory), _PAGE):
            memory[offset]
        return len(memory)


def _fault(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        chosen = random.Random(7)
        pages = len(memory) // _PAGE
        for _ in range(_FAULTS):
            memory[chosen.randrange(pages) * _PAGE]
        return _FAULTS * _PAGE


def _diffs(run: _Run) -> None:
    a, b = run.snapshot(FIRST), run.snapshot(LATER)
    for _ in range(run.repeat):
        cpu, start = time.process_time(), time.perf_counter()
        pyqmigrate.diff(a, b, pages=True)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        run.add(DIFF_WORK, OURS, LATER, Sample(seconds, cpu, {"bytes": a.stat().st_size}))


def _restores(run: _Run) -> None:
    def command(serial: Path) -> list[str]:
        return [*run.guests[0].command(serial)[:-1], f"unix:{serial}"]

    first_bytes(
        run.snapshot(FIRST),
        run.directory / "store",
        command,
        run.repeat,
        lambda: _make_cold(run),
        run.add,
    )


def _fleet(run: _Run) -> None:
    """200 objects of 9 MiB in moto on the loopback interface, in a process of its own."""
    memory = bytearray(random.Random(1).randbytes(_OBJECT_PAGES * _PAGE))
    path = run.directory / "guest"
    pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", memory)], seal="xxh3-128")
    with _served(path) as environment:
        for _ in range(run.repeat):
            table = run.directory / "table"
            table.unlink(missing_ok=True)
            for which in (FIRST, "second"):
                cpu, start = _processor(), time.perf_counter()
                subprocess.run(
                    [*_FLEET, "--table", table], env={**os.environ, **environment}, check=True
                )
                seconds = time.perf_counter() - start
                run.add(FLEET_WORK, OURS, which, Sample(seconds, _processor() - cpu))


_SERVER = """
import json, pathlib, sys
from tests.harness.object_store import ObjectStore
server = ObjectStore()
print(json.dumps(server.environment), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _served(path: Path) -> Iterator[dict[str, str]]:
    """Serve copies of a sealed snapshot as objects; yield the settings that reach them."""
    import json

    from pyqmigrate.store.place import open_place

    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdin is not None and server.stdout is not None
        environment = json.loads(server.stdout.readline())
        os.environ.update(environment)
        place = open_place("s3://bucket/fleet")
        for suffix in ("", ".seal"):
            data = path.with_name(path.name + suffix).read_bytes()
            for number in range(_OBJECTS):
                place.replace(f"{number:03}.mapped{suffix}", data)
        yield environment
    finally:
        server.kill()
        server.wait()


def _make_cold(run: _Run) -> None:
    """Drop the plain file and the packs from the page cache."""
    for path in (run.snapshot(FIRST), *(run.directory / "store").rglob("*")):
        if path.is_file():
            run.disk.make_cold(path)


def _processor() -> float:
    """Seconds of this process and of its children that have ended."""
    times = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(time.ru_utime + time.ru_stime for time in times)


def _same(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "-s", a, b]).returncode == 0
