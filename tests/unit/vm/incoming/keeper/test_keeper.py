"""The keeper of a lazy restore, with a page server and a monitor of this test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import QemuGone, TargetError
from pyqmigrate.vm.incoming.keeper.keeper import Keeper
from pyqmigrate.vm.incoming.keeper.lines import LINE_MAX
from pyqmigrate.vm.incoming.keeper.server import ServerProgram
from pyqmigrate.vm.incoming.keeper.state import DAMAGES_MAX, status_name
from pyqmigrate.vm.incoming.lazy_state import LazyState
from pyqmigrate.vm.incoming.lazy_status import wait_for_memory

# A page server that does what its snapshot says, a line of JSON. Its order comes on standard input.
SERVER = """
import json, os, socket, sys
control = socket.socket(fileno=0)
line = b""
while not line.endswith(b"\\n"):
    line += control.recv(1)
order = json.loads(line)
words = order["words"]
value = lambda name: words[words.index(name) + 1]
control = control.makefile("rw")
plan = json.load(open(order["snapshot"]))
if "--wait" in words:
    begin = json.loads(control.readline())
    assert begin == {"command": "begin", "host_pages": {"m": 1 << 21}}, begin
else:
    assert json.loads(value("--host-pages")) == {"m": 1 << 21}
    assert value("--expect") == "the state"
for event in plan["resumed" if "--resume" in words else "first"]:
    if event == "wait":
        control.readline()
    elif isinstance(event, int):
        os._exit(event)
    else:
        print(json.dumps(event), file=control, flush=True)
"""
OPENED = {"event": "opened", "state": "the state"}
LOADED = {"event": "loaded", "pages_left": 5, "requests": 1, "mean_latency": 0.5}
SHUT = {"event": "shut", "complete": True, "pages_left": 0}


class FakeQemu:
    """A negotiated monitor that answers; it is paused when asked to recover ``refusals`` times before."""

    def __init__(self, refusals: int = 0, status: str = "completed") -> None:
        self.keeper_end, self._ours = socket.socketpair()
        self.commands: list[dict[str, Any]] = []
        self.refusals, self.status = refusals, status
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._ours.makefile("r"):
                command = json.loads(line)
                self.commands.append(command)
                reply: dict[str, Any] = {"id": command["id"], "return": {}}
                if command.get("execute") == "query-migrate":
                    reply["return"] = {"status": self.status}
                if command.get("exec-oob") == "migrate-recover" and self.refusals:
                    self.refusals -= 1
                    reply = {"id": command["id"], "error": {"desc": "not paused"}}
                self._ours.sendall(json.dumps(reply).encode() + b"\n")

    def names(self) -> list[str]:
        return [str(c.get("execute") or c.get("exec-oob")) for c in self.commands]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._ours.close()


@contextlib.contextmanager
def keeper(
    directory: Path, first: list[Any], resumed: list[Any], qemu: FakeQemu
) -> Iterator[tuple[socket.socket, int]]:
    """A keeper in a thread; its parent's socket, and the process id that stands for QEMU."""
    server, plan = directory / "server.py", directory / "plan"
    server.write_text(SERVER)
    plan.write_text(json.dumps({"first": first, "resumed": resumed}))
    parent, theirs = socket.socketpair()
    source, destination = socket.socketpair()
    with subprocess.Popen(["sleep", "60"]) as process:
        setup = {
            "server": [],
            "first": [],
            "snapshot": str(plan),
            "kept": [],
            "hold": None,
            "push": "idle",
        }
        start = {"pid": process.pid, "host_pages": {"m": 1 << 21}, "collapse": []}
        program = ServerProgram([sys.executable, "-I", "-S", str(server)])
        thread = threading.Thread(target=Keeper(theirs, program).run)
        thread.start()
        try:
            with qemu.keeper_end as monitor, source:
                line = json.dumps({"setup": setup}).encode() + b"\n"
                socket.send_fds(parent, [line], [monitor.fileno(), source.fileno()])
            for line in ({"start": start}, {"monitor": True}):
                parent.sendall(json.dumps(line).encode() + b"\n")
            yield parent, process.pid
        finally:
            process.kill()
            thread.join()
            qemu.close()
            parent.close()
            destination.close()


def last_state(parent: socket.socket) -> LazyState:
    """The state with which a keeper ends."""
    return [LazyState.of(json.loads(line)) for line in parent.makefile("r")][-1]


def test_a_restore_is_complete_when_the_server_and_qemu_say_so(tmp_path: Path) -> None:
    qemu = FakeQemu()
    with keeper(tmp_path, [OPENED, LOADED, SHUT, 0], [], qemu) as (parent, _):
        state = last_state(parent)
    assert state.state == "completed"
    assert (state.pages_left, state.faults, state.restarts) == (0, 1, 0)
    assert "migrate-recover" not in qemu.names()


def test_a_server_that_dies_before_anything_was_loaded_is_the_end(tmp_path: Path) -> None:
    error = {"event": "error", "error": "no such snapshot"}
    with keeper(tmp_path, [error, 1], [], FakeQemu()) as (parent, _):
        state = last_state(parent)
    assert (state.state, state.failure) == ("failed", "no such snapshot")


def test_a_server_that_dies_later_is_replaced_on_a_new_connection(tmp_path: Path) -> None:
    qemu = FakeQemu(refusals=2, status="postcopy-active")
    with keeper(tmp_path, [OPENED, LOADED, 1], [OPENED, LOADED, "wait"], qemu) as (parent, _):
        lines = parent.makefile("r")
        states = [LazyState.of(json.loads(lines.readline()))]
        while not states[-1].restarts or states[-1].state != "running":
            states.append(LazyState.of(json.loads(lines.readline())))
    recoveries = [c for c in qemu.commands if c.get("exec-oob") == "migrate-recover"]
    assert recoveries[0]["arguments"]["uri"].startswith("fd:pyqmigrate-lazy-")
    assert qemu.names().index("getfd") < qemu.names().index("migrate-recover")


def test_the_end_of_qemu_is_the_end(tmp_path: Path) -> None:
    with keeper(tmp_path, [OPENED, LOADED, "wait"], [], FakeQemu()) as (parent, pid):
        lines = parent.makefile("r")
        assert LazyState.of(json.loads(lines.readline())).loaded
        os.kill(pid, 9)
        assert LazyState.of(json.loads(lines.readlines()[-1])).state == "gone"


def test_another_process_may_ask_and_wait(tmp_path: Path) -> None:
    with keeper(tmp_path, [OPENED, LOADED, "wait"], [], FakeQemu()) as (parent, pid):
        assert parent.makefile("r").readline()
        seen: list[LazyState] = []

        async def wait() -> None:
            waiting = asyncio.create_task(wait_for_memory(pid, progress=seen.append))
            while not seen:
                await asyncio.sleep(0.01)
            os.kill(pid, 9)
            with pytest.raises(QemuGone, match="ended before it had all of its memory"):
                await waiting

        asyncio.run(wait())
    assert seen[0].pages_left == 5


def test_a_client_that_sends_no_line_is_hung_up_on(tmp_path: Path) -> None:
    with keeper(tmp_path, [OPENED, LOADED, "wait"], [], FakeQemu()) as (parent, pid):
        assert parent.makefile("r").readline()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(status_name(pid))
            client.settimeout(10)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b"x" * (LINE_MAX + 70000))
                while client.recv(65536):
                    pass


def test_a_process_that_is_not_there_cannot_be_waited_for() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        with pytest.raises(QemuGone, match="there is no process"):
            asyncio.run(wait_for_memory(process.pid))


def test_without_a_lazy_restore_all_memory_is_there() -> None:
    state = asyncio.run(wait_for_memory(os.getpid()))
    assert (state.state, state.pages_left) == ("completed", 0)


def test_damage_is_listed_once_and_bounded(tmp_path: Path) -> None:
    damages = [
        {"event": "damage", "block": "m", "page": page, "error": f"page {page} is damaged"}
        for page in [1, 1, *range(200)]
    ]
    with keeper(tmp_path, [OPENED, LOADED, *damages, "wait"], [], FakeQemu()) as (parent, pid):
        lines = parent.makefile("r")
        while len(LazyState.of(json.loads(lines.readline())).damages) < DAMAGES_MAX:
            pass
        os.kill(pid, 9)
        state = LazyState.of(json.loads(lines.readlines()[-1]))
    assert len(state.damages) == DAMAGES_MAX
    assert len(set(state.damages)) == len(state.damages)
    assert str(state.damages[0]) == "page 1 is damaged"


def test_a_copy_that_cannot_be_served_leaves_the_former_one(tmp_path: Path) -> None:
    qemu = FakeQemu(status="postcopy-active")
    with keeper(tmp_path, [OPENED, LOADED, "wait"], [OPENED, LOADED, "wait"], qemu) as (
        parent,
        pid,
    ):
        lines = parent.makefile("r")
        assert lines.readline()
        bad = tmp_path / "bad"
        bad.write_text(json.dumps({"first": [], "resumed": [1]}))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(status_name(pid))
            client.sendall(json.dumps({"resume": str(bad)}).encode() + b"\n")
            states = [LazyState.of(json.loads(lines.readline()))]
            while states[-1].state != "running" or states[-1].restarts < 2:
                states.append(LazyState.of(json.loads(lines.readline())))
    assert any("cannot come from" in warning for warning in states[-1].warnings)


def test_a_copy_that_is_not_there_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot open"):
        asyncio.run(wait_for_memory(os.getpid(), resume=tmp_path / "missing"))
