"""This package, QEMU and fio side by side: the same memory, the same directory, taking turns.

    python bench/compare --dir /var/tmp --size 4GiB --json speed.json --plot speed.png

Every run is timed to its fsync. What counts is the ratio of medians within one run of this
program: disks and shared machines drift. A row of the last table says ``reached`` or ``missed``;
the exit status does not depend on it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Last, so that an installed pyqmigrate comes before a tree whose core is not compiled.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import pyqmigrate
from bench.compare.buffers import anonymous_savers
from bench.compare.contenders import Contender, SharedRam, load_contenders, save_contenders
from bench.compare.growth import draw_growth, growth
from bench.compare.lazy import lazy
from bench.compare.libvirt import libvirt_savers
from bench.compare.live import ROWS, live
from bench.compare.picture import draw
from bench.compare.pool import pool
from bench.compare.processor import PYTHON_WORK, measure_scan, save_with_core_clock
from bench.compare.scale import channels, file_systems
from bench.compare.seal import seals
from bench.compare.sparse import (
    SPARSE_ALONE,
    SPARSE_WIDE,
    TEBIBYTE_WORK,
    save_memfd,
    sparse_memfd,
    watch_child,
)
from bench.compare.store import store
from bench.compare.verdicts import verdicts
from bench.compare.vm import MEMFD_WORK, chatterer, memfd_savers, restores, vm_savers
from bench.disk import Disk, NotADisk
from bench.results import GIB, MIB, OURS, Results, Sample, table
from tests.harness.contents import Contents, data_pages, fill
from tests.harness.machine import BINARY

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "scan",
    "saves",
    "cpu",
    "loads",
    "sparse",
    "seals",
    "memfd",
    "restores",
    "pool",
    "lazy",
    "live",
    "store",
    "filesystems",
    "channels",
    "growth",
)
# Who took longer than both, the first time, is not repeated as often.
_SLOW = 4.0  # times the fastest
_SLOW_SECONDS = 10.0
_SCAN_ROUNDS = 9
_SEAL_ROUNDS = 7  # at least: a few percent must be distinguished
_COPIES = 4  # of the guest's memory for saves: shared, two anonymous, libvirt's guest
_LOAD_CHANNELS = (4, 8)  # besides --channels


class Bench:
    """One run of this program, on ``disk``."""

    def __init__(self, options: argparse.Namespace, disk: Disk) -> None:
        self.size: int = options.size
        self.repeat: int = options.repeat
        self.slow_repeat: int = options.slow_repeat
        self.channels: int = options.channels
        self.live_rows: list[str] = options.live
        self.contents = [Contents(name) for name in options.contents]
        self.disk = disk
        self.path = disk.directory / "guest.mapped"
        self.results = Results()

    def run(self, parts: Sequence[str]) -> None:
        if "scan" in parts:
            measure_scan(min(GIB, self.size), _SCAN_ROUNDS, self.results)
        if {"saves", "cpu", "loads"} & set(parts):
            with SharedRam(self.size, present=True) as ram:
                for contents in self.contents:
                    if parts == ["loads"] and contents is Contents.SPECKLED:
                        continue
                    say(f"filling {self.size / GIB:g} GiB, {contents}")
                    with memoryview(ram.memory) as memory:
                        fill(memory, contents)
                    if "saves" in parts:
                        self.saves(ram, contents)
                    if "cpu" in parts:
                        self.python(ram, contents)
                    if "loads" in parts and contents is not Contents.SPECKLED:
                        self.loads(ram, contents)
        if "sparse" in parts:
            self.sparse()
            self.tebibyte()
        if "seals" in parts:
            seals(
                self.size,
                self.path,
                self.disk,
                self.channels,
                max(self.repeat, _SEAL_ROUNDS),
                self.take_turns,
                self.add,
            )
        if "memfd" in parts:
            self.take_turns(MEMFD_WORK, memfd_savers(self.path, self.channels), self.make_room)
            self.make_room()
        if "restores" in parts:
            restores(self.size, self.path, self.disk, self.repeat, self.add)
        if "pool" in parts:
            pool(self.disk.directory, self.disk, chatterer, self.add)
        if "lazy" in parts:
            lazy(self.disk.directory, self.disk, chatterer, self.add)
        if "live" in parts:
            live(self.size, self.disk.directory, self.disk, self.repeat, self.add, self.live_rows)
        if "store" in parts:
            store(self.size, self.disk.directory, self.disk, self.repeat, self.add)
        if "filesystems" in parts:
            file_systems(self.size, self.disk.directory, self.channels, self.take_turns)
        if "channels" in parts:
            channels(self.size, self.take_turns)
        if "growth" in parts:
            growth(self.disk.directory, self.disk.clear, self.add)

    def saves(self, ram: SharedRam, contents: Contents) -> None:
        # fio has no zero pages to leave out: it is a peer for memory without any.
        pages = int(data_pages(contents, self.size // 4096).sum())
        data = pages * 4096 if contents is Contents.DENSE else 0
        contenders = save_contenders(ram, self.path, self.disk, self.channels, data)
        contenders += vm_savers(ram, self.path, self.channels)
        with (
            anonymous_savers(ram, self.path, self.channels, self.disk) as anonymous,
            libvirt_savers(ram, self.path, self.channels) as theirs,
        ):
            contenders += [*anonymous, *theirs]
            self.take_turns(f"save {contents}", contenders, self.make_room)
        self.make_room()

    def python(self, ram: SharedRam, contents: Contents) -> None:
        contender = Contender(
            OURS, contents, lambda: save_with_core_clock(self.path, ram.memory, self.channels)
        )
        self.take_turns(PYTHON_WORK, [contender], self.make_room)
        self.make_room()

    def loads(self, ram: SharedRam, contents: Contents) -> None:
        pyqmigrate.save(self.path, [pyqmigrate.RamBlock("pc.ram", ram.memory)])
        channels = (self.channels, *(n for n in _LOAD_CHANNELS if n != self.channels))
        contenders = load_contenders(ram, self.path, channels, fio=contents is Contents.DENSE)
        self.take_turns(f"load {contents}", contenders, self.make_cold)
        self.make_room()

    def sparse(self) -> None:
        say("preparing memfds of 1 GiB and of 64 GiB with 1 GiB of data each")
        with contextlib.ExitStack() as stack:
            contenders = []
            for kind in ("sealed", "unsealed"):
                for name, size in ((SPARSE_ALONE, GIB), (SPARSE_WIDE, 64 * GIB)):
                    fd = stack.enter_context(sparse_memfd(size, GIB, sealed=kind == "sealed"))
                    run = partial(save_memfd, self.path, fd, self.channels)
                    contenders.append(Contender(OURS, f"{name}, {kind}", run))
            self.take_turns("save sparse", contenders, self.make_room)
        self.make_room()

    def tebibyte(self) -> None:
        say("1 TiB with 256 MiB of data, in a process of its own")
        for step, facts in watch_child(self.disk.directory, 1 << 40, 256 * MIB).items():
            if "extra_bytes" in facts and "seconds" in facts:
                self.add(TEBIBYTE_WORK, OURS, step, Sample(facts.pop("seconds"), facts=facts))

    def take_turns(
        self, work: str, contenders: Sequence[Contender], before: Callable[[], None]
    ) -> None:
        """Every contender once a round, in a new order each time, so that none always follows the same."""
        first: dict[str, float] = {}
        for contender in contenders:
            self.results.expect(work, contender.side, contender.name)
        for n in range(self.repeat):
            slow = max(_SLOW_SECONDS, _SLOW * min(first.values(), default=0.0))
            for contender in random.Random(n).sample(contenders, len(contenders)):
                key = f"{contender.side} {contender.name}"
                if n >= self.slow_repeat and first[key] > slow:
                    continue
                before()
                sample = contender.run()
                first.setdefault(key, sample.seconds)
                self.add(work, contender.side, contender.name, sample)

    def add(self, work: str, side: str, name: str, sample: Sample) -> None:
        say(f"{work}: {side}, {name}: {sample.seconds:.3f} s")
        self.results.add(work, side, name, sample)

    def make_room(self) -> None:
        self.disk.clear(self.path)

    def make_cold(self) -> None:
        self.disk.make_cold(self.path)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def machine_facts(disk: Disk) -> dict[str, Any]:
    """What the numbers depend on besides the programs."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "processor": model[1] if model else platform.machine(),
        "memory_gib": round(memory / GIB, 1),
        "kernel": platform.release(),
        "filesystem": disk.filesystem,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "qemu": _version(BINARY),
        "fio": _version("fio"),
    }


def _version(program: str) -> str | None:
    if shutil.which(program) is None:
        return None
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()[0]


def byte_size(text: str) -> int:
    """``4GiB``, ``512MiB``; whole MiB."""
    match = re.fullmatch(r"(\d+)\s*(MiB|GiB)", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 4GiB")
    return int(match[1]) * (GIB if match[2] == "GiB" else MIB)


def part_list(text: str, known: Collection[str] = PARTS) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return parts


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it is at least 1")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT / "build" / "bench",
        help="directory on a disk to measure in (default: build/bench)",
    )
    parser.add_argument("--size", type=byte_size, default=4 * GIB, help="guest memory (4GiB)")
    parser.add_argument("--repeat", type=positive, default=3, help="runs of each contender (3)")
    parser.add_argument(
        "--slow-repeat",
        type=positive,
        default=1,
        help="runs of who takes over 10 s and four times the fastest (1)",
    )
    parser.add_argument("--channels", type=positive, default=2, help="channels and jobs (2)")
    parser.add_argument(
        "--only",
        type=part_list,
        default=list(PARTS),
        metavar="PARTS",
        help=f"a list with commas out of {','.join(PARTS)}",
    )
    parser.add_argument(
        "--live",
        type=partial(part_list, known=ROWS),
        default=list(ROWS),
        metavar="ROWS",
        help=f"of the part live: a list with commas out of {','.join(ROWS)}",
    )
    parser.add_argument(
        "--contents",
        type=partial(part_list, known=[*Contents]),
        default=[*Contents],
        metavar="CONTENTS",
        help=f"of the parts saves, cpu and loads: a list with commas out of {','.join(Contents)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times there")
    parser.add_argument(
        "--growth-plot", type=Path, metavar="FILE.svg", help="draw the part growth there"
    )
    return parser.parse_args()


def check_room(directory: Path, size: int, parts: Collection[str]) -> str | None:
    """Why there is not enough of something; None if there is."""
    need = 2 * max(size, GIB)
    if (free := shutil.disk_usage(directory).free) < need:
        return f"{directory} has {free / GIB:.1f} GiB free, {need / GIB:.1f} GiB are needed"
    if (free := shutil.disk_usage("/dev/shm").free) < need:
        return f"/dev/shm has {free / GIB:.1f} GiB free, {need / GIB:.1f} GiB are needed"
    need = _COPIES * size if "saves" in parts else 0
    if (free := _available_memory()) < need:
        return f"{free / GIB:.1f} GiB of memory are available, saves need {need / GIB:.1f} GiB"
    return None


def _available_memory() -> int:
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else 0


def report(bench: Bench, facts: dict[str, Any], options: argparse.Namespace) -> None:
    results = bench.results
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n")
    head = ["work", "side", "who", "median s", "range s", "runs", "processor s"]
    print(table(head, results.lines()), end="\n\n")
    found = verdicts(results)
    rows = [
        [
            v.work,
            f"{v.measured:.3g}{v.unit and ' ' + v.unit}",
            f"{'>=' if v.at_least else '<='} {v.limit:g}{v.unit and ' ' + v.unit}",
            "reached" if v.reached else "MISSED",
            v.detail,
        ]
        for v in found
    ]
    print(table(["target", "measured", "wanted", "", "from"], rows))
    if bench.disk.restless:
        print(f"\nthe disk did not become quiet before {bench.disk.restless} of the runs")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "machine": facts,
                    "size": bench.size,
                    "channels": bench.channels,
                    "repeat": bench.repeat,
                    "restless": bench.disk.restless,
                    "results": results.as_json(),
                    "targets": [{**vars(v), "reached": v.reached} for v in found],
                },
                indent=1,
            )
        )
    if options.growth_plot and not draw_growth(results, options.growth_plot):
        say("growth was not measured, so there is nothing to draw")
    if options.plot:
        title = (
            f"{bench.size / GIB:g} GiB of guest memory, {facts['cores']} cores, "
            f"{facts['filesystem']}, {facts['qemu'] or 'no QEMU'}"
        )
        if not draw(results, title, options.plot):
            say("no saves or loads were measured, so there is nothing to draw")


def main() -> int:
    options = parse_arguments()
    # What is mounted and written is removed also when the run is ended early.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.dir.mkdir(parents=True, exist_ok=True)
    try:
        Disk(options.dir)
    except NotADisk as error:
        say(f"{error}: choose another directory with --dir")
        return 2
    if reason := check_room(options.dir, options.size, options.only):
        say(reason)
        return 3
    for program in (BINARY, "fio"):
        if shutil.which(program) is None:
            say(f"{program} is not on the PATH: what is measured against it is left out")
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.dir) as name:
        bench = Bench(options, Disk(Path(name)))
        facts = machine_facts(bench.disk)
        bench.run(options.only)
    report(bench, facts, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
