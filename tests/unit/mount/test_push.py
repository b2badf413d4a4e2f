"""The ranges that a client wants pushed, and what the kernel takes of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyqmigrate import UsageError
from pyqmigrate.io.plain_file import LocalPlainFile
from pyqmigrate.mount.nodes import Node
from pyqmigrate.mount.push import PushRange, push, ranges_of


def made(number: int) -> Node:
    return Node(number, "guest", "", "id", "", 8192, 8192, 0)


def test_ranges_are_of_the_newest_file_of_a_name() -> None:
    nodes = [made(3), made(4)]
    assert ranges_of([("guest", 0, 5)], nodes) == [PushRange(4, 0, 5)]


@pytest.mark.parametrize("wanted", [("other", 0, 1), ("guest", -1, 1), ("guest", 0, 0)])
def test_impossible_range_is_refused(wanted: tuple[str, int, int]) -> None:
    with pytest.raises(UsageError, match="pushed"):
        ranges_of([wanted], [made(3)])


class Kernel:
    """One that refuses the first ``refused`` pieces: it has not made the node yet."""

    def __init__(self, refused: int) -> None:
        self._left = refused
        self.taken: list[int] = []

    def store(self, node: int, offset: int, data: Sequence[bytes]) -> bool:
        self._left -= 1
        if self._left < 0:
            self.taken.append(offset)
        return self._left < 0


@pytest.fixture
def nodes(tmp_path: Path) -> Any:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    return SimpleNamespace(
        get=made,
        acquire=lambda _: LocalPlainFile(path),
        release=lambda _: None,
        files=SimpleNamespace(readers=1),
    )


def pushed(kernel: Any, nodes: Any, ready: threading.Event | None) -> int:
    board: Any = SimpleNamespace(pushed=0, is_idle=lambda: True)
    return push([PushRange(3, 0, 4096), PushRange(3, 4096, 4096)], kernel, nodes, board, ready)


def test_kernel_may_make_the_node_a_moment_after_it_was_told_of_it(nodes: Any) -> None:
    kernel, ready = Kernel(refused=20), threading.Event()
    ready.set()
    assert pushed(kernel, nodes, ready) == 8192
    assert kernel.taken == [0, 4096]


def test_piece_of_a_node_that_was_made_is_offered_once(nodes: Any) -> None:
    kernel = Kernel(refused=1)
    assert pushed(kernel, nodes, None) == 4096
    assert kernel.taken == [4096]
