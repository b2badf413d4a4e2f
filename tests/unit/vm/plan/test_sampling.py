"""What samples say of memory."""

from __future__ import annotations

import mmap
import os

import pytest

from pyqmigrate.io.memory import FileMemory
from pyqmigrate.vm.plan.sampling import sample_memory
from tests.harness.guest_info import file_block, guest

MIB = 1 << 20
PAGE = 4096


@pytest.mark.parametrize("sizes", [[16], [17], [64], [100], [300], [64, 100], [16, 300]])
def test_blocks_of_any_size_are_sampled(sizes: list[int]) -> None:
    blocks = []
    for number, size in enumerate(sizes):
        fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, size * MIB)
        with mmap.mmap(fd, size * MIB) as view:
            view[:] = (b"x" * PAGE + bytes(PAGE)) * (size * MIB // 2 // PAGE)
        memory = FileMemory(fd, 0, size * MIB)
        blocks.append(file_block(str(number), size, memory=memory))
    with guest(*blocks) as one:
        found = sample_memory(one)
    assert found is not None
    assert found.length == sum(sizes) * MIB
    assert abs(found.data - found.length // 2) < found.length // 50
    assert abs(found.pieces - found.length // 2 // PAGE) < found.length // PAGE // 20
