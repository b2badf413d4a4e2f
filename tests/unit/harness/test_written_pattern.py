"""The checker of the writing guest's memory: what it accepts, and that it accepts nothing more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.harness.writing_guest import (
    FILLED,
    PAGE,
    WORDS,
    ZERO_EVERY,
    GuestSetup,
    Instant,
    Pages,
    check_pattern,
    completed_pages,
)

COUNT, FILLED_COUNT = 64, 16
FIRST = (4 << 20) // PAGE
SETUP = GuestSetup(ram=5 << 20, working_set=COUNT * PAGE, filled=FILLED_COUNT * PAGE)
GENERATION = 7


def memory_at(generation: int, written: int) -> Pages:
    """All RAM after ``written`` pages of a generation."""
    memory = np.zeros((SETUP.ram // PAGE, WORDS), dtype=np.uint64)
    memory[FIRST : FIRST + COUNT] = completed_pages(generation - 1, FIRST, COUNT)
    memory[FIRST : FIRST + written] = completed_pages(generation, FIRST, written)
    end = FIRST + COUNT
    memory[end : end + FILLED_COUNT] = completed_pages(FILLED, end, FILLED_COUNT)
    return memory


@pytest.mark.parametrize("generation", range(2, 2 + ZERO_EVERY))
@pytest.mark.parametrize("written", [1, 2, COUNT // 2, COUNT - 2])
def test_instant_between_two_pages_is_found(generation: int, written: int) -> None:
    assert check_pattern(memory_at(generation, written), SETUP) == Instant(generation, written)


def test_end_of_a_generation_is_found() -> None:
    assert check_pattern(memory_at(GENERATION, COUNT), SETUP) == Instant(GENERATION, COUNT)


@pytest.mark.parametrize("words", [1, 2, 300, WORDS - 1])
def test_one_torn_page_is_where_the_guest_was(words: int) -> None:
    memory = memory_at(GENERATION, 20)
    memory[FIRST + 20, :words] = completed_pages(GENERATION, FIRST + 20, 1)[0, :words]
    assert check_pattern(memory, SETUP) == Instant(GENERATION, 20, torn=True)


def test_later_instants_are_greater() -> None:
    assert Instant(3, 5) < Instant(3, 5, torn=True) < Instant(3, 6) < Instant(4, 0)


def damage_stale(memory: Pages) -> None:
    memory[FIRST + 30] = completed_pages(GENERATION - 2, FIRST + 30, 1)


def damage_early(memory: Pages) -> None:
    memory[FIRST + 30] = completed_pages(GENERATION, FIRST + 30, 1)


def damage_lost(memory: Pages) -> None:
    memory[FIRST + 10] = 0


def damage_all_lost(memory: Pages) -> None:
    memory[FIRST : FIRST + COUNT] = 0


def damage_not_cleared(memory: Pages) -> None:
    zero = ZERO_EVERY - GENERATION  # FIRST is a multiple of ZERO_EVERY
    memory[FIRST + zero] = completed_pages(GENERATION - 1, FIRST + zero, 1)


def damage_misplaced(memory: Pages) -> None:
    memory[FIRST + 10] = memory[FIRST + 11]


def damage_last_word(memory: Pages) -> None:
    memory[FIRST + 10, -1] ^= np.uint64(1)


def damage_end(memory: Pages) -> None:
    memory[FIRST + COUNT - 1, -1] ^= np.uint64(1)


def damage_torn_and_older(memory: Pages) -> None:
    memory[FIRST + 20, 100:] = completed_pages(GENERATION - 2, FIRST + 20, 1)[0, 100:]


def damage_filled(memory: Pages) -> None:
    memory[FIRST + COUNT + 3, 17] ^= np.uint64(1 << 40)


DAMAGES = [
    damage_stale,
    damage_early,
    damage_lost,
    damage_all_lost,
    damage_not_cleared,
    damage_misplaced,
    damage_last_word,
    damage_end,
    damage_torn_and_older,
    damage_filled,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_memory_of_no_instant_is_rejected(damage: Callable[[Pages], None]) -> None:
    memory = memory_at(GENERATION, 20)
    damage(memory)
    with pytest.raises(AssertionError, match=r"no instant of the guest|filled once|were lost"):
        check_pattern(memory, SETUP)
