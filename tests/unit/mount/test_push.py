"""The ranges that a client wants pushed."""

from __future__ import annotations

import pytest

from pyqmigrate import UsageError
from pyqmigrate.mount.nodes import Node
from pyqmigrate.mount.push import PushRange, ranges_of


def made(number: int) -> Node:
    return Node(number, "guest", "", "id", "", 8192, 8192, 0)


def test_ranges_are_of_the_newest_file_of_a_name() -> None:
    nodes = [made(3), made(4)]
    assert ranges_of([("guest", 0, 5)], nodes) == [PushRange(4, 0, 5)]


@pytest.mark.parametrize("wanted", [("other", 0, 1), ("guest", -1, 1), ("guest", 0, 0)])
def test_impossible_range_is_refused(wanted: tuple[str, int, int]) -> None:
    with pytest.raises(UsageError, match="pushed"):
        ranges_of([wanted], [made(3)])
