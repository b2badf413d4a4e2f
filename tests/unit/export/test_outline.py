"""The outline of an increment is the converted file without its pages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import Descriptors, convert, open_snapshot
from pyqmigrate.export.outline import DecidedPages, Outline
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.snapshot.increment import IncrementSnapshot
from tests.harness.increment_files import bitmap_of, save_base, save_increment
from tests.harness.snapshots import ram

NPAGES, PAGE = 512, 4096


@pytest.fixture
def increment(tmp_path: Path) -> Path:
    memory = ram(NPAGES, density=0.5)
    save_base(tmp_path / "base", {"pc.ram": memory})
    pages = np.zeros(NPAGES, np.bool_)
    pages[[3, 4, 100]] = True
    after = memory.copy()
    after[3 * PAGE : 4 * PAGE] = 0
    after[4 * PAGE : 5 * PAGE] = 7
    save_increment(tmp_path / "increment", tmp_path / "base", {"pc.ram": after}, {"pc.ram": pages})
    return tmp_path / "increment"


def outline(path: Path, target: Path, known: DecidedPages) -> None:
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with open_snapshot(path) as snapshot:
            assert isinstance(snapshot, IncrementSnapshot)
            Outline(snapshot, Descriptors(fd)).write([known])
    finally:
        os.close(fd)
        known.close()


def test_it_has_all_but_the_pages(increment: Path, tmp_path: Path) -> None:
    outline(increment, tmp_path / "outline", DecidedPages(Bitmap(NPAGES), Bitmap(NPAGES)))
    convert(increment, tmp_path / "whole", to="mapped-ram")
    with open_snapshot(tmp_path / "whole") as whole:
        layout = whole.layouts[0]
    expected = bytearray((tmp_path / "whole").read_bytes())
    expected[layout.pages_offset : layout.pages_end] = bytes(layout.length)
    assert (tmp_path / "outline").read_bytes() == bytes(expected)
    assert os.stat(tmp_path / "outline").st_blocks * 512 < NPAGES * PAGE // 8


def test_decided_pages_are_not_looked_at(increment: Path, tmp_path: Path) -> None:
    decided = np.ones(NPAGES, np.bool_)
    decided[:8] = False
    data = np.zeros(NPAGES, np.bool_)
    data[[200, 300]] = True
    outline(increment, tmp_path / "outline", DecidedPages(bitmap_of(decided), bitmap_of(data)))
    with open_snapshot(increment) as merged, open_snapshot(tmp_path / "outline") as found:
        block = found.blocks["pc.ram"]
        present = [page for first, end, has in block.runs() if has for page in range(first, end)]
        here = [page for page in range(8) if any(merged.blocks["pc.ram"].read(page * PAGE, PAGE))]
    assert 4 in here and 3 not in here
    assert present == [*here, 200, 300]
