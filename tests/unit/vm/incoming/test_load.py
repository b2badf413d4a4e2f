"""Waiting until QEMU has loaded."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyqmigrate.vm.incoming.incoming_settings import Incoming
from pyqmigrate.vm.incoming.load import take_in
from pyqmigrate.vm.qemu.launch import QemuSession
from pyqmigrate.vm.qemu.monitor import Monitor

_LIMIT = 0.2  # seconds; of an answer


def _serve(connection: socket.socket) -> None:
    """Answer as a QEMU whose main loop is busy with the load for longer than an answer may take."""
    version = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}
    with connection:

        def send(message: dict[str, Any]) -> None:
            connection.sendall(json.dumps(message).encode() + b"\n")

        send({"QMP": {"version": version, "capabilities": []}})
        while message := connection.recv(1 << 16):  # the next one comes after the answer
            command = json.loads(message)
            result: Any = {}
            match command["execute"]:
                case "query-migrate-capabilities":
                    result = []
                case "query-migrate":
                    time.sleep(2 * _LIMIT)
                    result = {"status": "completed"}
            send({"return": result} | {key: command[key] for key in command if key == "id"})


def test_load_may_take_longer_than_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(Any, Monitor.execute).__kwdefaults__, "timeout", _LIMIT)
    monkeypatch.setattr(Monitor, "get_fd", _nothing)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=_serve, args=(theirs,))
    thread.start()

    async def run() -> float:
        async with await Monitor.over(ours, "qmp", timeout=5) as monitor:
            qemu = cast(QemuSession, SimpleNamespace(monitor=monitor))
            return await take_in(qemu, Incoming({}, 0, stream=0))

    try:
        assert asyncio.run(run()) >= 2 * _LIMIT
    finally:
        ours.close()
        thread.join(10)


async def _nothing(*_: object) -> None:
    """A fake QEMU takes no descriptors."""
