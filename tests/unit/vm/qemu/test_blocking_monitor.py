"""A session with a monitor without an event loop."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyqmigrate.errors import QemuGone, QemuRefused
from pyqmigrate.vm.qemu.blocking_monitor import BlockingMonitor
from pyqmigrate.vm.qemu.commands import run_blocking

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}}}
Answer = Callable[[dict[str, Any]], "dict[str, Any] | None"]


@contextmanager
def monitor(answer: Answer, *before: dict[str, Any]) -> Iterator[BlockingMonitor]:
    """A session with a QEMU that sends ``before``, and hangs up where ``answer`` returns None."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("r") as lines:
            for line in (GREETING, *before):
                theirs.sendall(json.dumps(line).encode() + b"\n")
            for text in lines:
                reply = answer(json.loads(text))
                if reply is None:
                    return
                theirs.sendall(json.dumps(reply).encode() + b"\n")

    session = BlockingMonitor(ours)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours:
            yield session
    finally:
        thread.join(10)
        assert not thread.is_alive()


def echo(command: dict[str, Any]) -> dict[str, Any]:
    return {"return": command["execute"]}


def test_answers_belong_to_the_commands_in_their_order() -> None:
    event = {"event": "RESUME", "timestamp": {}}
    with monitor(echo, event) as session:
        for name in ("first", "second", "third"):
            session.ask(name)
        assert run_blocking(session.execute("third")) == "third"
        assert run_blocking(session.execute("fourth")) == "fourth"
        assert run_blocking(session.execute("first")) == "first"
        assert session.version == (10, 0, 2)
        assert session.answered_at is not None


def test_out_of_band_commands_are_enabled_before_anything_is_asked() -> None:
    seen: list[dict[str, Any]] = []

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        seen.append(command)
        return {"return": {}}

    with monitor(answer) as session:
        session.ask("query-kvm")
        session.negotiate()
        run_blocking(session.execute("query-kvm"))
    assert [command["execute"] for command in seen] == ["qmp_capabilities", "query-kvm"]
    assert seen[0]["arguments"] == {"enable": ["oob"]}


def test_a_refusal_is_that_of_its_command() -> None:
    def answer(command: dict[str, Any]) -> dict[str, Any]:
        if command["execute"] == "bad":
            return {"error": {"class": "GenericError", "desc": "no such thing"}}
        return echo(command)

    with monitor(answer) as session:
        session.ask("bad")
        session.ask("good")
        assert run_blocking(session.execute("good")) == "good"
        with pytest.raises(QemuRefused, match="no such thing"):
            run_blocking(session.execute("bad"))


def test_a_qemu_that_ends_is_gone() -> None:
    with monitor(lambda command: None) as session, pytest.raises(QemuGone, match="hung up"):
        run_blocking(session.execute("query-kvm"))


def test_what_needs_an_event_loop_is_not_run_without_one() -> None:
    with pytest.raises(RuntimeError, match="event loop"):
        run_blocking(asyncio.sleep(1))
