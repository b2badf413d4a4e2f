"""Play the source of a post-copy migration over one connection.

    server = PageServer(source, blocks, options, report)
    server.begin(connection)               # or: server.resume(connection), after a broken one
    outcome = server.serve()

What the guest asks for goes first, then the recorded working set, then everything else. The end is sent
when every page with data was: QEMU takes pages that are missing then for zeros.

The core sends and answers (:mod:`pyqmigrate.io.page_sending`). Here is what it cannot do alone: choose and
read what is pushed, read pages of sources that are not a plain file, and go on where a page cannot be read.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import QemuGone, UsageError
from pyqmigrate.format.postcopy.records import PART_END, PART_HEADER, RecordData
from pyqmigrate.format.postcopy.return_path import Pong, Received, Request, ReturnPath, Shut
from pyqmigrate.format.postcopy.stream import (
    END,
    LOADED_PING,
    PostcopyBlock,
    encode_head,
    encode_package,
)
from pyqmigrate.format.working_set import TouchedRun
from pyqmigrate.io.page_sending import Events, PageSending
from pyqmigrate.page_server.blocks import ServedBlock
from pyqmigrate.page_server.options import Ending, Push, ServerOptions
from pyqmigrate.page_server.push_order import PushOrder
from pyqmigrate.page_server.reading import Read, Reading
from pyqmigrate.page_server.resumption import resume_stream
from pyqmigrate.page_server.sources import PageSource
from pyqmigrate.page_server.touched import TouchedPages
from pyqmigrate.page_server.withheld import Withheld

__all__ = ["Ending", "PageServer", "Push", "ServerOptions"]

_PROGRESS = 1.0  # seconds
_RETRY_END = 1_000_000  # nanoseconds until the end is sent again, if the socket was full
_NEVER = 1 << 62  # nanoseconds


class PageServer:
    """Serves the pages of a source, which is borrowed, to one destination.

    ``report`` is called with an event, a dictionary with the key ``event``: ``loaded``, ``progress``,
    ``damage``, ``shut``. ``control`` is a descriptor, or None; when it is readable, ``on_control`` is
    called, and returns whether to stop. ``may_end`` is asked, when all is sent, whether the end may be sent, and
    again after ``on_control``. ``end_sent``: if the connection breaks now, the destination may have everything; its
    status is ``completed`` then.
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
        self._touched = TouchedPages()
        self._named: set[tuple[int, int]] = set()
        self.control: int | None = None
        self.on_control: Callable[[], bool] = lambda: False
        self.may_end: Callable[[], bool] = lambda: True
        self.loaded = False
        self._stack = contextlib.ExitStack()
        self._connection: socket.socket | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self._let_go)
            self._served: list[ServedBlock] = []
            for number, block in enumerate(self._blocks):
                self._served.append(ServedBlock(number, block, source.data(number)))
                stack.callback(self._served[-1].close)
            blocks = [block.for_sending(source.place(block.number)) for block in self._served]
            self._sending = PageSending(blocks, PART_HEADER, PART_END)
            stack.callback(self._sending.close)
            self._reading = Reading(source)
            stack.callback(self._reading.close)
            self._reset()
            self._stack = stack.pop_all()

    def _reset(self) -> None:
        """Forget the connection."""
        self._answers = ReturnPath({block.spec.name: block for block in self._blocks})
        self._asked: set[tuple[int, int]] = set()
        self._ready: collections.deque[tuple[Read, RecordData]] = collections.deque()
        self._replied: collections.deque[tuple[Read, RecordData | None]] = collections.deque()
        self._order = PushOrder(self._served, self._options.working_set, self._source.window)
        self._withheld = Withheld(self._named)
        self._end = END
        self.end_sent = False
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
        self._sending.connect(connection)

    def resume(self, connection: socket.socket, *, timeout: float = 60.0) -> None:
        """Go on over a connection that replaces a broken one; it is taken over.

        The destination says which pages it has, whatever this process knows. Raises QemuGone,
        QemuError.
        """
        self._take_over(connection)
        requests: list[Request] = []
        with self._gone("it did not resume"):
            connection.settimeout(timeout)
            for message in resume_stream(connection, self._answers, list(self._numbers)):
                if isinstance(message, Received):
                    self._served[self._numbers[message.block]].mark_received(message.bits)
                else:
                    requests.append(message)
        self._sending.connect(connection)
        for request in requests:
            self._take_message(request)
        self.loaded = True
        self._event("loaded", resumed=True)

    def _take_over(self, connection: socket.socket) -> None:
        self._let_go()
        self._reading.forget()
        self._reset()
        self._connection = connection

    @contextlib.contextmanager
    def _gone(self, what: str) -> Iterator[None]:
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
                try:
                    self._step(connection)
                except ConnectionError:
                    self._ending = Ending.BROKEN
        finally:
            self._let_go()
        return self._ending

    def _step(self, connection: socket.socket) -> None:
        sending = self._sending
        for read in self._withheld.due():
            self._reading.start(read)
        for read, result in self._reading.ended():
            self._finish(read, result)
        self._answer_next()
        done = self._send_end(connection)
        quiet = _NEVER if self._options.push is Push.NEVER else self._options.quiet
        events = sending.serve(
            push=self._may_push(),
            quiet=quiet,
            timeout=self._timeout() if done else _RETRY_END,
            slow=self._reading.fd,
            control=-1 if self.control is None else self.control,
            raw=self._answers.incomplete,
            every=self._options.record or self.end_sent,
            waits=bool(self._replied),
        )
        if events & Events.REQUEST:
            requested = sending.requested
            self._request(requested.block, requested.first, requested.npages, requested.since)
        if events & Events.MESSAGE:
            if (number := sending.last_asked) is not None:  # perhaps the core has answered it
                self._answers.last_block = self._blocks[number].spec.name
            for message in self._answers.feed(sending.received()):
                self._take_message(message)
        if events & Events.CONTROL and self.on_control():
            self._ending = self._ending or Ending.STOPPED
        if events & Events.DUE:
            self._push()
        if events & Events.TIMEOUT:
            self._progress()

    def _timeout(self) -> int | None:
        """Return how long to wait, in nanoseconds."""
        if self._reading.has_results:
            return 0
        until = [self._progress_at] if self.loaded else []
        if (retry_at := self._withheld.retry_at) is not None:
            until.append(retry_at)
        if not until:
            return None
        return max(0, int((min(until) - time.monotonic()) * 1e9))

    def _progress(self) -> None:
        now = time.monotonic()
        if self.loaded and now >= self._progress_at:
            self._progress_at = now + _PROGRESS
            self._event("progress")

    def _send_end(self, connection: socket.socket) -> bool:
        """Send the end if every page with data was sent; return whether nothing of it is left to send."""
        sending = self._sending
        if not self.loaded or not self._end:
            return True
        if not self.end_sent and (sending.left or self._replied or not sending.idle):
            return True
        if not self.end_sent and not self.may_end():
            return True
        self.end_sent = True
        with contextlib.suppress(BlockingIOError):
            self._end = self._end[connection.send(self._end) :]
        return not self._end

    # What nobody has asked for.

    def _may_push(self) -> bool:
        if not self.loaded or self.end_sent or self._sending.pushing:
            return False
        return bool(self._ready) or self._may_read_ahead()

    def _may_read_ahead(self) -> bool:
        reading = self._reading
        return (
            reading.ahead < reading.window
            and len(self._ready) <= reading.window
            and not self._order.ended
            and not self._withheld.full
        )

    def _push(self) -> None:
        """Send what is read, and read more."""
        reading = self._reading
        if not self._ready or reading.fd >= 0:
            while self._may_read_ahead() and (read := self._order.next()) is not None:
                reading.start(read)
                if reading.fd < 0:
                    break
        if reading.fd < 0:
            for read, result in reading.ended():
                self._finish(read, result)
        if self._ready and not self._sending.pushing:
            read, pages = self._ready.popleft()
            self._sending.send(read.block, read.first, read.end - read.first, pages)

    # What the guest waits for.

    def _request(self, number: int, first: int, npages: int, since: int) -> None:
        """Start to answer a request, unless the end was sent: what is missing then is zero."""
        if self.end_sent:
            return
        block = self._served[number]
        for page in range(first, first + npages, block.together):
            if block.sent[page] or (number, page) in self._asked:
                continue
            if self._options.record:
                self._touched.add(number, page, block.together)
            read = Read(number, page, page + block.together, demand=True, since=since)
            if block.pending.count_between(page, page + block.together):
                self._asked.add((number, page))
                self._reading.start(read)
            else:
                self._replied.append((read, None))  # zeros

    def _answer_next(self) -> None:
        if self._replied and not self._sending.answering:
            read, pages = self._replied.popleft()
            npages = read.end - read.first
            self._sending.send(read.block, read.first, npages, pages, read.since)

    def _take_message(self, message: object) -> None:
        if isinstance(message, Request):
            number = self._numbers[message.block]
            self._sending.asked(number)
            self._request(number, message.first, message.npages, time.monotonic_ns())
        elif isinstance(message, Pong) and message.value == LOADED_PING:
            self.loaded = True
            self._event("loaded", resumed=False)
        elif isinstance(message, Shut):
            done = message.status == 0 and self.end_sent
            self._event("shut", status=message.status, complete=done)
            self._ending = Ending.DONE if done else Ending.BROKEN

    # Reads.

    def _finish(self, read: Read, result: RecordData | Exception) -> None:
        """Take the result of a read."""
        if read.demand:
            self._asked.discard((read.block, read.first))
        if not isinstance(result, Exception):
            self._withheld.drop(read)
            if read.demand:
                self._replied.append((read, result))
            else:
                self._ready.append((read, result))
            return
        block = self._served[read.block]
        if not read.demand and read.end - read.first > block.together:
            # One of them is bad: the others have to go.
            for first in range(read.first, read.end, block.together):
                end = first + block.together
                if block.pending.count_between(first, end):
                    self._reading.start(Read(read.block, first, end, demand=False))
            return
        self._withhold(read, result)

    def _withhold(self, read: Read, error: Exception) -> None:
        """Keep a page back that cannot be read: the guest waits at it, until a later try succeeds."""
        if self._withheld.add(read):
            block = self._served[read.block]
            self._event(
                "damage",
                block=block.name,
                page=read.first,
                pages=read.end - read.first,
                demand=read.demand,
                error=f"block {block.name!r}, {_shown(read)}: {error}",
            )

    # For the caller.

    def status(self) -> dict[str, Any]:
        """Return how far it is: pages left, requests, their latency in seconds."""
        return {
            "data_pages": sum(block.data_pages for block in self._served),
            "pages_left": self._sending.left,
            "pages_withheld": len(self._withheld),
            **self._sending.to_json(),
        }

    def touched(self) -> Iterable[TouchedRun]:
        """Return the pages that the guest has asked for, in order, with ``record``."""
        return self._touched.runs()

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
        self._stack.close()


def _shown(read: Read) -> str:
    if read.end - read.first == 1:
        return f"page {read.first}"
    return f"pages {read.first} to {read.end - 1}"
