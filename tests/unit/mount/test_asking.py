"""Questions to a keeper: whatever a client sends, the keeper goes on."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.mount.asking import Asking, KeeperClient, connect, listen
from pyqmigrate.mount.messages import Messages


def fail(question: dict[str, Any]) -> dict[str, Any]:
    kind = {"usage": UsageError("wrong"), "none": NotSupported("not here")}.get(question["kind"])
    raise kind or TargetError(28, "cannot write", "/the/file")


class Ends:
    """Both ends of a connection, and a thread that answers."""

    def __init__(self) -> None:
        ours, self.raw = socket.socketpair()
        answers = {"echo": lambda question: {"said": question["text"]}, "fail": fail}
        self._asking = Asking(ours, answers)
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        self.client = KeeperClient(self.raw)

    def _answer(self) -> None:
        while True:
            select.select([self._asking], [], [])
            if not self._asking.take():
                self._asking.close()
                return

    def close(self) -> None:
        self.client.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_question_gets_its_answer(ends: Ends) -> None:
    assert ends.client.ask("echo", text="x" * 100_000) == {"said": "x" * 100_000}
    assert ends.client.ask("echo", text="\udcff") == {"said": "\udcff"}


def test_errors_arrive_as_what_they_were(ends: Ends) -> None:
    with pytest.raises(UsageError, match="wrong"):
        ends.client.ask("fail", kind="usage")
    with pytest.raises(NotSupported, match="not here"):
        ends.client.ask("fail", kind="none")
    with pytest.raises(TargetError) as caught:
        ends.client.ask("fail", kind="system")
    assert (caught.value.errno, caught.value.filename) == (28, "/the/file")
    assert "cannot write" in str(caught.value)


def test_unknown_questions_and_missing_arguments_are_refused(ends: Ends) -> None:
    with pytest.raises(UsageError, match="not a question"):
        ends.client.ask("unknown")
    with pytest.raises(UsageError, match="KeyError"):
        ends.client.ask("echo")


@settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(st.binary(max_size=60).map(lambda raw: raw.replace(b"\n", b"")), max_size=5))
def test_each_line_that_is_not_a_question_gets_an_error(ends: Ends, lines: list[bytes]) -> None:
    ends.raw.settimeout(10)
    ends.raw.sendall(b"".join(line + b"\n" for line in lines))
    for _ in lines:
        with pytest.raises(UsageError):
            ends.client.wait(10)
    assert ends.client.ask("echo", text="still there") == {"said": "still there"}


def test_end_of_the_keeper_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    client = KeeperClient(ours)
    theirs.close()
    with pytest.raises(TargetError, match="keeper"):
        client.ask("status")
    client.close()


def test_keeper_that_does_not_answer_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    client = KeeperClient(ours)
    with pytest.raises(TargetError, match="does not answer"):
        client.ask("status", limit=0.1)
    client.close()
    theirs.close()


def test_messages_of_a_keeper_are_passed_on_before_the_answer() -> None:
    ours, theirs = socket.socketpair()
    client, seen = KeeperClient(ours), []
    client.on_message = seen.append
    for item in ({"message": "one"}, {"message": "two"}, {"done": 1}):
        theirs.sendall(json.dumps(item).encode() + b"\n")
    assert client.wait(10) == {"done": 1}
    assert seen == ["one", "two"]
    client.close()
    theirs.close()


def test_name_of_a_device_is_given_once_and_answers_to_its_user_only() -> None:
    device = os.makedev(4000, os.getpid())  # of no file system
    listening = listen(device)
    assert listening is not None
    assert listen(device) is None
    client = connect(device, os.geteuid())
    assert client is not None
    assert client.pid == os.getpid()
    client.close()
    if os.geteuid():
        assert connect(device, os.geteuid() + 1) is None
    listening.close()
    assert connect(device, os.geteuid()) is None


def test_last_messages_are_kept_and_the_same_one_once() -> None:
    written: list[str] = []
    messages = Messages(written.append)
    assert messages.add("first")
    assert not messages.add("first")
    for number in range(150):
        assert messages.add(f"{number}")
    kept = messages.all()
    assert [message.text for message in kept] == [f"{number}" for number in range(50, 150)]
    assert written == ["first", *(f"{number}" for number in range(150))]


def test_log_that_cannot_be_written_ends_nothing() -> None:
    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    messages = Messages(full)
    assert messages.add("x" * 5000)
    assert len(messages.all()[0].text) == 2000
