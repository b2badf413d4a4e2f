"""What a manager pays for the server: a save through it, and what asking costs a save."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from bench.disk import Disk
from bench.micro.conftest import ROOT
from bench.results import Verdict, verdict_table
from pyqmigrate import Descriptors, FileMemory, RamBlock, save
from pyqmigrate.format.uri import parse_size
from tests.harness.contents import Contents, fill

SIZE = parse_size(os.environ.get("PYQMIGRATE_BENCH_SERVE_SIZE", "2G"))
ROUNDS = int(os.environ.get("PYQMIGRATE_BENCH_SERVE_ROUNDS", "5"))
CHANNELS = 2
QUESTIONS = 10_000
SECONDS = 6.0  # that a save with a limited bandwidth takes
FDSET = "file:/dev/fdset/1"
QUESTION = b'{"execute":"query-migrate"}'


@pytest.fixture(scope="module")
def memory() -> Iterator[int]:
    """A memfd of SIZE bytes that cannot shrink, which is how memory is read without a copy."""
    fd = os.memfd_create("bench-serve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with mmap.mmap(fd, SIZE) as mapping, memoryview(mapping) as view:
            fill(view, Contents.RUNS)
        yield fd
    finally:
        os.close(fd)


class Client:
    """A raw client: what it sends is prepared, and answers are parsed only when asked for."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._sock.settimeout(120)
        self._input = bytearray()
        self._events: list[bytes] = []
        self.line()
        self.execute("qmp_capabilities")

    def line(self) -> bytes:
        while (end := self._input.find(b"\n")) < 0:
            data = self._sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the server has hung up")
            self._input += data
        line = bytes(self._input[: end + 1])
        del self._input[: end + 1]
        return line

    def ask(self, question: bytes) -> bytes:
        """The answer's line; events that come before it are kept for ``wait_for``."""
        self._sock.sendall(question)
        while (line := self.line()).startswith(b'{"timestamp"'):
            self._events.append(line)
        return line

    def execute(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        if fd is not None:
            socket.send_fds(self._sock, [b" "], [fd])
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        question = json.dumps({"execute": command, "arguments": named})
        return json.loads(self.ask(question.encode()))["return"]

    def wait_for(self, status: str) -> None:
        """Takes events up to a migration's ``status``."""
        while True:
            message = json.loads(self._events.pop(0) if self._events else self.line())
            reached = message.get("data", {}).get("status")
            if reached == status:
                return
            assert reached not in ("failed", "cancelled"), message

    def close(self) -> None:
        self._sock.close()


class Server:
    """``pyqmigrate serve`` in front of the memory, and a client that has set it up."""

    def __init__(self, directory: Path, memory: int) -> None:
        self.socket = directory / "qmp"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, ROOT])}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pyqmigrate",
                "serve",
                "--qmp",
                f"unix:{self.socket}",
                "--ram",
                f"pc.ram=/proc/self/fd/{memory}",
            ],
            pass_fds=[memory],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client = Client(self.socket)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert self._process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        on = [{"capability": c, "state": True} for c in ("mapped-ram", "multifd", "events")]
        self.client.execute("migrate-set-capabilities", capabilities=on)
        self.client.execute(
            "migrate-set-parameters", direct_io=True, multifd_channels=CHANNELS, max_bandwidth=0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.terminate()
        self._process.wait(30)

    def start(self, plain: int, direct: int) -> None:
        """Hands in both descriptors and begins a save."""
        self.client.execute("add-fd", fd=plain, fdset_id=1)
        self.client.execute("add-fd", fd=direct, fdset_id=1)
        self.client.execute("migrate", uri=FDSET)

    def finish(self) -> dict[str, Any]:
        """Waits for the end; the last ``query-migrate``."""
        self.client.wait_for("completed")
        self.client.execute("remove-fd", fdset_id=1)
        ended: dict[str, Any] = self.client.execute("query-migrate")
        self.client.execute("cont")
        return ended


@pytest.fixture
def server(tmp_path: Path, memory: int) -> Iterator[Server]:
    with Server(tmp_path, memory) as started:
        yield started


@contextlib.contextmanager
def two_descriptors(path: Path) -> Iterator[tuple[int, int]]:
    plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield plain, direct
    finally:
        os.close(plain)
        os.close(direct)


def report(
    capsys: pytest.CaptureFixture[str], benchmark: Any, verdicts: list[Verdict], **facts: Any
) -> None:
    """Prints what was measured against its target, and keeps it with the benchmark."""
    benchmark.extra_info.update(facts, load=os.getloadavg()[0])
    with capsys.disabled():
        print("\n" + verdict_table(verdicts))


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f})"


def test_save_through_the_server(
    benchmark: Any,
    server: Server,
    memory: int,
    disk: Disk,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The library's save of the same memory, with the same settings, takes turns with it."""
    block = RamBlock("pc.ram", FileMemory(memory))
    library: list[float] = []
    served: list[float] = []

    def by_the_library() -> tuple[int, int]:
        disk.clear(target)
        start = time.monotonic()
        with two_descriptors(target) as (plain, direct):
            done = save(Descriptors(plain, direct), [block], channels=CHANNELS, direct_io="on")
        library.append(time.monotonic() - start)
        disk.clear(target)
        return done.data_pages, done.zero_pages

    def by_the_server() -> tuple[int, int]:
        start = time.monotonic()
        with two_descriptors(target) as (plain, direct):
            server.start(plain, direct)
            ram = server.finish()["ram"]
        served.append(time.monotonic() - start)
        return ram["normal"], ram["duplicate"]

    benchmark.group = "serve"
    benchmark.extra_info["bytes"] = SIZE
    assert by_the_library() == by_the_server()  # which do not count: the first of all is slower
    library.clear()
    served.clear()
    benchmark.pedantic(by_the_server, setup=lambda: void(by_the_library()), rounds=ROUNDS)
    ratio = statistics.median(served) / statistics.median(library)
    verdict = Verdict(
        "save through the server / pyqmigrate.save",
        ratio,
        1.02,
        detail=f"{spread(served)} / {spread(library)}",
    )
    report(capsys, benchmark, [verdict], ratio=ratio, library_seconds=library)


def test_questions_during_a_save(
    benchmark: Any, server: Server, disk: Disk, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A save without questions takes turns with one that is asked about from start to end."""
    client = server.client
    client.execute("migrate-set-parameters", max_bandwidth=round(SIZE / 2 / SECONDS))
    alone: list[float] = []
    asked: list[float] = []
    rates: list[float] = []

    def quietly() -> None:
        disk.clear(target)
        with two_descriptors(target) as (plain, direct):
            server.start(plain, direct)
            alone.append(server.finish()["total-time"] / 1000)
        disk.clear(target)

    def with_questions() -> None:
        with two_descriptors(target) as (plain, direct):
            server.start(plain, direct)
            client.wait_for("active")
            start = time.monotonic()
            for _ in range(QUESTIONS):
                answer = client.ask(QUESTION)
            rates.append(QUESTIONS / (time.monotonic() - start))
            assert json.loads(answer)["return"]["status"] == "active"
            asked.append(server.finish()["total-time"] / 1000)

    benchmark.group = "serve"
    benchmark.pedantic(with_questions, setup=quietly, rounds=3)
    rate, ratio = statistics.median(rates), statistics.median(asked) / statistics.median(alone)
    verdicts = [
        Verdict(
            "query-migrate a second",
            rate,
            2000,
            "/s",
            at_least=True,
            detail=f"{min(rates):.0f}-{max(rates):.0f}",
        ),
        Verdict(
            "save with questions / without",
            ratio,
            1.05,
            detail=f"{spread(asked)} / {spread(alone)}",
        ),
    ]
    report(capsys, benchmark, verdicts, rate=rate, ratio=ratio, alone_seconds=alone)


def void(_: object) -> None:
    """A setup that returns something would give the benchmark its arguments."""
