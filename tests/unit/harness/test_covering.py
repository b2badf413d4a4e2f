"""What ``make test`` runs of a matrix."""

from __future__ import annotations

import pytest

from tests.harness.covering import covering


def names(parameter: object) -> list[str]:
    return [mark.name for mark in parameter.marks]  # type: ignore[attr-defined]


def test_rows_that_are_not_in_the_covering_set_are_long() -> None:
    rows = covering([("pc", 1), ("q35", 2)], short=[("q35", 2)])
    assert [(row.values, names(row)) for row in rows] == [(("pc", 1), ["long"]), (("q35", 2), [])]


def test_single_values_are_rows_and_long_ones_may_have_more_time() -> None:
    rows = covering([3, 10], short=[3], timeout=900)
    assert [(row.values, names(row)) for row in rows] == [((3,), []), ((10,), ["long", "timeout"])]


def test_row_of_the_covering_set_that_is_not_in_the_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in the matrix"):
        covering(["pc"], short=["q35"])
