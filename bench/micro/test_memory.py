"""Saves of every kind of guest memory, all of it data: what a page costs the processor."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from bench.disk import Disk
from bench.micro.conftest import ROOT, SIZE
from pyqmigrate import FileMemory, ProcessMemory, RamBlock
from tests.harness.contents import Contents, fill
from tests.harness.huge_pages import huge_pages

PAGE = mmap.PAGESIZE
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2
MFD_ALLOW_SEALING, MFD_HUGETLB = 2, 4

HOLDER = """
import ctypes, mmap, sys
sys.path.append(sys.argv[2])
from tests.harness.contents import Contents, fill
memory = mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with memoryview(memory) as view:
    fill(view, Contents.DENSE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def buffer(advice: int, order: list[int]) -> Iterator[mmap.mmap]:
    """Anonymous memory whose pages were touched at the places ``order`` first."""
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(advice)
        for at in order:
            memory[at] = 1
        with memoryview(memory) as view:
            fill(view, Contents.DENSE)
        yield memory


def scattered() -> list[int]:
    places = [*range(0, SIZE, PAGE)]
    random.Random(0).shuffle(places)
    return places


@contextlib.contextmanager
def file_memory(fd: int) -> Iterator[FileMemory]:
    try:
        os.ftruncate(fd, SIZE)
        with mmap.mmap(fd, SIZE) as mapping, memoryview(mapping) as view:
            fill(view, Contents.DENSE)
        yield FileMemory(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def sealed() -> Iterator[FileMemory]:
    with file_memory(os.memfd_create("guest", MFD_ALLOW_SEALING)) as memory:
        fcntl.fcntl(memory.fd, F_ADD_SEALS, F_SEAL_SHRINK)
        yield memory


@contextlib.contextmanager
def hugetlb() -> Iterator[FileMemory]:
    with huge_pages(SIZE), file_memory(os.memfd_create("guest", MFD_HUGETLB)) as memory:
        yield memory


@contextlib.contextmanager
def other_process() -> Iterator[ProcessMemory]:
    command = [sys.executable, "-c", HOLDER, str(SIZE), ROOT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        yield ProcessMemory(process.pid, int(process.stdout.readline()), SIZE)
        process.stdin.close()


KINDS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "buffer": lambda: buffer(mmap.MADV_NOHUGEPAGE, []),
    "buffer, scattered pages": lambda: buffer(mmap.MADV_NOHUGEPAGE, scattered()),
    "buffer, huge pages": lambda: buffer(mmap.MADV_HUGEPAGE, []),
    "memfd": lambda: file_memory(os.memfd_create("guest")),
    "memfd, sealed": sealed,
    "tmpfs file": lambda: file_memory(os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)),
    "hugetlb": hugetlb,
    "other process": other_process,
}


@pytest.mark.parametrize("kind", KINDS)
def test_save_of_memory(benchmark: Any, disk: Disk, target: Path, kind: str) -> None:
    processor: list[float] = []

    def save() -> None:
        before = time.process_time()
        pyqmigrate.save(target, [RamBlock("ram", memory)])
        processor.append(time.process_time() - before)

    benchmark.group = "kinds of memory"
    benchmark.extra_info.update(bytes=SIZE, processor=processor)
    with KINDS[kind]() as memory:
        benchmark.pedantic(save, setup=lambda: disk.clear(target), rounds=5)
    assert target.stat().st_blocks * 512 >= SIZE
