"""Memory that is mostly holes: the time and the extra memory that saving and loading it costs.

``python -m bench.compare.sparse DIR SIZE DATA`` is the process that is measured: it saves and loads
a memfd of SIZE bytes of which DATA are data, prints each step before it begins, and waits for a
line on standard input.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pyqmigrate
from bench.results import Sample

__all__ = [
    "SPARSE_ALONE",
    "SPARSE_WIDE",
    "TEBIBYTE_WORK",
    "Footprint",
    "save_memfd",
    "sparse_memfd",
    "watch_child",
]

SPARSE_ALONE, SPARSE_WIDE = "1 GiB alone", "64 GiB"
TEBIBYTE_WORK = "1 TiB sparse"
PIECE = 1 << 20
MEMFD = "sparse-guest"


@contextlib.contextmanager
def sparse_memfd(size: int, data: int, *, seed: int = 0, sealed: bool = True) -> Iterator[int]:
    """A memfd of ``size`` bytes with ``data`` bytes of random pages, in pieces of 1 MiB at random
    places. A sealed one cannot shrink (QEMU's own memfds are like that), and is mapped for a save;
    another is read."""
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealed else 0)
    fd = os.memfd_create(MEMFD, flags)
    try:
        os.ftruncate(fd, size)
        random = np.random.default_rng(seed)
        for piece in random.choice(size // PIECE, data // PIECE, replace=False):
            os.pwrite(fd, random.bytes(PIECE), int(piece) * PIECE)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        yield fd
    finally:
        os.close(fd)


def resident(fd: int) -> int:
    """Bytes of memory that a memfd holds."""
    return os.fstat(fd).st_blocks * 512


def save_memfd(path: Path, fd: int, channels: int) -> Sample:
    """One save; the facts say what the memfd held before and after."""
    before = resident(fd)
    cpu, start = time.process_time(), time.perf_counter()
    report = pyqmigrate.save(
        path, [pyqmigrate.RamBlock("pc.ram", pyqmigrate.FileMemory(fd))], channels=channels
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Sample(
        seconds,
        cpu,
        {
            "resident_before": before,
            "resident_after": resident(fd),
            "data_pages": report.data_pages,
            "bytes_allocated": report.bytes_allocated,
        },
    )


class Footprint:
    """The largest that a process has been; bytes.

    ``guest`` are the pages of the memfds that it has mapped: guest memory, there already and not
    the process's own. ``own`` is all the rest, heap, bitmaps, buffers and libraries.
    """

    def __init__(self, pid: int) -> None:
        self._mappings = Path(f"/proc/{pid}/smaps")
        self.own = self.guest = 0

    def look(self) -> None:
        own = guest = 0
        of_guest = False
        for line in self._mappings.read_text().splitlines():
            if line.startswith("Rss:"):
                size = int(line.split()[1]) << 10
                own, guest = (own, guest + size) if of_guest else (own + size, guest)
            elif not line.split(" ", 1)[0].endswith(":"):  # the first line of a mapping
                of_guest = f"/memfd:{MEMFD}" in line
        self.own, self.guest = max(self.own, own), max(self.guest, guest)


def watch_child(directory: Path, size: int, data: int) -> dict[str, dict[str, Any]]:
    """Saves and loads in a process of its own. For each step what it reports, and under
    ``extra_bytes`` how much it grew at most beyond the guest's memory (looked at every 5 ms)."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "bench.compare.sparse",
        str(directory),
        str(size),
        str(data),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    results: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        while step := child.stdout.readline().strip():
            start, peak = Footprint(child.pid), Footprint(child.pid)
            start.look()
            child.stdin.write("go\n")
            child.stdin.flush()
            while not select.select([child.stdout], [], [], 0.005)[0]:
                peak.look()
            if line := child.stdout.readline():
                results[step] = json.loads(line)
                results[step]["extra_bytes"] = max(0, peak.own - start.own)
                results[step]["guest_bytes"] = peak.guest
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {child.returncode}")
    if not results["check"]["equal"]:
        raise AssertionError("the sparse memory that was loaded differs")
    return results


def _announce(step: str) -> None:
    print(step, flush=True)
    sys.stdin.readline()


def _report(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def main(directory: Path, size: int, data: int) -> None:
    path = directory / "sparse.mapped"
    try:
        with sparse_memfd(size, data) as source, sparse_memfd(size, 0) as target:
            _announce("save")
            sample = save_memfd(path, source, 2)
            _report({"seconds": sample.seconds, **sample.facts})
            _announce("load")
            start = time.perf_counter()
            with pyqmigrate.open_snapshot(path) as snapshot:
                snapshot.load({"pc.ram": pyqmigrate.FileMemory(target)})
            _report({"seconds": time.perf_counter() - start, "resident_after": resident(target)})
            _announce("check")
            _report({"equal": _equal(source, target)})
    finally:
        path.unlink(missing_ok=True)


def _equal(one: int, other: int) -> bool:
    """Whether two memfds have the same data; what is a hole in both is not looked at."""
    at, end = 0, os.fstat(one).st_size
    while at < end:
        starts = [_seek(fd, at, os.SEEK_DATA, end) for fd in (one, other)]
        at = min(starts)
        length = min(4 << 20, end - at)
        if os.pread(one, length, at) != os.pread(other, length, at):
            return False
        at += length
    return True


def _seek(fd: int, at: int, what: int, end: int) -> int:
    try:
        return os.lseek(fd, at, what)
    except OSError:  # ENXIO: no data after it
        return end


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
