"""The destination of a post-copy migration in Python: strict, quick, and as hostile as a test wants."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field

__all__ = ["Destination", "Memory"]

PAGE = 4096
END_MARK = 0x0123456789ABCDEF


@dataclass
class Memory:
    """What arrived: it survives its connections. ``order`` has block and page as they came."""

    host_pages: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, bytearray] = field(default_factory=dict)
    arrived: dict[str, set[int]] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    package: bytes = b""
    ram_id: int = -1
    advised: tuple[int, int] = (0, 0)
    discards: int = 0
    ended: bool = False

    def bits(self, name: str) -> bytes:
        npages = len(self.blocks[name]) // PAGE
        found = bytearray(-(-npages // 64) * 8)
        for page in self.arrived[name]:
            found[page // 8] |= 1 << page % 8
        return bytes(found)


class Destination:
    """One connection, read by a thread; ``error`` is why it ended, if not by the end of the stream.

    ``limit``: the connection is cut after so many bytes that follow the package.
    """

    def __init__(self, connection: socket.socket, memory: Memory, limit: int | None = None) -> None:
        self.memory = memory
        self.error: BaseException | None = None
        self.loaded = threading.Event()
        self._connection = connection
        self._left = limit
        self._last: str | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Destination:
        self._thread.start()
        return self

    def join(self, limit: float = 30) -> None:
        self._thread.join(limit)
        assert not self._thread.is_alive(), "the destination waits for ever"

    def request(self, name: str, page: int, npages: int = 1) -> None:
        body = struct.pack(">QI", page * PAGE, npages * PAGE) + _text(name)
        self.answer(3, body)

    def answer(self, kind: int, body: bytes, more: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(struct.pack(">HH", kind, len(body)) + body + more)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            with self._connection:
                self._read()
        except BaseException as error:
            self.error = error
        finally:
            self.loaded.set()

    def _read(self) -> None:
        if not self.memory.blocks:
            assert self._take(9) == b"QEVM\0\0\0\3\7"
            self._take(self._u32())
            self._kind = self._take(1)[0]
            while self._kind == 5:
                self._subsection()
        else:
            self._kind = self._take(1)[0]
        while True:
            if self._kind == 8:
                self._command()
            elif self._kind in (1, 2, 3):
                if self._section(self._kind):
                    return
            else:
                raise AssertionError(f"element {self._kind}")
            self._kind = self._take(1)[0]

    def _subsection(self) -> None:
        name = self._name()
        assert self._u32() == 1
        assert name in ("configuration/target-page-bits", "configuration/uuid"), name
        self._take(16 if name.endswith("uuid") else 4)
        self._kind = self._take(1)[0]

    def _command(self) -> None:
        number, length = struct.unpack(">HH", self._take(4))
        body = self._take(length)
        if number == 2:
            self.answer(2, body)
        elif number == 3:
            self.memory.advised = struct.unpack(">QQ", body)
        elif number == 6:
            self.memory.discards += 1
        elif number == 7:
            assert self.memory.discards, "RUN would be refused"
            self.memory.package = self._take(struct.unpack(">I", body)[0])
            self.answer(2, struct.pack(">I", 3))
            self.loaded.set()
        elif number == 10:
            name = body[1:].decode()
            bits = self.memory.bits(name)
            self.answer(5, body, struct.pack(">Q", len(bits)) + bits + struct.pack(">Q", END_MARK))
        elif number == 9:
            self.answer(6, struct.pack(">I", 1))
            self.loaded.set()
        else:
            assert number == 1, f"command {number}"

    def _section(self, kind: int) -> bool:
        number = self._u32()
        if kind == 1:
            assert self._name() == "ram"
            assert self._take(8) == struct.pack(">II", 0, 4)
            self.memory.ram_id = number
            total = self._u64() & ~0xFFF
            while total:
                name = self._name()
                length = self._u64()
                if name in self.memory.host_pages:
                    assert self._u64() == self.memory.host_pages[name]
                self.memory.blocks[name] = bytearray(length)
                self.memory.arrived[name] = set()
                total -= length
        pages = 0
        while (word := self._u64()) != 0x10:
            self._page(word)
            pages += 1
        if kind == 2:
            self.memory.parts.append(pages)
        assert number == self.memory.ram_id
        assert self._take(5) == struct.pack(">BI", 0x7E, number)
        if kind == 3:
            assert self._take(1) == b"\0"
            self.memory.ended = True
            self.answer(1, bytes(4))
            return True
        return False

    def _page(self, word: int) -> None:
        offset, flags = word & ~0xFFF, word & 0xFFF
        if not flags & 0x20:
            self._last = self._name()
        assert self._last is not None
        assert flags & ~0x20 in (2, 8), hex(flags)
        content = self._take(PAGE) if flags & 8 else self._take(1) * PAGE
        page = offset // PAGE
        arrived = self.memory.arrived[self._last]
        assert page not in arrived, f"page {page} of {self._last} came twice"
        arrived.add(page)
        self.memory.order.append((self._last, page))
        self.memory.blocks[self._last][offset : offset + PAGE] = content

    def _name(self) -> str:
        return self._take(self._take(1)[0]).decode()

    def _u32(self) -> int:
        return int(struct.unpack(">I", self._take(4))[0])

    def _u64(self) -> int:
        return int(struct.unpack(">Q", self._take(8))[0])

    def _take(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            wanted = length - len(data)
            if self._left is not None and self.memory.package:
                wanted = min(wanted, self._left)
                if wanted == 0:
                    raise ConnectionAbortedError("cut")
                self._left -= wanted
            piece = self._connection.recv(wanted, socket.MSG_WAITALL)
            if not piece:
                raise ConnectionResetError("the source has gone")
            data += piece
        return bytes(data)


def _text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()
