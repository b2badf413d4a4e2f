"""The order of pages, requests, recovery, and what keeps the server from a wrong page."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, open_snapshot, save
from pyqmigrate.errors import QemuError, QemuGone, UsageError
from pyqmigrate.format.seal import PIECE
from pyqmigrate.io.working_set_file import read_working_set
from pyqmigrate.page_server import withheld as module
from pyqmigrate.page_server.options import Ending, Push
from pyqmigrate.page_server.serving import ServeRequest
from tests.harness.lazy_destination import PAGE, Destination, Memory
from tests.harness.page_serving import Serving
from tests.harness.snapshots import Bytes, ram, save_known


@contextmanager
def served(
    snapshot: Path, memory: Memory, *, limit: int | None = None, **options: object
) -> Iterator[tuple[Serving, Destination]]:
    """A server and its destination."""
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        destination = Destination(theirs, memory, limit).start()
        stack.callback(destination.join)
        request = ServeRequest(str(snapshot), **options)  # type: ignore[arg-type]
        serving = stack.enter_context(Serving(request, ours))
        stack.callback(destination.cut)
        yield serving, destination


def wait_for(happens: object, limit: float = 20) -> None:
    deadline = time.monotonic() + limit
    while not happens():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def zero_and_data(memory: Bytes) -> tuple[int, int]:
    pages = memory.reshape(-1, PAGE).any(axis=1).tolist()
    return pages.index(False), pages.index(True)


def test_only_what_is_asked_for_is_sent_without_push(tmp_path: Path) -> None:
    content = save_known(tmp_path / "a")
    zero, data = zero_and_data(content)
    memory = Memory()
    with served(tmp_path / "a", memory, push=Push.NEVER) as (serving, destination):
        serving.wait_for("loaded")
        destination.request("ram", data)
        destination.request("ram", zero)
        destination.request("ram", data)  # again: it is under way
        wait_for(lambda: len(memory.order) == 2)
        time.sleep(0.05)
        assert sorted(memory.order) == sorted([("ram", data), ("ram", zero)])
        assert not memory.ended
        destination.cut()
        assert serving.wait_for("broken")["recoverable"]


def test_guest_that_asks_for_everything_gets_the_end(tmp_path: Path) -> None:
    content = save_known(tmp_path / "a")
    memory = Memory()
    with served(tmp_path / "a", memory, push=Push.NEVER) as (serving, destination):
        serving.wait_for("loaded")
        for page in range(len(content) // PAGE):
            destination.request("ram", page)
        destination.join()
        serving.join()
        assert serving.ending is Ending.DONE
    assert bytes(memory.blocks["ram"]) == content.tobytes()


def test_working_set_is_recorded_and_pushed_first(tmp_path: Path) -> None:
    content = save_known(tmp_path / "a")
    wanted = [400, 17, 18, 19, 300]
    memory = Memory()
    record = tmp_path / "a.workingset"
    with served(tmp_path / "a", memory, record=str(record)) as (serving, destination):
        serving.wait_for("loaded")
        for page in wanted:
            destination.request("ram", page)
        serving.join()
    recorded = read_working_set(record)
    assert recorded is not None
    runs = [(run.first, run.npages) for run in recorded.working_set]
    assert runs == [(400, 1), (17, 3), (300, 1)]
    again = Memory()
    with served(tmp_path / "a", again, working_set=str(record)) as (serving, _):
        serving.join()
    has_data = content.reshape(-1, PAGE).any(axis=1)
    expected = [page for page in wanted if has_data[page]]
    assert len(expected) > 1
    assert [page for _, page in again.order][: len(expected)] == expected


def test_working_set_of_another_snapshot_is_refused(tmp_path: Path) -> None:
    save_known(tmp_path / "a")
    save_known(tmp_path / "b", seed=5)
    record = tmp_path / "a.workingset"
    with served(tmp_path / "a", Memory(), record=str(record)) as (serving, _):
        serving.join()
    with served(tmp_path / "b", Memory(), working_set=str(record)) as (serving, _):
        serving.join()
    assert isinstance(serving.error, UsageError)
    assert "not of this snapshot" in str(serving.error)


def test_fresh_server_goes_on_where_the_connection_was_cut(tmp_path: Path) -> None:
    content = save_known(tmp_path / "a")
    rng = random.Random(3)
    for _ in range(8):
        memory = Memory()
        resume = False
        while not memory.ended:
            limit = rng.randrange(1, 1 << 20)
            with served(tmp_path / "a", memory, limit=limit, resume=resume) as (_serving, found):
                found.join()
            assert found.error is None or "cut" in str(found.error)
            resume = True
        assert bytes(memory.blocks["ram"]) == content.tobytes()


def test_same_server_takes_another_connection(tmp_path: Path) -> None:
    content = save_known(tmp_path / "a")
    memory = Memory()
    with served(tmp_path / "a", memory, limit=200_000) as (serving, found):
        serving.wait_for("broken")
        found.join()
        ours, theirs = socket.socketpair()
        second = Destination(theirs, memory).start()
        socket.send_fds(serving.parent, [b'{"command": "resume"}\n'], [ours.fileno()])
        ours.close()
        second.join()
        serving.join()
        assert serving.ending is Ending.DONE
    assert bytes(memory.blocks["ram"]) == content.tobytes()


def test_connection_that_ends_before_the_package_was_loaded_is_an_error(tmp_path: Path) -> None:
    save_known(tmp_path / "a")
    ours, theirs = socket.socketpair()
    theirs.close()
    with Serving(ServeRequest(str(tmp_path / "a")), ours) as serving:
        serving.join()
    assert isinstance(serving.error, QemuGone)


@pytest.mark.parametrize(
    "kind, body",
    [
        (9, b""),
        (3, b"\0" * 12),
        (4, b"\0" * 12),
        (3, (1).to_bytes(8, "big") + (4096).to_bytes(4, "big") + b"\3ram"),
        (3, (1 << 40).to_bytes(8, "big") + (4096).to_bytes(4, "big") + b"\3ram"),
        (3, bytes(8) + (4096).to_bytes(4, "big") + b"\3rom"),
        (1, b""),
    ],
)
def test_destination_that_sends_nonsense_is_left(tmp_path: Path, kind: int, body: bytes) -> None:
    save_known(tmp_path / "a")
    with served(tmp_path / "a", Memory(), push=Push.NEVER) as (serving, destination):
        serving.wait_for("loaded")
        destination.answer(kind, body)
        serving.join()
    assert isinstance(serving.error, QemuError)
    assert "the destination sent" in str(serving.error)


def flip(path: Path, bit: int) -> None:
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
    os.utime(path, ns=times)


def data_offset(path: Path) -> int:
    with open_snapshot(path) as snapshot:
        return snapshot.blocks["ram"].layout.pages_offset  # type: ignore[union-attr]


def test_damaged_page_is_named_and_never_sent_and_a_repaired_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.05)
    path = tmp_path / "a"
    content = save_known(path, seal="xxh3-128")
    bit = (data_offset(path) + PIECE + 100) * 8
    flip(path, bit)
    memory = Memory()
    with served(path, memory) as (serving, _destination):
        damage = serving.wait_for("damage")
        assert damage["block"] == "ram"
        assert f"page {damage['page']}" in damage["error"]
        assert "not as it was sealed" in damage["error"]
        wait_for(lambda: serving.named("progress") and memory.order)
        assert not memory.ended
        flip(path, bit)
        serving.join()
        assert serving.ending is Ending.DONE
    assert bytes(memory.blocks["ram"]) == content.tobytes()


def assert_flips(path: Path, content: Bytes, count: int, seed: int) -> None:
    """Flip one bit after another anywhere in a sealed file: never delivered, always named."""
    rng = random.Random(seed)
    size = path.stat().st_size
    for _ in range(count):
        bit = rng.randrange(size * 8)
        flip(path, bit)
        memory = Memory()
        with served(path, memory, push=Push.ALWAYS) as (serving, _destination):
            wait_for(
                lambda s=serving, m=memory: s.error is not None or s.named("damage") or m.ended
            )
            if serving.error is None:
                piece = bit // 8 // PIECE
                assert serving.named("damage"), f"bit {bit} of piece {piece} is not named"
                assert f"in its MiB {piece}" in serving.named("damage")[0]["error"]
                wait_for(lambda s=serving: s.named("progress"))
            else:
                assert str(serving.error)
        assert not memory.ended
        for name, page in memory.order:
            assert name == "ram"
            expected = content[page * PAGE : (page + 1) * PAGE].tobytes()
            assert bytes(memory.blocks["ram"][page * PAGE : (page + 1) * PAGE]) == expected
        flip(path, bit)


def test_no_flipped_bit_is_delivered(tmp_path: Path) -> None:
    content = ram(1024, seed=7, density=0.7)
    save(tmp_path / "a", [RamBlock("ram", content)], seal="xxh3-128")
    assert_flips(tmp_path / "a", content, 20, 1)


@pytest.mark.long
def test_no_flipped_bit_of_a_thousand_is_delivered(tmp_path: Path) -> None:
    content = ram(1024, seed=7, density=0.7)
    save(tmp_path / "a", [RamBlock("ram", content)], seal="xxh3-128")
    assert_flips(tmp_path / "a", content, 1000, 2)
