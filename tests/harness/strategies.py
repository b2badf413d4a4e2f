"""What property tests draw: pages with data, and records of pages.

Apart from the builders, because the import of Hypothesis takes longer than that of all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from tests.harness.kernel import Bits
from tests.harness.page_records import Record

__all__ = ["deltas", "page_bits", "record_lists"]


@st.composite
def page_bits(draw: st.DrawFn, npages: int) -> Bits:
    """Which pages of a block hold data: random stretches, or single pages of some density."""
    if draw(st.booleans()):
        density = draw(st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.7, 0.95, 1.0]))
        rng = np.random.default_rng(draw(st.integers(0, 999)))
        return rng.random(npages) < density
    bits = np.zeros(npages, dtype=bool)
    lengths: Sequence[int] = draw(
        st.lists(st.one_of(st.integers(1, 8), st.integers(1, 200)), min_size=1, max_size=60)
    )
    at = draw(st.integers(0, min(70, npages - 1)))
    for n, length in enumerate(lengths):
        bits[at : at + length] = n % 2 == 0
        at += length
    return bits


@st.composite
def record_lists(draw: st.DrawFn, npages: Sequence[int], page_size: int) -> list[Record]:
    found: list[Record] = []
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    for _ in range(draw(st.integers(0, 25))):
        block = draw(st.integers(0, len(npages) - 1))
        first = draw(st.integers(0, npages[block] - 1))
        # Neighbouring pages are moved together: make some.
        for k in range(first, min(first + draw(st.integers(1, 4)), npages[block])):
            kind = draw(st.sampled_from(["zero", "fill", "page", "delta"]))
            if kind == "zero":
                found.append(Record(block, k, fill=0))
            elif kind == "fill":
                found.append(Record(block, k, fill=draw(st.integers(1, 255))))
            elif kind == "page":
                found.append(Record(block, k, page=rng.bytes(page_size)))
            else:
                found.append(Record(block, k, delta=draw(deltas(page_size))))
    return found


@st.composite
def deltas(draw: st.DrawFn, page_size: int) -> tuple[tuple[int, bytes], ...]:
    left, pairs = page_size, []
    for n in range(draw(st.integers(0, 5))):
        if left < 2:
            break
        same = draw(st.integers(0 if n == 0 else 1, min(left - 1, 600)))
        changed = draw(st.integers(1, min(left - same, 300)))
        pairs.append((same, bytes([draw(st.integers(0, 255))]) * changed))
        left -= same + changed
    return tuple(pairs)
