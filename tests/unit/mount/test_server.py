"""The server alone: requests of the kernel as bytes, and requests that no kernel sends."""

from __future__ import annotations

import errno
import os
import queue
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqmigrate.io.plain_file import LocalPlainFile, PlainFile
from pyqmigrate.mount import protocol
from pyqmigrate.mount.board import Board
from pyqmigrate.mount.files import SingleFile
from pyqmigrate.mount.nodes import Nodes
from pyqmigrate.mount.protocol import ROOT
from pyqmigrate.mount.server import Owner, Server

CONTENT = np.random.default_rng(3).bytes(3 * 4096 + 100)


class Kernel:
    """A connection whose requests are made by a test."""

    def __init__(self) -> None:
        self._requests: queue.Queue[bytes | None] = queue.Queue()
        self._replies: dict[int, queue.Queue[tuple[int, bytes]]] = {}
        self._unique = 0
        self.stored: queue.Queue[tuple[int, int, bytes]] = queue.Queue()

    def receive(self, buffer: bytearray) -> int | None:
        request = self._requests.get()
        if request is None:
            self._requests.put(None)
            return None
        buffer[: len(request)] = request
        return len(request)

    def reply(self, unique: int, body: Sequence[bytes], error: int) -> None:
        self._replies[unique].put((error, b"".join(body)))

    def store(self, node: int, offset: int, data: Sequence[bytes]) -> bool:
        self.stored.put((node, offset, b"".join(data)))
        return True

    def send(self, operation: int, node: int = ROOT, body: bytes = b"", pid: int = 0) -> int:
        self._unique += 2
        self._replies[self._unique] = queue.Queue()
        header = struct.pack(
            "=IIQQIIIHH", 40 + len(body), operation, self._unique, node, 0, 0, pid, 0, 0
        )
        self._requests.put(header + body)
        return self._unique

    def ask(self, operation: int, node: int = ROOT, body: bytes = b"") -> tuple[int, bytes]:
        return self.answer(self.send(operation, node, body))

    def answer(self, unique: int) -> tuple[int, bytes]:
        return self._replies[unique].get(timeout=10)

    def send_raw(self, request: bytes) -> None:
        self._requests.put(request)

    def lookup(self, name: str) -> int:
        error, body = self.ask(protocol.LOOKUP, body=os.fsencode(name) + b"\0")
        assert error == 0, os.strerror(error)
        return int.from_bytes(body[:8], "little")

    def read(self, node: int, offset: int, length: int) -> tuple[int, bytes]:
        return self.ask(protocol.READ, node, struct.pack("=QQI20x", 0, offset, length))

    def end(self) -> None:
        self._requests.put(None)


class Served:
    """A server of the file ``guest`` and its thread."""

    def __init__(self, directory: Path) -> None:
        path = directory / "guest"
        path.write_bytes(CONTENT)
        (directory / "guest.seal").write_bytes(b"seal")
        self.kernel = Kernel()
        self.messages: list[str] = []
        self.board = Board(logging=True)
        self.files = SingleFile(str(path))
        self.nodes = Nodes(self.files, (), lambda node: None)
        owner = Owner(1000, 100, readable_by_all=False)
        server = Server(
            self.kernel, self.nodes, self.board, owner, since={}, report=self.messages.append
        )
        self.thread = threading.Thread(target=server.run, daemon=True)
        self.thread.start()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.kernel.end()
    served.thread.join(10)
    assert not served.thread.is_alive()


@pytest.fixture
def kernel(served: Served) -> Kernel:
    return served.kernel


@settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.integers(0, 5 * 4096), st.integers(0, 5 * 4096))
def test_read_returns_what_is_there(kernel: Kernel, offset: int, length: int) -> None:
    node = kernel.lookup("guest")
    assert kernel.read(node, offset, length) == (0, CONTENT[offset : offset + length])


class FileOfFrames(LocalPlainFile):
    """A file whose pages come in pairs."""

    def views(self, offset: int, length: int) -> list[bytes]:
        data = self.read(offset, length)
        return [data[:1], data[1:]]

    def cheap_range(self, offset: int, length: int) -> tuple[int, int]:
        return offset // 8192 * 8192, min(-(-(offset + length) // 8192) * 8192, self.size)


@pytest.mark.parametrize(("page", "around"), [(0, 1), (1, 0), (2, 3), (3, 2)])
def test_what_a_small_read_has_decompressed_goes_into_the_page_cache(
    served: Served, page: int, around: int
) -> None:
    served.files.open = lambda name: FileOfFrames(served.files._path)  # type: ignore[method-assign]
    served.board.logging = False
    kernel = served.kernel
    node = kernel.lookup("guest")
    assert kernel.read(node, page * 4096, 4096) == (0, CONTENT[page * 4096 :][:4096])
    expected = (node, around * 4096, CONTENT[around * 4096 :][:4096])
    assert kernel.stored.get(timeout=10) == expected
    assert kernel.stored.empty()


def test_nothing_is_stored_around_reads_that_are_recorded_or_large(served: Served) -> None:
    served.files.open = lambda name: FileOfFrames(served.files._path)  # type: ignore[method-assign]
    kernel = served.kernel
    node = kernel.lookup("guest")
    kernel.read(node, 0, 4096)
    served.board.logging = False
    kernel.read(node, 4096, 128 << 10)
    kernel.end()
    served.thread.join(10)
    assert kernel.stored.empty()


def test_a_read_that_is_cut_off_is_refused(kernel: Kernel) -> None:
    node = kernel.lookup("guest")
    assert kernel.ask(protocol.READ, node, b"short")[0] == errno.EIO


def test_unknown_names_and_numbers(kernel: Kernel) -> None:
    assert kernel.ask(protocol.LOOKUP, body=b"other\0")[0] == errno.ENOENT
    assert kernel.ask(protocol.LOOKUP, body=b"guest.workingset\0")[0] == errno.ENOENT
    assert kernel.ask(protocol.GETATTR, 99)[0] == errno.ESTALE
    assert kernel.ask(protocol.OPEN, 99)[0] == errno.ESTALE
    assert kernel.read(99, 0, 4096)[0] == errno.EIO


def test_names_below_a_file_do_not_exist(kernel: Kernel) -> None:
    node = kernel.lookup("guest")
    assert kernel.ask(protocol.LOOKUP, node, b"guest\0")[0] == errno.ENOENT


def test_listing_is_whole_however_small_its_parts(kernel: Kernel) -> None:
    handle = int.from_bytes(kernel.ask(protocol.OPENDIR)[1][:8], "little")
    names, offset = [], 0
    while True:
        error, body = kernel.ask(protocol.READDIR, ROOT, struct.pack("=QQI20x", handle, offset, 40))
        assert error == 0
        if not body:
            break
        _, offset, length, _ = struct.unpack_from("=QQII", body)
        names.append(body[24 : 24 + length])
    assert names == [b".", b"..", b"guest", b"guest.seal"]
    assert kernel.ask(protocol.RELEASEDIR, ROOT, struct.pack("=Q16x", handle))[0] == 0


def test_directory_that_an_earlier_worker_opened_can_be_listed(kernel: Kernel) -> None:
    error, body = kernel.ask(protocol.READDIR, ROOT, struct.pack("=QQI20x", 1234, 2, 4096))
    assert (error, body[24:29]) == (0, b"guest")


def test_file_that_an_earlier_worker_opened_can_be_read(served: Served, tmp_path: Path) -> None:
    node = served.kernel.lookup("guest")
    known = [served.nodes.get(node)]
    later = Nodes(served.files, known, lambda node: None)
    assert later.acquire(node).read(0, 4) == CONTENT[:4]


def test_file_that_ends_too_early_is_an_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = served.kernel.lookup("guest")
    monkeypatch.setattr(LocalPlainFile, "read", lambda self, offset, length: b"short")
    assert served.kernel.read(node, 0, 4096)[0] == errno.EIO
    assert "5 bytes came instead of 4096" in served.messages[0]


def test_error_that_nobody_expects_is_an_error_of_that_read_only(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = served.kernel.lookup("guest")

    def fail(self: PlainFile, offset: int, length: int) -> bytes:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(LocalPlainFile, "read", fail)
        assert served.kernel.read(node, 0, 4096)[0] == errno.EIO
    assert served.kernel.read(node, 0, 4096) == (0, CONTENT[:4096])


def test_operations_of_other_file_systems_are_not_implemented(kernel: Kernel) -> None:
    for operation in (4, 5, 6, 8, 9, 10, 12, 16, 20, 21, 22, 23, 31, 35, 39, 43, 44, 47, 52, 4096):
        assert kernel.ask(operation, ROOT, bytes(64))[0] == errno.ENOSYS


def test_seeks(kernel: Kernel) -> None:
    node = kernel.lookup("guest")

    def seek(offset: int, whence: int) -> tuple[int, bytes]:
        return kernel.ask(protocol.LSEEK, node, struct.pack("=QQII", 0, offset, whence, 0))

    assert seek(0, os.SEEK_HOLE) == (0, struct.pack("=Q", len(CONTENT)))
    assert seek(5, os.SEEK_DATA) == (0, struct.pack("=Q", 5))
    assert seek(len(CONTENT), os.SEEK_DATA)[0] == errno.ENXIO
    assert seek(0, 7)[0] == errno.EINVAL


def test_reads_are_counted_and_logged(served: Served) -> None:
    node = served.kernel.lookup("guest")
    served.kernel.read(node, 4096, 4096)
    served.kernel.read(node, 0, 4096)
    served.kernel.read(node, 12288, 4096)
    totals = served.board.totals()
    assert (totals.reads, totals.bytes, totals.failed) == (3, 8192 + 100, 0)
    assert [tuple(read) for read in served.board.logged_reads()] == [
        (node, 4096, 4096),
        (node, 0, 4096),
        (node, 12288, 100),
    ]


def test_interrupt_of_a_request_that_is_not_there_is_asked_again(kernel: Kernel) -> None:
    assert kernel.ask(protocol.INTERRUPT, 0, struct.pack("=Q", 4444))[0] == errno.EAGAIN


OPERATIONS = [1, 3, 14, 15, 17, 18, 25, 27, 28, 29, 46, 99]


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.sampled_from(OPERATIONS),
    st.integers(0, 5) | st.integers(0, (1 << 64) - 1),
    st.binary(max_size=64),
)
def test_hostile_requests_get_an_answer_and_harm_nobody(
    kernel: Kernel, operation: int, node: int, body: bytes
) -> None:
    error, answer = kernel.ask(operation, node, body)
    assert 0 <= error < 512
    assert not (error and answer)
    assert kernel.read(kernel.lookup("guest"), 0, 10) == (0, CONTENT[:10])


@settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.binary(max_size=120))
def test_bytes_that_are_not_a_request_are_ignored(kernel: Kernel, raw: bytes) -> None:
    if len(raw) >= 40:  # with a right length it would be a request
        raw = struct.pack("=I", len(raw) + 1) + raw[4:]
    kernel.send_raw(raw)
    assert kernel.read(kernel.lookup("guest"), 0, 10) == (0, CONTENT[:10])
