"""The measurements, part by part, and the turns that the contenders take."""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Sequence
from functools import partial

import pyqmigrate
from bench.compare.buffers import anonymous_savers
from bench.compare.contenders import Contender, SharedRam, load_contenders, save_contenders
from bench.compare.growth import growth
from bench.compare.lazy import lazy
from bench.compare.libvirt import libvirt_savers
from bench.compare.live import live
from bench.compare.messages import say
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
from bench.compare.vm import MEMFD_WORK, chatterer, memfd_savers, restores, vm_savers
from bench.disk import Disk
from bench.results import GIB, MIB, OURS, Results, Sample
from tests.harness.contents import Contents, data_pages, fill

__all__ = ["Bench"]

# Who took longer than both, the first time, is not repeated as often.
_SLOW = 4.0  # times the fastest
_SLOW_SECONDS = 10.0
_SCAN_ROUNDS = 9
_SEAL_ROUNDS = 7  # at least: a few percent must be distinguished
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
