"""A working set from what was read of a file."""

from __future__ import annotations

import pytest

from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.working_set import RUNS_MAX, TouchedRun
from pyqmigrate.vm.incoming.request_recording import working_set_of

MIB = 1 << 20
RAM = BlockLayout("ram", 2 * MIB, 4096, 100, 200, 4 * MIB)
ROM = BlockLayout("rom", 8192, 4096, 300, 400, 1 * MIB)
OUTSIDE = BlockLayout("outside", MIB, 4096, 500, 0, 0)
BLOCKS = [RAM, OUTSIDE, ROM]  # not in the order of the file


@pytest.mark.parametrize(
    ("requests", "runs"),
    [
        ([(4 * MIB, 4096)], [(0, 0, 1)]),
        ([(5 * MIB, 8192), (4 * MIB, 4096)], [(0, 256, 2), (0, 0, 1)]),  # as they were read
        ([(MIB, 4096)], [(2, 0, 1)]),
        ([(0, 4096), (3 * MIB, 4096), (6 * MIB, 4096)], []),  # before, between and after
        ([(4 * MIB - 4096, 8192)], [(0, 0, 1)]),  # begins before
        ([(6 * MIB - 4096, 8192)], [(0, 511, 1)]),  # ends after
        ([(4 * MIB + 100, 4096)], [(0, 0, 2)]),
        ([(0, 8 * MIB)], [(2, 0, 2), (0, 0, 512)]),  # of both, in the order of the file
        ([(4 * MIB, 4096)] * 3, [(0, 0, 1)]),  # read again
    ],
)
def test_reads_become_runs_of_pages(
    requests: list[tuple[int, int]], runs: list[tuple[int, int, int]]
) -> None:
    working_set, whole = working_set_of(requests, BLOCKS)
    assert [*working_set] == [TouchedRun(*run) for run in runs]
    assert whole


def test_more_reads_than_there_are_pages_end_it() -> None:
    requests = [(4 * MIB, MIB), (4 * MIB, 2 * MIB), (4 * MIB + 4096, MIB)]
    working_set, whole = working_set_of(requests, [RAM])
    assert working_set.npages <= RAM.num_pages
    assert not whole


def test_more_runs_than_a_file_can_list_end_it() -> None:
    large = BlockLayout("ram", (RUNS_MAX + 8) * 4096, 4096, 100, 200, 4 * MIB)
    requests = ((4 * MIB + number * 4096, 4096) for number in range(RUNS_MAX + 8))
    working_set, whole = working_set_of(requests, [large])
    assert len(working_set) == RUNS_MAX
    assert not whole
