"""Memory that a file is read into."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import pyqmigrate._core as _core
from pyqmigrate.io.huge_buffer import huge_buffer

MIB = 1 << 20


def address_of(view: memoryview) -> int:
    with _core.ffi.from_buffer("unsigned char[]", view) as buffer:
        return int(_core.ffi.cast("uintptr_t", buffer))


@pytest.mark.parametrize("size", [1, MIB, 2 * MIB, 5 * MIB])
def test_buffer_has_the_size_and_is_aligned_and_zero(size: int) -> None:
    buffer = huge_buffer(size)
    assert len(buffer) == size
    assert address_of(buffer) % (2 * MIB) == 0
    assert bytes(buffer) == bytes(size)


def test_buffer_is_a_huge_page_where_the_machine_has_them() -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text():
        pytest.skip("the machine has no transparent huge pages")
    buffer = huge_buffer(MIB)
    buffer[0] = 1
    address = address_of(buffer)
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (field := re.match(r"(\w+): +(\S.*)", line)):
            fields[field[1]] = field[2]
    assert "hg" in fields["VmFlags"].split()
    assert "dc" in fields["VmFlags"].split()


def test_buffer_is_not_in_a_child() -> None:
    buffer = huge_buffer(MIB)
    address = address_of(buffer)
    child = os.fork()
    if child == 0:
        maps = Path("/proc/self/maps").read_text().splitlines()
        bounds = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
        os._exit(any(start <= address < end for start, end in bounds))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
