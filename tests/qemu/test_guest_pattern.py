"""The checker of the running guest's memory: what it accepts, and that it does not accept more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.harness.pattern_guest import (
    FIRST_PAGE,
    PAGE,
    WORDS,
    ZERO_EVERY,
    Instant,
    Pages,
    check_pattern,
    completed,
)

COUNT = 64
GENERATION = 7


def memory_at(generation: int, written: int) -> Pages:
    """All RAM, the part below FIRST_PAGE included, after ``written`` pages of a generation."""
    memory = np.zeros((FIRST_PAGE + COUNT, WORDS), dtype=np.uint32)
    memory[FIRST_PAGE:] = completed(generation - 1, COUNT)
    memory[FIRST_PAGE : FIRST_PAGE + written] = completed(generation, COUNT)[:written]
    return memory


@pytest.mark.parametrize("generation", range(1, 2 * ZERO_EVERY + 1))
@pytest.mark.parametrize("written", [1, 2, COUNT // 2, COUNT - 2])
def test_instant_between_two_pages_is_found(generation: int, written: int) -> None:
    found = check_pattern(memory_at(generation, written).tobytes())
    assert found == Instant(generation, written, torn=False)


def test_end_of_a_generation_is_found() -> None:
    found = check_pattern(memory_at(GENERATION, COUNT).tobytes())
    assert found == Instant(GENERATION, COUNT, torn=False)


def test_untouched_memory_is_generation_zero() -> None:
    assert check_pattern(bytes((FIRST_PAGE + COUNT) * PAGE)).generation == 0


@pytest.mark.parametrize("words", [1, 2, 500, WORDS - 1])
def test_one_torn_page_is_where_the_guest_was(words: int) -> None:
    memory = memory_at(GENERATION, 20)
    memory[FIRST_PAGE + 20, :words] = completed(GENERATION, COUNT)[20, :words]
    assert check_pattern(memory.tobytes()) == Instant(GENERATION, 20, torn=True)


def damage_stale(memory: Pages) -> None:
    memory[FIRST_PAGE + 30] = completed(GENERATION - 2, COUNT)[30]


def damage_early(memory: Pages) -> None:
    memory[FIRST_PAGE + 30] = completed(GENERATION, COUNT)[30]


def damage_lost(memory: Pages) -> None:
    memory[FIRST_PAGE + 10] = 0


def damage_not_cleared(memory: Pages) -> None:
    zero = ZERO_EVERY - GENERATION  # FIRST_PAGE is a multiple of ZERO_EVERY
    memory[FIRST_PAGE + zero] = completed(GENERATION - 1, COUNT)[zero]


def damage_misplaced(memory: Pages) -> None:
    memory[FIRST_PAGE + 10] = memory[FIRST_PAGE + 11]


def damage_last_word(memory: Pages) -> None:
    memory[FIRST_PAGE + 10, -1] ^= 1


def damage_end(memory: Pages) -> None:
    memory[-1, -1] ^= 1


DAMAGES = [
    damage_stale,
    damage_early,
    damage_lost,
    damage_not_cleared,
    damage_misplaced,
    damage_last_word,
    damage_end,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_memory_that_never_was_is_refused(damage: Callable[[Pages], None]) -> None:
    memory = memory_at(GENERATION, 20)
    damage(memory)
    with pytest.raises(AssertionError, match="no instant of the guest"):
        check_pattern(memory.tobytes())
