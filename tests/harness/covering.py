"""Matrices of which ``make test`` runs a covering set, and ``make test-long`` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["covering"]


def covering(
    rows: Iterable[Any], short: Collection[Any], timeout: float | None = None
) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: each row is marked ``long`` unless in ``short``.

    A row of several parameters is a tuple. Each of ``short`` must be one of the rows, so that a row
    that was renamed does not leave ``make test`` unnoticed. ``timeout``, in seconds, is that of the
    long ones.
    """
    rows = list(rows)
    strange = [row for row in short if row not in rows]
    if strange:
        raise ValueError(f"not in the matrix: {strange}")
    marks = [pytest.mark.long]
    if timeout is not None:
        marks.append(pytest.mark.timeout(timeout))
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)), marks=() if row in short else marks
        )
        for row in rows
    ]
