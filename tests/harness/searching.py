"""Memories to search in, and searches in plain Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import pyqmigrate
from tests.harness.snapshots import Bytes

__all__ = [
    "PAGE",
    "SMALL_WINDOW",
    "found_by_bytes",
    "found_by_re",
    "memories",
    "save",
    "strings_of",
]

PAGE = 1024
SMALL_WINDOW = 64 * PAGE  # the smallest that a scan can have


@st.composite
def memories(draw: st.DrawFn, most: int = 200) -> Bytes:
    """Runs of pages without data, of one byte, of few values, or of text, with borders anywhere."""
    npages = draw(st.integers(1, most))
    memory = np.zeros((npages, PAGE), np.uint8)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    first = 0
    while first < npages:
        end = min(first + draw(st.integers(1, 80)), npages)
        kind = draw(st.sampled_from(["zero", "zero", "byte", "few", "text"]))
        shape = (end - first, PAGE)
        if kind == "byte":
            memory[first:end] = 97
        elif kind == "few":
            memory[first:end] = rng.choice(np.frombuffer(b"\0\0ab", np.uint8), shape)
        elif kind == "text":
            memory[first:end] = rng.choice(np.frombuffer(b"abc\n\0\xff", np.uint8), shape)
        first = end
    return memory.reshape(-1)


def save(path: Path, *blocks: tuple[str, Bytes], page_size: int = PAGE) -> None:
    pyqmigrate.save(
        path,
        [pyqmigrate.RamBlock(name, memory, page_size) for name, memory in blocks],
        sparse="exact",
    )


def found_by_bytes(memory: bytes, pattern: bytes) -> list[int]:
    """Where the pattern is, without overlaps."""
    found, at = [], memory.find(pattern)
    while at >= 0:
        found.append(at)
        at = memory.find(pattern, at + len(pattern))
    return found


def found_by_re(memory: bytes, pattern: bytes) -> list[tuple[int, bytes]]:
    return [(m.start(), m[0]) for m in re.finditer(pattern, memory) if m[0]]


def strings_of(memory: bytes, least: int, *, utf_16: bool = False) -> list[tuple[int, bytes]]:
    """As ``strings -t d`` shows them, or ``strings -e l -t d``."""
    char = rb"[\t -~]\0" if utf_16 else rb"[\t -~]"
    return [(m.start(), m[0]) for m in re.finditer(rb"(?:%s){%d,}" % (char, least), memory)]
