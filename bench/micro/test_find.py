"""A search on a cold file, beside plain direct reads of the same data: two threads each."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import Memories
from pyqmigrate import MappedRamBlock, RamBlock, open_snapshot, save
from pyqmigrate.analysis.search import find
from pyqmigrate.analysis.text_search import strings
from tests.harness.contents import Contents

_PIECE = 4 << 20
_THREADS = 2


def read(path: Path) -> None:
    """Read the pages with data, past the page cache."""
    with open_snapshot(path) as snapshot:
        block = snapshot.blocks["pc.ram"]
        assert isinstance(block, MappedRamBlock)
        runs = [(first * 4096, end * 4096) for first, end, data in block.runs() if data]
        offset = block.pages_offset
    pieces = iter(
        [(at, min(_PIECE, end - at)) for start, end in runs for at in range(start, end, _PIECE)]
    )
    lock, fd = threading.Lock(), os.open(path, os.O_RDONLY | os.O_DIRECT)

    def work() -> None:
        with mmap.mmap(-1, _PIECE) as buffer, memoryview(buffer) as view:
            while True:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                with view[: piece[1]] as part:
                    os.preadv(fd, [part], offset + piece[0])

    threads = [threading.Thread(target=work) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)


def find_text(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        find(snapshot, b"BEGIN RSA PRIVATE KEY", channels=_THREADS).count()


def find_expression(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        expression = rb"[a-z0-9.]+@[a-z]+\.com"
        find(snapshot, expression, regex=True, channels=_THREADS).count()


def find_strings(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        strings(snapshot, 8, channels=_THREADS).count()


WORK: list[Callable[[Path], None]] = [read, find_text, find_expression, find_strings]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_find(
    benchmark: Any, memories: Memories, disk: Disk, target: Path, work: Callable[[Path], None]
) -> None:
    save(target, [RamBlock("pc.ram", memories(Contents.RUNS))])
    with open_snapshot(target) as snapshot:
        block = snapshot.blocks["pc.ram"]
        benchmark.extra_info["bytes"] = block.data_pages * block.page_size
    benchmark.group = "find"

    benchmark.pedantic(work, args=(target,), setup=lambda: disk.make_cold(target), rounds=5)
