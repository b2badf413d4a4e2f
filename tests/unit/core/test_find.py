"""Patterns and strings in bytes, compared with plain Python."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.io.byte_search import BytePattern, StringSearch
from tests.harness.searching import found_by_bytes, strings_of


@given(
    data=st.binary(max_size=40).flatmap(lambda part: st.integers(1, 9).map(lambda n: part * n)),
    alphabet=st.sampled_from([b"ab", b"\0a", b"\0\xff", b"abcdefgh"]),
    cut=st.tuples(st.integers(0, 400), st.integers(1, 8)),
    edges=st.tuples(st.integers(0, 400), st.integers(0, 400)),
)
def test_pattern_is_found_as_by_python(
    data: bytes, alphabet: bytes, cut: tuple[int, int], edges: tuple[int, int]
) -> None:
    data = bytes(alphabet[byte % len(alphabet)] for byte in data)
    start, end = sorted(min(edge, len(data)) for edge in edges)
    at = min(cut[0], max(len(data) - 1, 0))
    pattern = data[at : at + cut[1]] or b"x"
    found, position = BytePattern(pattern).find(data, start, end)
    expected = [start + each for each in found_by_bytes(data[start:], pattern)]
    assert [*found] == [each for each in expected if each < end]
    assert position == end


@given(data=st.binary(min_size=1, max_size=300), pattern=st.binary(min_size=1, max_size=4))
def test_pattern_in_any_bytes_is_found_as_by_python(data: bytes, pattern: bytes) -> None:
    data += pattern + data
    assert [*BytePattern(pattern).find(data, 0, len(data))[0]] == found_by_bytes(data, pattern)


def test_too_many_places_are_found_in_several_calls() -> None:
    data = b"ab" * 100_000
    found: list[int] = []
    position, pattern = 0, BytePattern(b"ab")
    while position < len(data):
        places, position = pattern.find(data, position, len(data))
        found += places
    assert found == [*range(0, len(data), 2)]


@given(
    data=st.lists(
        st.sampled_from([b"a", b"~\0", b"\t", b"\0", b"\n", b"\x7f", b"bc"]), max_size=80
    ).map(b"".join),
    least=st.integers(1, 6),
    width=st.sampled_from([1, 2]),
)
def test_strings_are_those_of_a_regular_expression(data: bytes, least: int, width: int) -> None:
    numbers, position = StringSearch(least, width).find(data, 0, len(data))
    runs = [*zip(numbers[::2], numbers[1::2], strict=True)]
    expected = strings_of(data, least, utf_16=width == 2)
    assert [(a, data[a:b]) for a, b in runs if (b - a) // width >= least] == expected
    # Of what is shorter only that at the edges is there: it may be part of a longer one.
    assert all((b - a) // width >= least or a < width or b >= len(data) - 1 for a, b in runs)
    assert position == len(data)


@pytest.mark.parametrize("edges", [(2, 1), (0, 5), (5, 5)])
def test_search_outside_of_the_bytes_is_refused(edges: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside of 4 bytes"):
        BytePattern(b"a").find(b"aaaa", *edges)
    with pytest.raises(ValueError, match="outside of 4 bytes"):
        StringSearch(1, 1).find(b"aaaa", *edges)
