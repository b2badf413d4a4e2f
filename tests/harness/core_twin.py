"""What the core's kernels have to do, in plain Python: slow, and plain to see."""

from __future__ import annotations

import itertools
import math

import numpy as np

from tests.harness.kernel import CHUNK, Bits, Bytes


def scan(memory: Bytes, page_size: int) -> Bits:
    """Which pages hold a byte that is not zero."""
    pages = [memory[at : at + page_size].tobytes() for at in range(0, len(memory), page_size)]
    return np.array([page.count(0) != page_size for page in pages], dtype=bool)


def stretches(bits: Bits) -> list[tuple[int, int]]:
    """``[from, to)`` of the stretches of set bits."""
    found = []
    start = None
    for k, bit in enumerate([*bits.tolist(), False]):
        if bit and start is None:
            start = k
        elif not bit and start is not None:
            found.append((start, k))
            start = None
    return found


def bridged(want: Bits, longest: int, share: int) -> Bits:
    """``want`` of one chunk with the gaps that are written along.

    All gaps up to some length are, the largest for which they hold at most ``share`` percent of
    the pages wanted; no gap is longer than ``longest``.
    """
    runs = stretches(want)
    gaps = [(b[0] - a[1], a[1], b[0]) for a, b in itertools.pairwise(runs)]
    budget = int(want.sum()) * share // 100
    limit = 0
    for length in range(1, longest + 1):
        if sum(gap for gap, _, _ in gaps if gap <= length) > budget:
            break
        limit = length
    written = want.copy()
    for gap, start, stop in gaps:
        if gap <= limit:
            written[start:stop] = True
    return written


def write(
    memory: Bytes,
    page_size: int,
    policy: tuple[int, int, int],
    *,
    selection: Bits,
    prior: Bits,
    direct_len: int,
) -> tuple[Bits, Bits]:
    """``(data bits afterwards, pages written)``.

    Bytes from ``direct_len`` on are the tail, page by page, as it is for direct I/O.
    """
    max_gap, share, everything = policy
    filled = scan(memory, page_size)
    data = np.where(selection, filled, prior)
    want = selection & (filled | bool(everything))
    written = want.copy()
    direct_pages = direct_len // page_size
    for first in range(0, direct_pages, CHUNK // page_size):
        end = min(first + CHUNK // page_size, direct_pages)
        written[first:end] = bridged(want[first:end], max_gap // page_size, share)
    return data, written


def read(
    memory: Bytes, page_size: int, bits: Bits, file_pages: Bytes, *, zero_clear: bool
) -> Bytes:
    """Memory after a load, ``file_pages`` being what the file holds for every page."""
    after = memory.copy()
    for k, bit in enumerate(bits.tolist()):
        span = slice(k * page_size, (k + 1) * page_size)
        if bit:
            after[span] = file_pages[span]
        elif zero_clear:
            after[span] = 0
    return after


def sampled(page: Bytes) -> Bytes:
    """The bytes of a piece of up to 4 KiB that its entropy is estimated from: eight lines of 64 bytes."""
    lines = page.reshape(-1, 64)
    step = len(lines) // 8
    return np.concatenate([lines[g * step + (g + g // step) % step] for g in range(8)])


def entropy(data: Bytes) -> float:
    """Bits a byte, of the frequencies of all bytes."""
    counts = np.bincount(data, minlength=256)
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def estimated_entropy(page: Bytes) -> float:
    """The entropy of a page, bits a byte, as a map has it: with Miller and Madow's correction."""
    found = []
    for piece in page.reshape(-1, min(len(page), 4096)):
        sample = sampled(piece)
        distinct = len(np.unique(sample))
        found.append(entropy(sample) + (distinct - 1) / (2 * math.log(2)) * 7 / 8 / len(sample))
    return float(np.mean(np.clip(found, 0, 8)))


def page_class(page: Bytes) -> str | float:
    """``zero``, ``filled``, or the estimated entropy."""
    words = page.view(np.uint64)
    if (words == words[0]).all():
        return "filled" if words[0] else "zero"
    return estimated_entropy(page)
