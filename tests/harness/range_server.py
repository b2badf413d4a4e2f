"""A web server for the files of a directory, by ranges, as an object store answers: as fast as the kernel sends.

It serves a store of snapshots for reading, under ``http://``. It can wait before each answer, and knows
which requests it got. As a program it is a process of its own, which takes no time from the one that
measures: see :func:`serving`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple, Self

__all__ = ["RangeServer", "ServedRequest", "ServerProcess", "serving"]

_ROOT = Path(__file__).resolve().parents[2]
_RANGE = re.compile(rb"\r\nrange: *bytes=(\d*)-(\d*)\r\n", re.IGNORECASE)


class ServedRequest(NamedTuple):
    """A request that was answered: ``start`` and ``length`` are of the bytes that were sent."""

    method: str
    path: str
    start: int
    length: int


class RangeServer:
    """Serves ``directory`` at ``url`` until it is closed; each request waits for ``delay`` seconds."""

    def __init__(self, directory: Path, delay: float = 0.0) -> None:
        self.delay = delay
        self.requests: list[ServedRequest] = []
        self._directory = directory.resolve()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def count(self, part: str) -> int:
        """Return the number of requests whose path has this part."""
        return sum(part in request.path for request in self.requests)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Answer the requests of one connection."""
        with client, contextlib.suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            received = b""
            while True:
                while b"\r\n\r\n" not in received:
                    data = client.recv(1 << 16)
                    if not data:
                        return
                    received += data
                head, _, received = received.partition(b"\r\n\r\n")
                if self.delay:
                    time.sleep(self.delay)
                self._answer(client, head + b"\r\n")

    def _answer(self, client: socket.socket, head: bytes) -> None:
        method, target, _ = head.split(b" ", 2)
        path = target.decode().partition("?")[0].lstrip("/")
        place = (self._directory / path).resolve()
        if method not in (b"GET", b"HEAD"):
            self._refuse(client, method, path, "405 Method Not Allowed")
        elif not place.is_relative_to(self._directory) or not place.is_file():
            self._refuse(client, method, path, "404 Not Found")
        else:
            with place.open("rb", buffering=0) as file:
                self._send(client, method, path, file.fileno(), _RANGE.search(head))

    def _refuse(self, client: socket.socket, method: bytes, path: str, status: str) -> None:
        self.requests.append(ServedRequest(method.decode(), path, 0, 0))
        client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    def _send(
        self,
        client: socket.socket,
        method: bytes,
        path: str,
        fd: int,
        asked: re.Match[bytes] | None,
    ) -> None:
        info = os.fstat(fd)
        start, end = 0, info.st_size
        if asked and asked[1]:
            start = int(asked[1])
            end = min(int(asked[2]) + 1, end) if asked[2] else end
        elif asked:
            start = max(end - int(asked[2]), 0)
        if start >= end and asked:
            self._refuse(client, method, path, "416 Range Not Satisfiable")
            return
        lines = [
            "HTTP/1.1 206 Partial Content" if asked else "HTTP/1.1 200 OK",
            f"Content-Length: {end - start}",
            f"Last-Modified: {formatdate(info.st_mtime, usegmt=True)}",
            f'ETag: "{info.st_ino:x}-{info.st_mtime_ns:x}"',
            "Accept-Ranges: bytes",
        ]
        if asked:
            lines.append(f"Content-Range: bytes {start}-{end - 1}/{info.st_size}")
        self.requests.append(ServedRequest(method.decode(), path, start, end - start))
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        while method == b"GET" and start < end:
            start += os.sendfile(client.fileno(), fd, start, end - start)


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = process
        self.url = url

    def take_requests(self) -> list[ServedRequest]:
        """Return the requests since the last call."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("requests\n")
        self._process.stdin.flush()
        return [ServedRequest(*one) for one in json.loads(self._process.stdout.readline())]


@contextlib.contextmanager
def serving(directory: Path, delay: float) -> Iterator[ServerProcess]:
    """Serve a directory with ``delay`` seconds before each answer, from another process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.range_server", str(directory), str(delay)],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield ServerProcess(process, process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until standard input ends; each line there asks for the requests since the last one."""
    with RangeServer(Path(sys.argv[1]), float(sys.argv[2])) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            found, server.requests = server.requests, []
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
