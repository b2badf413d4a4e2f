"""A page server into a process that only reads, and the round trip of a request.

The destination is a process: the server's processor time is that of this one.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import MIB, SIZE, Memories
from pyqmigrate import RamBlock, save
from pyqmigrate.format.postcopy.stream import LOADED_PING
from pyqmigrate.page_server.options import Push, ServerOptions
from pyqmigrate.page_server.server import PageServer
from pyqmigrate.page_server.sources import open_source
from tests.harness.contents import Contents

PAGE = 4096
REQUESTS = 2000
_PONG = struct.pack(">HHI", 2, 4, LOADED_PING)
_SHUT = struct.pack(">HHI", 1, 4, 0)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sealed"])
def snapshot(
    request: pytest.FixtureRequest, disk: Disk, memories: Memories
) -> Iterator[tuple[Path, bool]]:
    path = disk.directory / "served.mapped"
    seal = "xxh3-128" if request.param else None
    save(path, [RamBlock("ram", memories(Contents.DENSE))], seal=seal)
    yield path, request.param
    disk.clear(path)
    Path(f"{path}.seal").unlink(missing_ok=True)


def sink(connection: socket.socket) -> None:
    """Take everything; answer that it was loaded, and that all is there."""
    connection.sendall(_PONG)
    buffer, last = bytearray(1 << 18), b""
    while length := connection.recv_into(buffer):
        last = (last + bytes(buffer[max(0, length - 19) : length]))[-19:]
        if last.endswith(b"RAM\0") and last[0] == 3:  # the end of RAM, and of the stream
            connection.sendall(_SHUT)


def ask(connection: socket.socket, result: int) -> None:
    """Ask for pages in turn, each when the one before has arrived; write the mean and the median, in us."""
    connection.sendall(_PONG)
    time.sleep(0.2)
    while True:  # the head
        try:
            connection.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
    took = []
    for number in range(REQUESTS):
        page = number * 37 % (SIZE // PAGE)
        body = struct.pack(">QI", page * PAGE, PAGE) + b"\3ram"
        started = time.perf_counter()
        connection.sendall(struct.pack(">HH", 3, len(body)) + body)
        left = 5 + 8 + (4 if number == 0 else 0) + PAGE + 13
        while left:
            left -= len(connection.recv(left))
        took.append((time.perf_counter() - started) * 1e6)
    os.write(result, struct.pack("dd", statistics.mean(took), statistics.median(took)))


def serve(path: Path, push: Push, destination: Any, *arguments: Any) -> float:
    """Serve until the destination has everything or goes; return the processor time, in seconds."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            destination(theirs, *arguments)
        finally:
            os._exit(0)
    theirs.close()
    with open_source(path) as source:
        server = PageServer(source, {}, ServerOptions(push), lambda event: None)
        started = time.process_time()
        server.begin(ours)
        server.serve()
        used = time.process_time() - started
        server.close()
    os.waitpid(pid, 0)
    return used


def test_push(benchmark: Any, snapshot: tuple[Path, bool]) -> None:
    path, _ = snapshot
    benchmark.group = "page server"
    benchmark.extra_info["bytes"] = SIZE
    used = []
    benchmark.pedantic(
        lambda: used.append(serve(path, Push.ALWAYS, sink)), rounds=5, warmup_rounds=1
    )
    benchmark.extra_info["cpu_seconds_a_gib"] = statistics.median(used) / SIZE * 1024 * MIB
    print(f"\n{benchmark.extra_info['cpu_seconds_a_gib']:.2f} s of processor time a GiB")


def test_round_trip_of_a_request(benchmark: Any, snapshot: tuple[Path, bool]) -> None:
    path, _ = snapshot
    reader, writer = os.pipe()
    benchmark.group = "page server"
    benchmark.pedantic(lambda: serve(path, Push.NEVER, ask, writer), rounds=1)
    mean, median = struct.unpack("dd", os.read(reader, 16))
    os.close(reader)
    os.close(writer)
    benchmark.extra_info["request_us"] = mean
    print(f"\n{mean:.1f} us for a request, {median:.1f} us in the median")
