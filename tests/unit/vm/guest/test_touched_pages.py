"""The pages that a process touches in a private mapping of a file, in the order of their first touch."""

from __future__ import annotations

import itertools
import json
import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import GuestMemoryError
from pyqmigrate.format.working_set import TouchedRun
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.vm.guest import touched_pages
from pyqmigrate.vm.guest.changed_pages import RestoredBlock, RestoredRam
from pyqmigrate.vm.guest.touched_pages import Recording, record_working_set
from tests.harness.examples import some
from tests.harness.processes import PAGE, Holder

NPAGES = 2000

_CHILD = """
import ctypes, json, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    for page in json.loads(line):
        memory[page * 4096] = 1
    print("done", flush=True)
os._exit(0)
"""


class Writer:
    """A process that maps a file privately and writes to pages when it is told to."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        self.address = int(self._out.readline())

    def write(self, pages: Sequence[int]) -> None:
        self._in.write(json.dumps([*pages]) + "\n")
        self._in.flush()
        assert self._out.readline() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._in.close()
        self._out.close()


class WatchedRam(RestoredRam):
    """One whose looks can be waited for."""

    looks = 0

    def look_for_present(self, bitmaps: Sequence[Bitmap]) -> None:
        super().look_for_present(bitmaps)
        with self.changed:
            self.looks += 1
            self.changed.notify_all()

    changed = threading.Condition()

    def wait_for_two(self) -> None:
        """One that began before now may have been under way."""
        with self.changed:
            wanted = self.looks + 2
            assert self.changed.wait_for(lambda: self.looks >= wanted, timeout=60)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.mapped"
    path.write_bytes(bytes(range(256)) * (NPAGES * PAGE // 256))
    return path


@contextmanager
def recording(base: Path) -> Iterator[tuple[Writer, WatchedRam, threading.Thread, list[Recording]]]:
    """A recording that goes on until the block ends; then it is in the list."""
    stop, done = threading.Event(), list[Recording]()
    with Writer(base) as writer:
        block = RestoredBlock("pc.ram", writer.address, NPAGES * PAGE, 0)
        with WatchedRam(writer.process.pid, [block]) as ram:
            thread = threading.Thread(
                target=lambda: done.append(record_working_set(ram, 60, stop=stop))
            )
            thread.start()
            try:
                ram.wait_for_two()
                yield writer, ram, thread, done
            finally:
                stop.set()
                thread.join()


def test_pages_are_listed_in_the_order_of_their_first_touch(base: Path) -> None:
    stages = [range(1500, 1510), range(700, 701), [*range(100, 110), *range(112, 120)], [1505, 300]]
    with recording(base) as (writer, ram, _, done):
        for pages in stages:
            writer.write(pages)
            ram.wait_for_two()
    [result] = done
    assert result.complete
    assert result.looks >= 8
    assert [*result.working_set] == [
        TouchedRun(0, 1500, 10),
        TouchedRun(0, 700, 1),
        TouchedRun(0, 100, 20),  # a short gap is read along
        TouchedRun(0, 300, 1),
    ]


def test_the_end_of_the_guest_ends_the_recording_with_what_was_seen(base: Path) -> None:
    with recording(base) as (writer, ram, thread, done):
        writer.write([900])
        ram.wait_for_two()
        writer.end()
        thread.join(60)
    [result] = done
    assert not result.complete
    assert TouchedRun(0, 900, 1) in [*result.working_set]


def test_no_more_runs_are_recorded_than_a_file_takes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(touched_pages, "RUNS_MAX", 5)
    with Holder(NPAGES, range(0, NPAGES, 20), flags=mmap.MAP_PRIVATE, path=base) as holder:
        block = RestoredBlock("pc.ram", holder.address, holder.length, 0)
        with RestoredRam(holder.pid, [block]) as ram:
            result = record_working_set(ram, 60)
    assert (len(result.working_set), result.complete) == (5, False)


def test_it_ends_after_its_seconds(base: Path) -> None:
    with Holder(NPAGES, [1], flags=mmap.MAP_PRIVATE, path=base) as holder:
        block = RestoredBlock("pc.ram", holder.address, holder.length, 0)
        with RestoredRam(holder.pid, [block]) as ram:
            result = record_working_set(ram, 0.05)
            assert result.seconds >= 0.05
            holder.end()
            with pytest.raises(GuestMemoryError):
                record_working_set(ram, 1)


@some
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=20))
def test_joined_runs_cover_the_runs_and_short_gaps_only(gaps: list[tuple[int, int]]) -> None:
    runs, page = [], 0
    for gap, npages in gaps:
        runs.append((page + gap + bool(runs), npages))
        page = sum(runs[-1])
    joined = [*touched_pages._join(3, iter(runs))]
    wanted = {page for first, n in runs for page in range(first, first + n)}
    covered = [page for run in joined for page in range(run.first, run.first + run.npages)]
    assert covered == sorted(set(covered))
    assert wanted <= set(covered)
    gap_pages = [
        page
        for (first, n), (later, _) in itertools.pairwise(runs)
        if later - first - n <= 4
        for page in range(first + n, later)
    ]
    assert set(covered) - wanted == set(gap_pages)
    assert all(run.block == 3 for run in joined)
