"""Play the source of a post-copy migration over one connection.

    server = PageServer(source, blocks, options, report)
    server.begin(connection)               # or: server.resume(connection), after a broken one
    outcome = server.serve()

What the guest asks for goes first, then the recorded working set, then everything else. The end is sent
when every page with data was: QEMU takes pages that are missing then for zeros.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import QemuError, QemuGone, UsageError
from pyqmigrate.format.postcopy.records import PartEncoder, RecordData
from pyqmigrate.format.postcopy.return_path import (
    Pong,
    Received,
    Request,
    Resumed,
    ReturnPath,
    Shut,
)
from pyqmigrate.format.postcopy.stream import (
    END,
    LOADED_PING,
    RESUME,
    PostcopyBlock,
    ask_received,
    encode_head,
    encode_package,
)
from pyqmigrate.format.working_set import TouchedRun
from pyqmigrate.page_server.blocks import ServedBlock
from pyqmigrate.page_server.faults import Faults
from pyqmigrate.page_server.reading import Read, Reading
from pyqmigrate.page_server.sources import PageSource

__all__ = ["Ending", "PageServer", "Push", "ServerOptions"]

QUIET = 200e-6  # seconds without a request before anything is pushed
_PIECE = 16  # pages of a PART
_WINDOW = 64  # pages that are read together
_RECEIVE = 1 << 16
_VECTORS = 1000  # of one sendmsg; the kernel takes 1024
_RETRY = 5.0  # seconds until pages that could not be read are tried again
_RETRY_MAX = 60.0
_WITHHELD_MAX = 1 << 16  # pages; then nothing is pushed until some of them can be read
_PROGRESS = 1.0  # seconds
_HOLD = 1.0  # seconds without a request before anything is pushed while a working set is recorded


class Push(enum.StrEnum):
    """When pages are sent that nobody has asked for: if no request came for 200 us, always, never."""

    IDLE = "idle"
    ALWAYS = "always"
    NEVER = "never"


class Ending(enum.Enum):
    """How a connection ended.

    ``DONE``: the destination has everything. ``BROKEN``: it can be replaced, if the package had been
    loaded. ``STOPPED``: on request.
    """

    DONE = "done"
    BROKEN = "broken"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ServerOptions:
    """``working_set`` is pushed first, in its order. ``record``: while the guest asks for pages, nothing
    is pushed, so that the order of its requests is that of its touches."""

    push: Push = Push.IDLE
    working_set: Sequence[TouchedRun] = ()
    record: bool = False

    def __post_init__(self) -> None:
        parse_enum(Push, self.push, "push")


class PageServer:
    """Serves the pages of a source, which is borrowed, to one destination.

    ``report`` is called with an event, a dictionary with the key ``event``: ``loaded``, ``progress``,
    ``damage``, ``shut``. ``control`` is a descriptor, or None; when it is readable, ``on_control`` is
    called, and returns whether to stop. ``may_end`` is asked, when all is sent, whether the end may be sent, and
    again after ``on_control``. ``end_sent``: if the connection breaks now, the destination may
    have everything; its status is ``completed`` then.
    """

    def __init__(
        self,
        source: PageSource,
        host_pages: Mapping[str, int],
        options: ServerOptions,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        unknown = set(host_pages) - {spec.name for spec in source.state.blocks}
        if unknown:
            raise UsageError(f"the snapshot has no block {min(unknown)!r}")
        self._source = source
        self._blocks = [
            PostcopyBlock(spec, host_pages.get(spec.name, max(4096, spec.page_size)))
            for spec in source.state.blocks
        ]
        self._numbers = {spec.name: k for k, spec in enumerate(source.state.blocks)}
        self._options = options
        self._report = report
        self._served: list[ServedBlock] = []
        self._faults = Faults(options.record)
        self._connection: socket.socket | None = None
        self.control: int | None = None
        self.on_control: Callable[[], bool] = lambda: False
        self.may_end: Callable[[], bool] = lambda: True
        self.loaded = False
        self._reading = Reading(source)
        self._reset()
        try:
            for number, block in enumerate(self._blocks):
                self._served.append(ServedBlock(number, block, source.data(number)))
        except BaseException:
            self.close()
            raise

    def _reset(self) -> None:
        """Forget the connection."""
        self._encoder = PartEncoder()
        self._answers = ReturnPath({block.spec.name: block for block in self._blocks})
        self._out: list[RecordData] = []
        self._asked: set[tuple[int, int]] = set()
        self._ready: collections.deque[tuple[Read, memoryview]] = collections.deque()
        self._replied: collections.deque[tuple[Read, memoryview]] = collections.deque()
        self._answering: list[float] = []
        self._first = collections.deque(self._options.working_set)
        self._cursor = (0, 0)
        self.end_sent = False
        self._last_request = 0.0
        self._withheld: dict[tuple[int, int], Read] = {}
        self._named: set[tuple[int, int]] = getattr(self, "_named", set())
        self._retry_at, self._retry_after = 0.0, _RETRY
        self._progress_at = 0.0
        self._ending: Ending | None = None

    # The start of a connection, blocking.

    def begin(self, connection: socket.socket) -> None:
        """Send everything up to the pages over a new connection, which is taken over.

        Raises QemuGone if the destination closes it, UsageError for state that is too long.
        """
        state = self._source.state
        head = encode_head(state.settings, self._blocks, state.early)
        package = encode_package(state.devices)
        self._take_over(connection)
        with self._gone("it refused the start of the stream"):
            connection.setblocking(True)
            connection.sendall(head + package)

    def resume(self, connection: socket.socket, *, timeout: float = 60.0) -> None:
        """Go on over a connection that replaces a broken one; it is taken over.

        The destination says which pages it has, whatever this process knows. Raises QemuGone,
        QemuError.
        """
        self._take_over(connection)
        missing = set(self._numbers)
        resumed = False
        with self._gone("it did not resume"):
            connection.settimeout(timeout)
            for name in self._numbers:
                connection.sendall(ask_received(name))
            while not resumed:
                data = connection.recv(_RECEIVE)
                if not data:
                    raise ConnectionResetError
                for message in self._answers.feed(data):
                    if isinstance(message, Received):
                        self._served[self._numbers[message.block]].mark_received(message.bits)
                        missing.discard(message.block)
                        if not missing:
                            connection.sendall(RESUME)
                    elif isinstance(message, Resumed):
                        if missing or message.value != 1:
                            raise QemuError(f"the destination does not resume: {message.value}")
                        resumed = True
                    elif isinstance(message, Request):
                        self._request(message)
        self.loaded = True
        self._event("loaded", resumed=True)

    def _take_over(self, connection: socket.socket) -> None:
        self._let_go()
        self._reading.forget()
        self._reset()
        self._connection = connection

    @contextlib.contextmanager
    def _gone(self, what: str) -> Any:
        try:
            yield
        except (ConnectionError, TimeoutError) as error:
            self._let_go()
            raise QemuGone(f"the destination closed the connection: {what}") from error
        except BaseException:
            self._let_go()
            raise

    # Serving.

    def serve(self) -> Ending:
        """Serve until the connection ends. Raises QemuError for messages that cannot be."""
        connection = self._connection
        assert connection is not None
        connection.setblocking(False)
        self._ending = None
        try:
            while self._ending is None:
                self._step(connection)
        finally:
            self._let_go()
        return self._ending

    def _step(self, connection: socket.socket) -> None:
        for read, result in self._reading.ended():
            self._finish(read, result)
        now = time.monotonic()
        if not self._out:
            self._choose(now)
        readable: list[socket.socket | int] = [connection]
        if self._reading.fd >= 0:
            readable.append(self._reading.fd)
        if self.control is not None:
            readable.append(self.control)
        writable = [connection] if self._out else []
        timeout = self._timeout(now)
        ready, can_write, _ = select.select(readable, writable, [], timeout)
        if self.control in ready and self.on_control():
            self._ending = Ending.STOPPED
            return
        if connection in ready:
            self._receive(connection)
        if can_write and self._out:
            self._send(connection)
        if now >= self._progress_at and self.loaded:
            self._progress_at = now + _PROGRESS
            self._event("progress")

    def _timeout(self, now: float) -> float | None:
        """Return how long to wait for the connection."""
        if self._out:
            return None
        if self._reading.has_results:
            return 0.0
        waits = [max(0.0, self._progress_at - now)] if self.loaded else []
        if self._withheld:
            waits.append(max(0.0, self._retry_at - now))
        if self._may_push_later():
            waits.append(max(0.0, self._quiet_until() - now))
        return min(waits, default=None)

    def _quiet_until(self) -> float:
        """Return when pages may be pushed, in seconds of the monotonic clock."""
        if self._options.push is Push.ALWAYS:
            return 0.0
        return self._last_request + (_HOLD if self._options.record else QUIET)

    def _may_push_later(self) -> bool:
        if not self.loaded or self._options.push is Push.NEVER:
            return False
        if len(self._withheld) >= _WITHHELD_MAX and not self._ready:
            return False
        return bool(self._ready) or (
            self._reading.ahead < self._reading.window and self._has_windows()
        )

    def _choose(self, now: float) -> None:
        """Put what goes out next into ``_out``."""
        while self._replied and not self._out:
            read, pages = self._replied.popleft()
            self._put(read, pages, zeros=True)
            if self._out:
                self._answering.append(read.since)
        if self._out or not self.loaded:
            return
        if self._withheld and now >= self._retry_at:
            self._retry()
        if self._left() == 0:
            if not self.end_sent and self.may_end():
                self._out.append(END)
                self.end_sent = True
            return
        if self._options.push is Push.NEVER or now < self._quiet_until():
            return
        self._read_ahead()
        while self._ready and not self._out:
            read, pages = self._ready.popleft()
            block = self._served[read.block]
            stop = min(read.first + max(_PIECE, block.together), read.end)
            if stop < read.end:
                rest = Read(read.block, stop, read.end, demand=False)
                self._ready.appendleft((rest, pages[(stop - read.first) * block.page_size :]))
            self._put(Read(read.block, read.first, stop, demand=False), pages, zeros=False)

    def _put(self, read: Read, pages: memoryview, *, zeros: bool) -> None:
        """Mark pages of a read as sent, and encode them."""
        block = self._served[read.block]
        size = block.page_size
        runs = block.take(read.first, read.end, zeros=zeros)
        if not runs:
            return
        self._out = self._encoder.encode(
            block.name,
            size,
            [
                (
                    first,
                    end,
                    pages[(first - read.first) * size : (end - read.first) * size]
                    if has_data
                    else None,
                )
                for first, end, has_data in runs
            ],
        )
        self._faults.sent += sum(end - first for first, end, _ in runs)

    def _left(self) -> int:
        return sum(block.left for block in self._served)

    # Reads.

    def _read_ahead(self) -> None:
        """Start reads of pages that nobody has asked for; those that end at once are ready."""
        reading = self._reading
        if len(self._ready) > reading.window or len(self._withheld) >= _WITHHELD_MAX:
            return
        while reading.ahead < reading.window and (read := self._next_window()) is not None:
            reading.start(read)
            if reading.fd < 0:
                break
        if reading.fd < 0:
            for read, result in reading.ended():
                self._finish(read, result)

    def _has_windows(self) -> bool:
        return bool(self._first) or self._cursor[0] < len(self._served)

    def _next_window(self) -> Read | None:
        while self._first:
            number, first, npages = self._first.popleft()
            block = self._served[number]
            found = block.next_window(first - first % block.together, _WINDOW)
            if found is None or found[0] >= first + npages:
                continue
            start, end = found
            if block.together == 1:
                end = min(end, first + npages)
            if end < first + npages:
                self._first.appendleft(TouchedRun(number, end, first + npages - end))
            return Read(number, start, end, demand=False)
        number, start = self._cursor
        while number < len(self._served):
            found = self._served[number].next_window(start, _WINDOW)
            if found is not None:
                self._cursor = (number, found[1])
                return Read(number, *found, demand=False)
            number, start = number + 1, 0
            self._cursor = (number, 0)
        return None

    def _finish(self, read: Read, result: RecordData | Exception) -> None:
        """Take the result of a read."""
        if read.demand:
            self._asked.discard((read.block, read.first))
        if not isinstance(result, Exception):
            self._withheld.pop((read.block, read.first), None)
            (self._replied if read.demand else self._ready).append((read, memoryview(result)))
            return
        block = self._served[read.block]
        if not read.demand and read.end - read.first > block.together:
            # One of them is bad: the others have to go.
            for first in range(read.first, read.end, block.together):
                if block.pending.count_between(first, first + block.together):
                    self._reading.start(
                        Read(read.block, first, first + block.together, demand=False)
                    )
            if self._reading.fd < 0:
                for single, single_result in self._reading.ended():
                    self._finish(single, single_result)
            return
        self._withhold(read, result)

    def _withhold(self, read: Read, error: Exception) -> None:
        """Keep a page back that cannot be read: the guest waits at it, until a later try succeeds."""
        known = self._withheld.get((read.block, read.first))
        if known is None or (read.demand and not known.demand):
            self._withheld[read.block, read.first] = read
        if len(self._withheld) == 1:
            self._retry_at = time.monotonic() + self._retry_after
        if (read.block, read.first) in self._named:
            return
        self._named.add((read.block, read.first))
        block = self._served[read.block]
        self._event(
            "damage",
            block=block.name,
            page=read.first,
            pages=read.end - read.first,
            demand=read.demand,
            error=f"block {block.name!r}, {_shown(read)}: {error}",
        )

    def _retry(self) -> None:
        """Read what could not be read once more."""
        self._retry_after = min(self._retry_after * 2, _RETRY_MAX)
        self._retry_at = time.monotonic() + self._retry_after
        for read in list(self._withheld.values()):
            self._reading.start(read)

    # The connection.

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_RECEIVE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._ending = self._ending or Ending.BROKEN
            return
        for message in self._answers.feed(data):
            if isinstance(message, Request):
                self._request(message)
            elif isinstance(message, Pong) and message.value == LOADED_PING:
                self.loaded = True
                self._event("loaded", resumed=False)
            elif isinstance(message, Shut):
                done = message.status == 0 and self.end_sent
                self._event("shut", status=message.status, complete=done)
                self._ending = Ending.DONE if done else Ending.BROKEN

    def _request(self, request: Request) -> None:
        """Start to answer a request."""
        now = self._last_request = time.monotonic()
        number = self._numbers[request.block]
        block = self._served[number]
        self._faults.requests += 1
        for first in range(request.first, request.first + request.npages, block.together):
            if block.sent[first] or (number, first) in self._asked:
                continue
            self._faults.touch(number, first, block.together)
            read = Read(number, first, first + block.together, demand=True, since=now)
            if block.pending.count_between(first, first + block.together):
                self._asked.add((number, first))
                self._reading.start(read)
            else:
                self._replied.append((read, memoryview(b"")))  # zeros

    def _send(self, connection: socket.socket) -> None:
        try:
            sent = connection.sendmsg(self._out[:_VECTORS])
        except BlockingIOError:
            return
        except ConnectionError:
            self._ending = self._ending or Ending.BROKEN
            return
        if sent == sum(map(len, self._out)):
            self._out = []
        else:
            self._drop_sent(sent)
        if not self._out and self._answering:
            now = time.monotonic()
            for since in self._answering:
                self._faults.answered(now - since)
            self._answering.clear()

    def _drop_sent(self, sent: int) -> None:
        """Keep what follows the first ``sent`` bytes."""
        done = 0
        for piece in self._out:
            if sent < len(piece):
                break
            sent -= len(piece)
            done += 1
        del self._out[:done]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]

    def status(self) -> dict[str, Any]:
        """Return how far it is: pages left, requests, their latency in seconds."""
        return {
            "data_pages": sum(block.data_pages for block in self._served),
            "pages_left": self._left(),
            "pages_withheld": len(self._withheld),
            **self._faults.to_json(),
        }

    def touched(self) -> Iterable[TouchedRun]:
        """Return the pages that the guest has asked for, in order, with ``record``."""
        return self._faults.touched()

    def set_push(self, push: Push | str) -> None:
        """Change when pages are pushed."""
        self._options = ServerOptions(
            parse_enum(Push, push, "push"), self._options.working_set, self._options.record
        )

    def _event(self, name: str, **more: Any) -> None:
        self._report({"event": name, **more, **self.status()})

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the connection and free memory. Idempotent."""
        self._let_go()
        self._reading.close()
        for block in self._served:
            block.close()
        self._served = []


def _shown(read: Read) -> str:
    if read.end - read.first == 1:
        return f"page {read.first}"
    return f"pages {read.first} to {read.end - 1}"
