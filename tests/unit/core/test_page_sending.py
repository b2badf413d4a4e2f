"""Pages of a post-copy migration as the core sends them, and requests as it takes them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate.errors import QemuError, UsageError
from pyqmigrate.format.postcopy.records import PART_END, PART_HEADER
from pyqmigrate.format.postcopy.return_path import Request, ReturnPath
from pyqmigrate.format.postcopy.stream import PostcopyBlock
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.checked_pages import CheckedPages
from pyqmigrate.io.page_sending import Events, PageSending, PagesInFile, SentBlock
from tests.harness.page_sending_twin import BlockTwin, SenderTwin

PAGE = 4096
NAMES = ["ram", "a much longer name", ""]


def bitmap(bits: list[bool]) -> Bitmap:
    found = Bitmap(len(bits))
    for page, is_set in enumerate(bits):
        if is_set:
            found.add_range(page, page + 1)
    return found


class Connection:
    """A sender of blocks that the twin has too; ``received`` is what came out."""

    def __init__(self, twins: list[BlockTwin], files: list[PagesInFile | None] | None = None):
        self._stack = contextlib.ExitStack()
        blocks = []
        for twin, place in zip(twins, files or [None] * len(twins), strict=True):
            bitmaps = [bitmap(bits) for bits in (twin.data, twin.pending, twin.sent)]
            for one in bitmaps:
                self._stack.callback(one.close)
            data, pending, sent = bitmaps
            blocks.append(
                SentBlock(
                    twin.name.decode(), twin.page_size, twin.together, data, pending, sent, place
                )
            )
        self.blocks = blocks
        self.sending = PageSending(blocks, PART_HEADER, PART_END)
        self._stack.callback(self.sending.close)
        self.ours, self.theirs = socket.socketpair()
        self._stack.callback(self.theirs.close)
        self.sending.connect(self.ours)
        self.received = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            while data := self.theirs.recv(5000):
                self.received += data

    def serve(self, until: int, push: bool = False) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            events = self.sending.serve(push=push, quiet=0, timeout=1_000_000)
            if events & until:
                return events
        raise AssertionError("nothing happens")

    def end(self) -> bytes:
        self.ours.close()
        self._thread.join()
        return bytes(self.received)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._stack.close()


@st.composite
def block_twins(draw: st.DrawFn) -> list[BlockTwin]:
    found = []
    for name in NAMES[: draw(st.integers(1, len(NAMES)))]:
        together = draw(st.sampled_from([1, 1, 4, 16, 512]))
        npages = together * draw(st.integers(1, 40 if together < 512 else 2))
        seed, density = draw(st.integers(0, 1 << 16)), draw(st.sampled_from([0.05, 0.5, 1.0]))
        rng = random.Random(seed)
        data = [rng.random() < density for _ in range(npages)]
        sent = [rng.random() < 0.2 for _ in range(npages // together) for _ in range(together)]
        for start in range(0, npages, together):
            sent[start : start + together] = [sent[start]] * together
        pending = [d and not s for d, s in zip(data, sent, strict=True)]
        found.append(BlockTwin(name.encode(), PAGE, together, data, pending, sent))
    return found


@settings(deadline=None)
@given(block_twins(), st.data())
def test_core_sends_what_the_twin_sends(twins: list[BlockTwin], data: st.DataObject) -> None:
    sender, expected = SenderTwin(twins), b""
    content = random.Random(1).randbytes(1 << 21)
    with Connection(twins) as connection:
        for _ in range(data.draw(st.integers(1, 6))):
            number = data.draw(st.integers(0, len(twins) - 1))
            together = twins[number].together
            groups = len(twins[number].data) // together
            first = data.draw(st.integers(0, groups - 1))
            count = data.draw(st.integers(1, min(groups - first, max(1, 512 // together))))
            requested = data.draw(st.booleans())
            first, npages = first * together, count * together
            pages = content[: npages * PAGE]
            since = time.monotonic_ns() if requested else 0
            connection.sending.send(number, first, npages, pages, since)
            connection.serve(Events.ANSWERED if requested else Events.PUSHED)
            expected += sender.send(number, first, npages, pages, requested)
        assert connection.end() == expected
        for block, twin in zip(connection.blocks, twins, strict=True):
            assert [block.sent[k] for k in range(len(twin.sent))] == twin.sent
            assert [block.pending[k] for k in range(len(twin.sent))] == twin.pending
        assert connection.sending.left == sum(sum(twin.pending) for twin in twins)


def test_parts_name_a_block_once() -> None:
    page = bytes(range(256)) * 16
    identifier = b"\0RAM"
    head, foot = b"\2" + identifier, bytes.fromhex("0000000000000010 7e") + identifier
    twin = _twin(data=[k != 4 for k in range(64)])
    other = BlockTwin(b"b", PAGE, 1, [False], [False], [False])
    with Connection([twin, other]) as connection:
        for block, first, npages in ((0, 3, 2), (0, 5, 1), (1, 0, 1)):
            connection.sending.send(block, first, npages, page * npages, time.monotonic_ns())
            connection.serve(Events.ANSWERED)
        assert connection.end() == (
            head
            + bytes.fromhex("0000000000003008 03 72616d")
            + page
            + bytes.fromhex("0000000000004022 00")
            + foot
            + head
            + bytes.fromhex("0000000000005028")
            + page
            + foot
            + head
            + bytes.fromhex("0000000000000002 01 62 00")
            + foot
        )


def messages() -> st.SearchStrategy[bytes]:
    name = st.sampled_from(["ram", "rom", "a much longer name"]).map(str.encode)
    offset = st.one_of(
        st.integers(0, 70).map(lambda n: n * PAGE),
        st.just(1 << 63),
        st.just(5),
        st.just(1 << 64 - 12),
    ).map(lambda n: n % (1 << 64))
    length = st.sampled_from([PAGE, PAGE, 2 * PAGE, 0, 5, 0xFFFFF000])

    def named(offset: int, length: int, name: bytes) -> bytes:
        return _message(3, struct.pack(">QI", offset, length) + bytes([len(name)]) + name)

    def same(offset: int, length: int) -> bytes:
        return _message(4, struct.pack(">QI", offset, length))

    def pong(value: int) -> bytes:
        return _message(2, struct.pack(">I", value))

    return st.one_of(
        st.builds(named, offset, length, name),
        st.builds(same, offset, length),
        st.builds(pong, st.integers(0, 9)),
        st.binary(max_size=30),
    )


def _message(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


def _twin(npages: int = 64, **more: object) -> BlockTwin:
    none = [False] * npages
    values = {"data": [True] * npages, "pending": [True] * npages, "sent": none, **more}
    return BlockTwin(b"ram", PAGE, 1, **values)  # type: ignore[arg-type]


def _parsed(path: ReturnPath, data: bytes) -> Iterator[object]:
    try:
        yield from path.feed(data)
    except QemuError:
        yield "nonsense"


@settings(deadline=None)
@given(st.lists(messages(), max_size=12), st.integers(1, 40))
def test_core_takes_the_requests_that_the_parser_takes(sent: list[bytes], step: int) -> None:
    blocks = {"ram": PostcopyBlock(BlockSpec("ram", 64 * PAGE, PAGE))}
    stream = b"".join(sent)
    expected = list(_parsed(ReturnPath(blocks), stream))
    path = ReturnPath(blocks)
    found: list[object] = []
    with Connection([_twin()]) as connection:
        sending = connection.sending

        def drain() -> None:
            while True:
                events = sending.serve(
                    push=False, quiet=0, timeout=0, raw=path.incomplete, every=True
                )
                if events & Events.REQUEST:
                    asked = sending.requested
                    found.append(Request("ram", asked.first, asked.npages))
                if events & Events.MESSAGE:
                    data = sending.received()
                    for message in _parsed(path, data):
                        found.append(message)
                        if isinstance(message, Request):
                            sending.asked(0)
                        if message == "nonsense":
                            return
                if not events & (Events.REQUEST | Events.MESSAGE):
                    return

        for start in range(0, len(stream), step):
            connection.theirs.sendall(stream[start : start + step])
            drain()
            if "nonsense" in found:
                break
    assert found == expected


def _file(path: Path, npages: int) -> bytes:
    content = random.Random(5).randbytes(npages * PAGE)
    path.write_bytes(content)
    return content


def _request(connection: Connection, page: int) -> None:
    body = struct.pack(">QI", page * PAGE, PAGE) + b"\3ram"
    connection.theirs.sendall(_message(3, body))


def test_request_is_answered_from_the_file(tmp_path: Path) -> None:
    content = _file(tmp_path / "a", 64)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    with Connection([_twin()], [PagesInFile(fd, 0)]) as connection:
        _request(connection, 7)
        connection.serve(Events.TIMEOUT)
        expected = SenderTwin([_twin()]).send(0, 7, 1, content[7 * PAGE : 8 * PAGE], True)
        assert connection.end() == expected
        assert connection.sending.to_json()["requests"] == 1
    os.close(fd)


def test_page_beyond_the_end_of_the_file_is_for_the_caller(tmp_path: Path) -> None:
    _file(tmp_path / "a", 3)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    with Connection([_twin()], [PagesInFile(fd, 0)]) as connection:
        _request(connection, 7)
        connection.serve(Events.REQUEST)
        assert connection.sending.requested.first == 7
        assert connection.end() == b""
    os.close(fd)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_page_of_a_sealed_file_is_sent_if_it_fits(
    tmp_path: Path, checked: bool, changed: bool
) -> None:
    content = _file(tmp_path / "a", 300)
    pages = CheckedPages(len(content))
    if checked:
        pages.enter(1, content[1 << 20 :])
    if changed:
        with (tmp_path / "a").open("r+b") as file:
            file.seek(260 * PAGE + 17)
            file.write(bytes([content[260 * PAGE + 17] ^ 1]))
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    with Connection([_twin(300)], [PagesInFile(fd, 0, pages)]) as connection:
        _request(connection, 260)
        sent = checked and not changed
        connection.serve(Events.TIMEOUT if sent else Events.REQUEST)
        assert bool(connection.end()) == sent
    os.close(fd)
    pages.close()


def test_pages_wait_for_a_request_and_go_after_it(tmp_path: Path) -> None:
    content = _file(tmp_path / "a", 64)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    with Connection([_twin()], [PagesInFile(fd, 0)]) as connection:
        _request(connection, 40)
        connection.sending.send(0, 0, 64, content)
        connection.serve(Events.PUSHED)
        twin = SenderTwin([_twin()])
        first = twin.send(0, 40, 1, content[40 * PAGE :], True)
        out = connection.end()
        assert out.startswith(first)
        assert connection.sending.left == 0
    os.close(fd)


def test_nothing_is_pushed_before_it_is_quiet() -> None:
    with Connection([_twin()]) as connection:
        connection.sending.asked(0)
        connection.sending.send(0, 0, 1, bytes(PAGE))
        quiet = 30_000_000
        started = time.monotonic_ns()
        events = 0
        while not events & Events.PUSHED:
            events = connection.sending.serve(push=False, quiet=quiet, timeout=None)
        assert time.monotonic_ns() - started > quiet // 2


def test_destination_that_does_not_read_holds_nobody_up() -> None:
    twin = _twin(4096)
    with Connection([twin]) as connection:
        ours, theirs = socket.socketpair()
        connection.sending.connect(ours)
        connection.sending.send(0, 0, 4096, bytes(4096 * PAGE))
        events = connection.sending.serve(push=False, quiet=0, timeout=50_000_000)
        assert events == Events.TIMEOUT
        theirs.close()
        with pytest.raises(ConnectionError):
            connection.sending.serve(push=False, quiet=0, timeout=None)
        ours.close()


@pytest.mark.parametrize("first, npages, pages", [(0, 65, 65), (64, 1, 1), (0, 0, 0), (0, 2, 1)])
def test_pages_that_do_not_exist_are_refused(first: int, npages: int, pages: int) -> None:
    with Connection([_twin()]) as connection, pytest.raises(UsageError):
        connection.sending.send(0, first, npages, bytes(pages * PAGE))


def test_data_without_content_is_refused() -> None:
    with Connection([_twin()]) as connection, pytest.raises(UsageError):
        connection.sending.send(0, 0, 1, None, time.monotonic_ns())


def test_second_pages_are_refused_while_the_first_are_sent() -> None:
    with Connection([_twin()]) as connection:
        connection.sending.send(0, 0, 1, bytes(PAGE))
        with pytest.raises(UsageError):
            connection.sending.send(0, 1, 1, bytes(PAGE))


def test_last_words_of_a_destination_that_went_are_heard() -> None:
    with Connection([_twin()]) as connection:
        ours, theirs = socket.socketpair()
        connection.sending.connect(ours)
        theirs.sendall(_message(1, bytes(4)))
        theirs.close()
        connection.sending.send(0, 0, 64, bytes(64 * PAGE), time.monotonic_ns())
        assert connection.serve(Events.MESSAGE)
        assert connection.sending.received() == _message(1, bytes(4))
        with pytest.raises(ConnectionError):
            connection.serve(Events.MESSAGE)
        ours.close()


def test_sending_is_idle_only_between_records() -> None:
    with Connection([_twin(4096)]) as connection:
        assert connection.sending.idle
        ours, theirs = socket.socketpair()
        connection.sending.connect(ours)
        connection.sending.send(0, 0, 4096, bytes(4096 * PAGE))
        connection.sending.serve(push=False, quiet=0, timeout=1_000_000)
        assert not connection.sending.idle
        ours.close()
        theirs.close()


def test_answer_of_the_caller_waits_for_one_of_the_core() -> None:
    data = [page >= 2048 for page in range(4096)]
    twin = _twin(4096, data=data, pending=data)
    with Connection([twin]) as connection:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        connection.sending.connect(ours)
        sending, room = connection.sending, 0
        for page in range(2048):  # zeros, until the socket is full
            theirs.sendall(_message(3, struct.pack(">QI", page * PAGE, PAGE) + b"\3ram"))
            sending.serve(push=False, quiet=0, timeout=0)
            room = page
            if sending.answering:
                break
        assert sending.answering
        with pytest.raises(UsageError):
            sending.send(0, 2048, 1, bytes(PAGE), time.monotonic_ns())
        received = theirs.recv(1 << 20)
        events = sending.serve(push=False, quiet=0, timeout=None, waits=True)
        assert events == Events.ANSWERED
        assert not sending.answering
        sending.send(0, 2048, 1, b"page" * (PAGE // 4), time.monotonic_ns())
        while not sending.serve(push=False, quiet=0, timeout=1_000_000) & Events.ANSWERED:
            received += theirs.recv(1 << 20)
        received += theirs.recv(1 << 20)
        expected = SenderTwin([twin])
        answers = [expected.send(0, page, 1, bytes(PAGE), True) for page in range(room + 1)]
        answers.append(expected.send(0, 2048, 1, b"page" * (PAGE // 4), True))
        assert received == b"".join(answers)
        ours.close()
        theirs.close()
