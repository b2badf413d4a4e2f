"""Nodes: one number for one content, and open files that close when nobody needs them."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.mount.files import BytesFile
from pyqmigrate.mount.nodes import Node, Nodes
from pyqmigrate.mount.store_files import StoreFiles
from pyqmigrate.store import Store, remove
from tests.harness.stores import image, put_snapshot


class Memory(BytesFile):
    """A file in memory that knows whether it is open."""

    def __init__(self, content: bytes, companions: Mapping[str, bytes]) -> None:
        super().__init__(content, 5)
        self.companions = companions
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Files:
    """Contents by name, and all files that were opened."""

    readers = 1

    def __init__(self, **contents: bytes) -> None:
        self.contents = contents
        self.companions: dict[str, bytes] = {}
        self.opened: list[Memory] = []

    def names(self) -> Iterator[str]:
        yield from self.contents

    def identity(self, name: str) -> str | None:
        content = self.contents.get(name)
        return None if content is None else content.hex()

    def open(self, name: str) -> PlainFile:
        if name not in self.contents:
            raise TargetError(errno.ENOENT, "it is not there", name)
        self.opened.append(Memory(self.contents[name], dict(self.companions)))
        return self.opened[-1]

    def on_request(self, count: Callable[[bool], object]) -> None:
        """Do nothing: no place is remote."""

    def fetch_rest(self) -> None:
        raise AssertionError("nothing is fetched here")


def nodes_of(files: Files, *known: Node) -> tuple[Nodes, list[Node]]:
    announced: list[Node] = []
    return Nodes(files, known, announced.append), announced


def find(nodes: Nodes, name: str) -> Node:
    node = nodes.find(name)
    assert node is not None
    return node


def test_a_name_keeps_its_number_and_is_announced_once() -> None:
    nodes, announced = nodes_of(Files(a=b"1", b=b"2"))
    a, b = find(nodes, "a"), find(nodes, "b")
    assert (find(nodes, "a"), find(nodes, "b")) == (a, b)
    assert a.number != b.number
    assert announced == [a, b]
    assert nodes.find("c") is None


def test_another_content_gets_another_number_and_the_old_one_comes_back() -> None:
    files = Files(a=b"1")
    nodes, _ = nodes_of(files)
    old = find(nodes, "a")
    files.contents["a"] = b"22"
    new = find(nodes, "a")
    assert (new.number, new.size) == (old.number + 1, 2)
    files.contents["a"] = b"1"
    assert find(nodes, "a") == old


def test_later_worker_goes_on_with_the_numbers() -> None:
    files = Files(a=b"1", b=b"2")
    a = find(nodes_of(files)[0], "a")
    later, announced = nodes_of(files, a)
    assert find(later, "a") == a
    assert find(later, "b").number == a.number + 1
    assert [node.name for node in announced] == ["b"]


def test_removed_file_is_readable_while_it_is_open_and_stale_for_a_later_worker() -> None:
    files = Files(a=b"content")
    nodes, _ = nodes_of(files)
    a = find(nodes, "a")
    nodes.count_open(a.number)
    del files.contents["a"]
    assert bytes(nodes.acquire(a.number).read(0, 3)) == b"con"
    later, _ = nodes_of(files, a)
    with pytest.raises(TargetError) as caught:
        later.acquire(a.number)
    assert caught.value.errno == errno.ESTALE


def test_companion_is_found_beside_its_file_only() -> None:
    files = Files(a=b"1")
    files.companions[".seal"] = b"the seal"
    nodes, _ = nodes_of(files)
    seal = find(nodes, "a.seal")
    assert (seal.name, seal.size, seal.mtime_ns) == ("a.seal", 8, 5)
    assert bytes(nodes.acquire(seal.number).read(0, 100)) == b"the seal"
    assert nodes.find("b.seal") is None
    assert nodes.find("a.vm.json") is None
    assert nodes.find("a.seal.seal") is None


def test_companion_of_a_later_worker_is_the_same_or_stale() -> None:
    files = Files(a=b"1")
    files.companions[".workingset"] = b"old"
    nodes, announced = nodes_of(files)
    old = find(nodes, "a.workingset")
    later, _ = nodes_of(files, *announced)
    assert bytes(later.acquire(old.number).read(0, 9)) == b"old"
    files.companions[".workingset"] = b"new"
    replaced, _ = nodes_of(files, *announced)
    with pytest.raises(TargetError) as caught:
        replaced.acquire(old.number)
    assert caught.value.errno == errno.ESTALE
    assert find(replaced, "a.workingset").number > old.number


def test_files_without_a_user_are_closed_when_there_are_many() -> None:
    files = Files(**{f"f{number}": bytes([number]) for number in range(60)})
    nodes, _ = nodes_of(files)
    kept = find(nodes, "f0")
    nodes.count_open(kept.number)
    in_use = find(nodes, "f1")
    nodes.acquire(in_use.number)
    for number in range(2, 60):
        find(nodes, f"f{number}")
    still_open = [file for file in files.opened if not file.closed]
    assert len(still_open) <= 18
    assert not files.opened[0].closed
    assert not files.opened[1].closed
    nodes.count_close(kept.number)
    nodes.release(in_use.number)
    for number in range(2, 40):
        nodes.count_open(find(nodes, f"f{number}").number)
        nodes.count_close(find(nodes, f"f{number}").number)
    assert files.opened[0].closed


def test_file_that_the_kernel_reads_stays_open_until_it_is_released() -> None:
    files = Files(**{f"f{number}": bytes([number]) for number in range(40)})
    first = find(nodes_of(files)[0], "f0")
    nodes, _ = nodes_of(files, first)  # the worker that saw it opened is dead
    file = nodes.acquire(first.number)
    nodes.count_read(first.number)
    nodes.release(first.number)
    for number in range(1, 40):
        find(nodes, f"f{number}")
    assert isinstance(file, Memory)
    assert not file.closed


class Holes(Memory):
    """Every other page is a hole."""

    def next_data(self, offset: int) -> int | None:
        data = offset if offset // 4096 % 2 == 0 else (offset // 4096 + 1) * 4096
        return data if data < self.size else None

    def next_hole(self, offset: int) -> int:
        hole = offset if offset // 4096 % 2 else (offset // 4096 + 1) * 4096
        return min(hole, self.size)


@pytest.mark.parametrize(
    ("pages", "allocated"),
    [(0, 0), (1, 1), (2, 1), (101, 51), (8191, 4096), (20000, 4096 + 20000 - 8191)],
)
def test_allocated_size_is_without_the_holes(pages: int, allocated: int) -> None:
    files = Files(a=b"1")
    files.open = lambda name: Holes(bytes(pages * 4096), {})  # type: ignore[method-assign]
    assert find(nodes_of(files)[0], "a").allocated == allocated * 4096


class Held(Memory):
    """A file that must not be removed while it is in use."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content, {})
        self.held = True
        self.gone = False

    def let_go(self) -> None:
        self.held = False

    def hold(self) -> bool:
        self.held = not self.gone
        return self.held


class HeldFiles(Files):
    def open(self, name: str) -> PlainFile:
        self.opened.append(Held(self.contents[name]))
        return self.opened[-1]


def test_a_file_is_held_while_it_is_used_only() -> None:
    files = HeldFiles(a=b"1")
    nodes, _ = nodes_of(files)
    node = find(nodes, "a")
    (file,) = files.opened
    assert isinstance(file, Held)
    assert not file.held
    assert nodes.acquire(node.number) is file
    assert file.held
    nodes.release(node.number)
    assert not file.held
    nodes.count_open(node.number)
    nodes.acquire(node.number)
    nodes.release(node.number)
    assert file.held
    nodes.count_close(node.number)
    assert not file.held
    assert files.opened == [file]


def test_a_file_that_was_removed_while_it_was_not_used_is_stale() -> None:
    files = HeldFiles(a=b"1")
    nodes, _ = nodes_of(files)
    node = find(nodes, "a")
    (file,) = files.opened
    assert isinstance(file, Held)
    file.gone = True
    del files.contents["a"]
    with pytest.raises(TargetError) as caught:
        nodes.acquire(node.number)
    assert caught.value.errno == errno.ESTALE
    assert file.closed


def test_a_stored_snapshot_that_a_mount_only_looked_at_can_be_removed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store") as store:
        put_snapshot(store, "a", image(4))
        with contextlib.closing(StoreFiles(str(tmp_path / "store"), None)) as files:
            nodes = Nodes(files, (), lambda node: None)
            node = find(nodes, "a")
            nodes.count_open(node.number)
            assert remove(store, ["a"]).in_use == ("a",)
            nodes.count_close(node.number)
            assert bytes(nodes.acquire(node.number).read(0, 8)) == image(4)[:8]
            nodes.release(node.number)
            assert remove(store, ["a"]).removed == ("a",)
            with pytest.raises(TargetError) as caught:
                nodes.acquire(node.number)
            assert caught.value.errno == errno.ESTALE


def test_later_worker_holds_what_is_open_before_it_is_read(tmp_path: Path) -> None:
    counts: dict[int, int] = {}
    with Store.create(tmp_path / "store") as store:
        for name in ("a", "b"):
            put_snapshot(store, name, image(4))
        with contextlib.closing(StoreFiles(str(tmp_path / "store"), None)) as files:
            first = Nodes(files, (), lambda node: None, count_opens=counts.__setitem__)
            a, b = find(first, "a"), find(first, "b")
            first.count_open(a.number)
            first.count_open(b.number)
            first.count_close(b.number)
            assert counts == {a.number: 1, b.number: 0}
            first.acquire(a.number).close()  # the worker has died
            later = Nodes(files, (a, b), lambda node: None, opens=counts)
            later.reopen(pytest.fail)
            assert remove(store, ["a", "b"]).in_use == ("a",)
            later.count_close(a.number)
            assert remove(store, ["a"]).removed == ("a",)


def test_open_file_that_was_removed_is_reported_by_a_later_worker() -> None:
    files = Files(a=b"1")
    node = find(nodes_of(files)[0], "a")
    del files.contents["a"]
    later = Nodes(files, (node,), lambda node: None, opens={node.number: 1})
    said: list[str] = []
    later.reopen(said.append)
    assert len(said) == 1
    assert said[0].startswith("a is open, but cannot be opened again: ")


def test_another_snapshot_of_the_name_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store") as store:
        put_snapshot(store, "a", image(4))
        with store.open_file("a") as file:
            file.let_go()
            remove(store, ["a"])
            put_snapshot(store, "a", image(4, seed=1), mtime_ns=5)
            assert not file.hold()
            assert remove(store, ["a"]).removed == ("a",)
            assert not file.hold()
