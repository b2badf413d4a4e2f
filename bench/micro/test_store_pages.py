"""The kernels that add a snapshot to a store, one thread, beside the blake3 library for each page."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import pytest
from blake3 import blake3

from bench.micro.conftest import MIB, SIZE, Memories
from pyqmigrate import _core
from pyqmigrate.core import Block
from pyqmigrate.io.store_pages import ExaminedPages, KnownPages, examine_pages
from tests.harness.contents import Contents

lib, ffi = _core.lib, _core.ffi
PAGE, KEY = 4096, bytes(range(32))
PART = 128 * MIB  # what the library is given, and the portable kernel
CHUNK = 4 * MIB


@pytest.mark.parametrize("portable", [0, 1], ids=["vectors", "portable"])
def test_digests_of_pages(benchmark: Any, memories: Memories, portable: int) -> None:
    digests = bytearray(PART // PAGE * 16)
    benchmark.group = "store"
    benchmark.extra_info["bytes"] = PART
    with ffi.from_buffer(memories(Contents.DENSE)) as data, ffi.from_buffer(digests) as out:
        arguments = (KEY, data, PART // PAGE, portable, out)
        rc = benchmark.pedantic(lib.qm_blake3_pages, args=arguments, rounds=5, warmup_rounds=1)
    assert rc == 0


def test_digests_of_pages_by_the_library(benchmark: Any, memories: Memories) -> None:
    benchmark.group = "store"
    benchmark.extra_info["bytes"] = PART
    with memoryview(memories(Contents.DENSE)) as view:

        def digest() -> int:
            for at in range(0, PART, PAGE):
                blake3(view[at : at + PAGE], key=KEY).digest(length=16)
            return PART

        assert benchmark.pedantic(digest, rounds=3, warmup_rounds=1) == PART


@pytest.mark.parametrize("contents", Contents)
def test_examination_of_used_memory(benchmark: Any, memories: Memories, contents: Contents) -> None:
    benchmark.group = "store"
    benchmark.extra_info["bytes"] = SIZE
    block = Block(SIZE, PAGE)
    with memoryview(memories(contents)) as view:

        def examine() -> list[ExaminedPages]:
            return [
                examine_pages(KEY, block, None, at, view[at : at + CHUNK])
                for at in range(0, SIZE, CHUNK)
            ]

        found = benchmark.pedantic(examine, rounds=3, warmup_rounds=1)
    assert sum(len(part.kinds) for part in found) == SIZE // PAGE


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_lookup_of_pages(benchmark: Any, memories: Memories, known: bool) -> None:
    benchmark.group = "store"
    benchmark.extra_info["bytes"] = SIZE
    block, npages = Block(SIZE, PAGE), CHUNK // PAGE
    fresh, places = memoryview(bytearray(CHUNK)), memoryview(array("Q", bytes(8 * npages)))
    with memoryview(memories(Contents.DENSE)) as view:
        parts = [view[at : at + CHUNK] for at in range(0, SIZE, CHUNK)]
        examined = [
            examine_pages(KEY, block, None, at, part)
            for at, part in zip(itertools.count(0, CHUNK), parts, strict=False)
        ]

        def look_up(pages: KnownPages) -> int:
            count = 0
            for number, part in enumerate(parts):
                found = pages.find(part, number * npages, examined[number], fresh, places)
                count += found.fresh
            return count

        def start() -> tuple[tuple[KnownPages], dict[str, Any]]:
            pages = KnownPages(SIZE // PAGE + npages)
            if known:
                look_up(pages)
            return (pages,), {}

        count = benchmark.pedantic(look_up, setup=start, rounds=3)
    assert (count == 0) == known
