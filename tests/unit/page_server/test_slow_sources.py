"""A source that is slow, or fails now and then: what the guest asks for does not wait for the rest."""

from __future__ import annotations

import errno
import socket
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pyqmigrate import RamBlock, save
from pyqmigrate.errors import TargetError
from pyqmigrate.page_server import serving
from pyqmigrate.page_server import withheld as module
from pyqmigrate.page_server.opened import MappedRamSource
from pyqmigrate.page_server.options import Ending, Push
from pyqmigrate.page_server.serving import ServeRequest
from pyqmigrate.page_server.sources import PageSource, open_source
from tests.harness.lazy_destination import PAGE, Destination, Memory
from tests.harness.page_serving import Serving
from tests.harness.snapshots import ram

NPAGES = 600


class SlowSource(MappedRamSource):
    """Each read takes ``seconds``; ``fail`` is called first, and may raise."""

    readers = 3
    seconds = 0.02
    reads: ClassVar[list[tuple[int, int]]]

    def fail(self, first: int, npages: int) -> None: ...

    def read(self, block: int, first: int, npages: int) -> Any:
        self.reads.append((first, npages))
        time.sleep(self.seconds)
        self.fail(first, npages)
        return super().read(block, first, npages)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    memory = ram(NPAGES, density=0.9, seed=4)
    save(tmp_path / "a", [RamBlock("ram", memory)])
    return memory.tobytes()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowSource]:
    class Source(SlowSource):
        reads: ClassVar[list[tuple[int, int]]] = []

    def opened(snapshot: str, *, sealed: bool, **_: Any) -> PageSource:
        source = open_source(snapshot, sealed=sealed)
        source.__class__ = Source
        return source

    monkeypatch.setattr(serving, "open_source", opened)
    return Source


def serve(tmp_path: Path, memory: Memory, push: str = "idle") -> tuple[Serving, Destination]:
    ours, theirs = socket.socketpair()
    destination = Destination(theirs, memory).start()
    request = ServeRequest(str(tmp_path / "a"), push=Push(push))
    return Serving(request, ours), destination


def test_several_reads_are_under_way(
    tmp_path: Path, content: bytes, slow: type[SlowSource]
) -> None:
    slow.seconds = 0.1
    memory = Memory()
    started = time.monotonic()
    serving, destination = serve(tmp_path, memory)
    with serving:
        serving.join()
        destination.join()
    assert bytes(memory.blocks["ram"]) == content
    assert len(slow.reads) >= 10
    assert time.monotonic() - started < len(slow.reads) * slow.seconds * 0.8


def test_request_does_not_wait_for_reads_ahead(
    tmp_path: Path, content: bytes, slow: type[SlowSource]
) -> None:
    first_page = next(k for k in range(500, NPAGES) if any(content[k * PAGE : (k + 1) * PAGE]))
    held = threading.Event()

    def fail(self: SlowSource, first: int, npages: int) -> None:
        if npages > 1:
            held.wait(20)

    slow.fail = fail  # type: ignore[method-assign]
    memory = Memory()
    serving, destination = serve(tmp_path, memory)
    with serving:
        serving.wait_for("loaded")
        destination.request("ram", first_page)
        deadline = time.monotonic() + 10
        while not memory.order and time.monotonic() < deadline:
            time.sleep(0.002)
        assert memory.order == [("ram", first_page)]
        held.set()
        serving.join()
    assert serving.ending is Ending.DONE
    assert bytes(memory.blocks["ram"]) == content


def test_reads_that_fail_for_a_while_are_named_and_repeated(
    tmp_path: Path, content: bytes, slow: type[SlowSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.05)
    slow.seconds = 0.0
    broken_until = time.monotonic() + 0.3

    def fail(self: SlowSource, first: int, npages: int) -> None:
        if first + npages > 300 and time.monotonic() < broken_until:
            raise TargetError(errno.ETIMEDOUT, "cannot read", "the store")

    slow.fail = fail  # type: ignore[method-assign]
    memory = Memory()
    serving, _ = serve(tmp_path, memory)
    with serving:
        serving.join()
    assert serving.ending is Ending.DONE
    assert bytes(memory.blocks["ram"]) == content
    pages = [event["page"] for event in serving.named("damage")]
    assert len(pages) == len(set(pages)), "each is named once"
    data = np.frombuffer(content, np.uint8).reshape(-1, PAGE).any(axis=1)
    assert set(pages) <= set(np.flatnonzero(data).tolist())
    assert "the store" in serving.named("damage")[0]["error"]
