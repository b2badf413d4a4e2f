"""The guest of ``guest.s``: how to build it, and what its memory must look like."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = [
    "FIRST_PAGE",
    "PAGE",
    "WORDS",
    "ZERO_EVERY",
    "Instant",
    "Pages",
    "build",
    "check_pattern",
    "completed",
]

PAGE = 4096
WORDS = PAGE // 4
FIRST_PAGE = (4 << 20) // PAGE
ZERO_EVERY = 8
MUL_GENERATION = 0x9E3779B1
MUL_PAGE = 0x85EBCA6B
MUL_WORD = 0xC2B2AE35
_IMAGE_BASE = 0xFFFF0000
_IMAGE_LENGTH = 64 << 10

Pages = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Instant:
    """What the guest was doing: ``written`` pages were of ``generation``, the rest older."""

    generation: int
    written: int
    torn: bool


def build(directory: Path, ram_length: int) -> Path:
    """Assembles the image for a guest of ``ram_length`` bytes; returns its path."""
    constants = {
        "FIRST_PAGE": FIRST_PAGE,
        "END_PAGE": ram_length // PAGE,
        "ZERO_EVERY": ZERO_EVERY,
        "MUL_GENERATION": MUL_GENERATION,
        "MUL_PAGE": MUL_PAGE,
        "MUL_WORD": MUL_WORD,
    }
    symbols = [f"--defsym={name}={value:#x}" for name, value in constants.items()]
    source, object_file, image = (
        Path(__file__).with_suffix(".s"),
        directory / "guest.o",
        directory / "guest.bin",
    )
    subprocess.run(["as", "--32", *symbols, "-o", object_file, source], check=True)
    subprocess.run(
        [
            "ld",
            "-m",
            "elf_i386",
            "--oformat",
            "binary",
            f"-Ttext={_IMAGE_BASE:#x}",
            "-e",
            "start",
            "-o",
            image,
            object_file,
        ],
        check=True,
    )
    assert image.stat().st_size == _IMAGE_LENGTH
    return image


def check_pattern(memory: bytes | memoryview) -> Instant:
    """Says at which instant the guest was stopped to have this RAM.

    AssertionError if there is no such instant: a page is stale, lost, misplaced or torn.
    """
    pages = np.frombuffer(memory, dtype="<u4").reshape(-1, WORDS)[FIRST_PAGE:]
    newest = int(pages[:, 0].max())
    # A generation whose first pages are zero has not shown its number yet.
    for generation in (newest, newest + 1):
        instant = _instant(pages, generation)
        if instant is not None:
            return instant
    raise AssertionError(_first_difference(pages, newest))


def completed(generation: int, count: int) -> Pages:
    """The ``count`` pages from FIRST_PAGE on, right after ``generation`` was complete."""
    if generation == 0:
        return np.zeros((count, WORDS), dtype=np.uint32)
    number = np.arange(FIRST_PAGE, FIRST_PAGE + count, dtype=np.uint32)[:, None]
    word = np.arange(WORDS, dtype=np.uint32)[None, :]
    start = np.uint32(generation * MUL_GENERATION & 0xFFFFFFFF)
    pages = number * np.uint32(MUL_PAGE) + word * np.uint32(MUL_WORD) + start
    pages[:, 0] = generation
    pages[:, 1] = number[:, 0]
    pages[(number[:, 0] + generation) % ZERO_EVERY == 0] = 0
    return pages


def _instant(pages: Pages, generation: int) -> Instant | None:
    if generation == 0:
        return None if pages.any() else Instant(0, len(pages), torn=False)
    new = completed(generation, len(pages))
    is_new = (pages == new).all(axis=1)
    written = len(pages) if is_new.all() else int(is_new.argmin())
    if written == len(pages):
        return Instant(generation, written, torn=False)
    rest, old = pages[written:], completed(generation - 1, len(pages))[written:]
    if not np.array_equal(rest[1:], old[1:]):
        return None
    if np.array_equal(rest[0], old[0]):
        return Instant(generation, written, torn=False)
    words = int((rest[0] != new[written]).argmax())
    torn = np.array_equal(rest[0][words:], old[0][words:])
    return Instant(generation, written, torn=True) if torn else None


def _first_difference(pages: Pages, generation: int) -> str:
    new, old = (completed(max(g, 0), len(pages)) for g in (generation, generation - 1))
    is_new, is_old = ((pages == expected).all(axis=1) for expected in (new, old))
    neither = np.flatnonzero(~is_new & ~is_old)
    return (
        f"no instant of the guest has this memory: newest generation {generation}, "
        f"{int(is_new.sum())} pages of it, {int(is_old.sum())} of the one before, "
        f"{len(neither)} of neither, first at pages {(neither[:5] + FIRST_PAGE).tolist()}"
    )
