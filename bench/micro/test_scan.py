"""The zero scan of the core, one thread, beside a plain sum and reads with the
widest vectors over the same memory."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro.conftest import SIZE, Memories
from bench.vector_read import vector_read
from pyqmigrate import _core
from tests.harness.contents import Contents

ffi, lib = _core.ffi, _core.lib


@pytest.fixture
def zeros() -> bytearray:
    memory = bytearray(SIZE)
    # Pages never written are one zero page mapped again and again, which caches too well.
    for at in range(0, SIZE, 4096):
        memory[at] = 0
    return memory


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_scan_of_zero_memory(benchmark: Any, zeros: bytearray, page_size: int) -> None:
    bits = ffi.new("uint64_t[]", SIZE // page_size // 64)
    benchmark.group = "scan"
    benchmark.extra_info["bytes"] = SIZE
    with ffi.from_buffer(zeros) as data:
        found = benchmark.pedantic(
            lib.qm_scan, args=(data, SIZE // page_size, page_size, bits), rounds=9, warmup_rounds=1
        )
    assert found == 0


def test_plain_sum_of_zero_memory(benchmark: Any, zeros: bytearray) -> None:
    benchmark.group = "scan"
    benchmark.extra_info["bytes"] = SIZE
    with ffi.from_buffer(zeros) as data:
        total = benchmark.pedantic(lib.qm_sum, args=(data, SIZE), rounds=9, warmup_rounds=1)
    assert total == 0


def test_widest_reads_of_used_memory(benchmark: Any, memories: Memories) -> None:
    benchmark.group = "scan"
    benchmark.extra_info["bytes"] = SIZE
    with ffi.from_buffer(memories(Contents.DENSE)) as data:
        address = int(ffi.cast("uintptr_t", data))
        any_bit = benchmark.pedantic(vector_read(), args=(address, SIZE), rounds=9, warmup_rounds=1)
    assert any_bit


@pytest.mark.parametrize("contents", Contents)
def test_scan_of_used_memory(benchmark: Any, memories: Memories, contents: Contents) -> None:
    bits = ffi.new("uint64_t[]", SIZE // 4096 // 64)
    benchmark.group = "scan"
    benchmark.extra_info["bytes"] = SIZE
    with ffi.from_buffer(memories(contents)) as data:
        found = benchmark.pedantic(
            lib.qm_scan, args=(data, SIZE // 4096, 4096, bits), rounds=9, warmup_rounds=1
        )
    assert found > 0


@pytest.mark.parametrize("contents", Contents)
def test_classes_of_used_memory(benchmark: Any, memories: Memories, contents: Contents) -> None:
    """Zero, filled, or the entropy: what a map reads of each page, beside the plain sum."""
    classes = ffi.new("uint16_t[]", SIZE // 4096)
    benchmark.group = "scan"
    benchmark.extra_info["bytes"] = SIZE
    with ffi.from_buffer(memories(contents)) as data:
        rc = benchmark.pedantic(
            lib.qm_classify, args=(data, SIZE // 4096, 4096, classes), rounds=9, warmup_rounds=1
        )
    assert rc == 0


def test_plain_sum_of_used_memory(benchmark: Any, memories: Memories) -> None:
    benchmark.group = "scan"
    benchmark.extra_info["bytes"] = SIZE
    with ffi.from_buffer(memories(Contents.DENSE)) as data:
        total = benchmark.pedantic(lib.qm_sum, args=(data, SIZE), rounds=9, warmup_rounds=1)
    assert total > 0
