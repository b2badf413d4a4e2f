"""Compares memories: a failure names pages, not megabytes."""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap

import numpy as np

__all__ = ["assert_same_blocks", "assert_same_memory"]

PAGE = 4096
Memory = bytes | bytearray | memoryview | mmap


def assert_same_memory(got: Memory, expected: Memory, block: str = "memory") -> None:
    """AssertionError with the number of differing pages and the first of them."""
    assert len(got) == len(expected), f"{block}: {len(got)} bytes, not {len(expected)}"
    pages, wanted = (np.frombuffer(m, dtype=np.uint64).reshape(-1, 512) for m in (got, expected))
    differ = np.flatnonzero((pages != wanted).any(axis=1))
    if not len(differ):
        return
    first = int(differ[0])
    raise AssertionError(
        f"{block}: {len(differ)} of {len(pages)} pages differ, the first is page {first}: "
        f"{bytes(pages[first])[:16].hex()} where {bytes(wanted[first])[:16].hex()} was expected"
    )


def assert_same_blocks(got: Mapping[str, Memory], expected: Mapping[str, Memory]) -> None:
    """The same blocks by name, each with the same bytes."""
    assert sorted(got) == sorted(expected)
    for name in expected:
        assert_same_memory(got[name], expected[name], name)
