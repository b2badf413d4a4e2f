"""Pools of guests: a client of the socket, a pool without QEMUs, a pool as a process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyqmigrate.errors import TargetError

__all__ = ["FakeGuest", "FakePool", "PoolClient", "is_alive", "pool_process", "until"]

_ROOT = Path(__file__).parents[2]
_PATIENCE = 60.0  # seconds


class PoolClient:
    """A connection to the socket of a pool, with blocking calls."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(_PATIENCE)
        self.socket.connect(os.fspath(path))
        self._replies = self.socket.makefile("rb")

    def send(self, line: bytes) -> None:
        self.socket.sendall(line)

    def receive(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            raise EOFError("the pool has hung up")
        return dict(json.loads(line))

    def ask(self, command: str, **keys: Any) -> dict[str, Any]:
        self.send(json.dumps({"command": command, **keys}).encode() + b"\n")
        return self.receive()

    def close(self) -> None:
        self._replies.close()
        self.socket.close()

    def __enter__(self) -> PoolClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeReport:
    mode = "instant"


class FakeGuest:
    """What a server needs of a guest."""

    report = FakeReport()
    run_state = "running"
    listeners = ()

    def __init__(self, number: int) -> None:
        self.number = self.pid = number
        self.qmp = Path(f"/run/{number}.qmp")
        self.has_ended = False

    async def end(self) -> None:
        await asyncio.sleep(0)
        self.has_ended = True


class FakePool:
    """Hands out numbers; ``gate`` holds takes up. ``guests`` are all that were handed out."""

    limit = 8
    ready = ()
    starting = 0
    last_error = None

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.guests: dict[int, FakeGuest] = {}
        self._numbers = itertools.count(1)

    @property
    def taken(self) -> list[FakeGuest]:
        return [guest for guest in self.guests.values() if not guest.has_ended]

    async def take(self, *, paused: bool | None = None) -> FakeGuest:
        if len(self.taken) >= self.limit:
            raise TargetError(16, "too many")
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        guest = FakeGuest(next(self._numbers))
        self.guests[guest.number] = guest
        return guest

    async def reset(self, guest: FakeGuest, *, paused: bool | None = None) -> FakeGuest:
        await guest.end()
        return await self.take(paused=paused)


@contextlib.contextmanager
def pool_process(
    snapshot: Path, command: Sequence[str], socket_path: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """``vm pool``; gives the process and its JSON as soon as the guests are ready. Killed on exit."""
    verb = [sys.executable, "-m", "pyqmigrate", "vm", "pool", "--json", str(snapshot)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*verb, "--socket", str(socket_path), *options, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=_ROOT,
        )
        assert process.stdout is not None
        try:
            text = b""
            while not text.endswith(b"\n}\n"):
                line = process.stdout.readline()
                assert line, os.pread(errors.fileno(), 1 << 16, 0).decode()
                text += line
            yield process, dict(json.loads(text))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()


def is_alive(pid: int) -> bool:
    """Whether a process runs: it has not ended, and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def until(condition: Any, what: str) -> None:
    """Wait until ``condition()`` is true."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
