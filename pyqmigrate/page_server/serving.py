"""Serve a snapshot until the destination has everything: open it, go on after broken connections, record.

serve(ServeRequest("/snap/guest.mapped"), connection, report)
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqmigrate.errors import QemuGone, SnapshotError, UsageError
from pyqmigrate.format.working_set import TouchedRun, WorkingSet
from pyqmigrate.io.own_files import check_replaceable
from pyqmigrate.io.working_set_file import (
    IN_STORE,
    WORKING_SET_FILE,
    current,
    decode_working_set,
    encode_working_set,
    read_current_working_set,
    write_working_set,
)
from pyqmigrate.page_server.control import Control
from pyqmigrate.page_server.options import Ending, Push, ServerOptions
from pyqmigrate.page_server.server import PageServer
from pyqmigrate.page_server.sources import PageSource, open_source

__all__ = ["ServeRequest", "serve"]

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ServeRequest:
    """What to serve, and how.

    host_pages: page size in bytes of the destination's memory by block, for blocks in hugetlbfs.
    resume: the first connection replaces a broken one.
    working_set: a file with the pages to push first; record: where to write the pages that were asked for.
        IN_STORE is what the store of the snapshot keeps.
    sealed: whether the snapshot is compared with its seal.
    wait: whether the parent has to say ``begin`` first, with the ``host_pages``.
    expect: the digest of the state that the snapshot has to have (``GuestState.digest``), or None. An
        event ``opened`` reports it, with the key ``state``.
    confirm_end: whether the parent decides when the end is sent: an event ``sent`` reports that only that is
        missing, and the command ``end`` has it sent.
    base, offset, cache: as for :func:`~pyqmigrate.page_server.sources.open_source`.
    """

    snapshot: str
    host_pages: dict[str, int] = field(default_factory=dict)
    resume: bool = False
    push: Push = Push.IDLE
    working_set: str | None = None
    record: str | None = None
    sealed: bool = True
    wait: bool = False
    base: str | None = None
    offset: int | None = None
    cache: str | None = None
    expect: str | None = None
    confirm_end: bool = False


def serve(
    request: ServeRequest,
    connection: socket.socket | Callable[[], socket.socket],
    report: Report,
    control: Control | None = None,
) -> Ending:
    """Serve until the destination has everything; return how it ended.

    connection: taken over; a function that makes it is called when the snapshot is open. After a broken
        one, ``control`` may bring another. An event ``broken`` is reported first, with ``recoverable``, and with
        ``end_sent`` if the destination may have everything.

    Raises the errors of :func:`~pyqmigrate.page_server.sources.open_source`, UsageError for a working set
    of another snapshot, QemuGone if the destination closes the connection before it can be replaced.
    """
    with contextlib.ExitStack() as stack:
        if not callable(connection):
            stack.enter_context(connection)
        recording = request.record is not None
        place = None
        if request.record not in (None, IN_STORE):
            place = Path(os.path.abspath(request.record))
        if place is not None:
            check_replaceable(place, WORKING_SET_FILE)
        source = stack.enter_context(
            open_source(
                request.snapshot,
                sealed=request.sealed,
                base=request.base,
                offset=request.offset,
                cache=request.cache,
            )
        )
        state = source.state.digest()
        if request.expect not in (None, state):
            raise SnapshotError(
                f"{source.name!r} is not a copy of the snapshot that the guest was restored from"
            )
        report({"event": "opened", "state": state})
        working_set = _working_set(source, request.working_set)
        if working_set:
            source.prefetch(working_set)  # while the destination starts
        options = ServerOptions(Push(request.push), working_set, recording)
        host_pages = request.host_pages
        if request.wait and control is not None:
            host_pages = _await_begin(control)
        server = PageServer(source, host_pages, options, report)
        stack.callback(server.close)
        started = time.monotonic()
        accepted = connection() if callable(connection) else connection
        service = _Service(server, report, control, confirm_end=request.confirm_end)
        ending = service.run(accepted, resume=request.resume)
        if recording:
            _record(source, server, place, time.monotonic() - started)
        return ending


def _await_begin(control: Control) -> dict[str, int]:
    """Wait for the command ``begin``; return the page sizes that it names. Raises QemuGone."""
    while not control.gone:
        for command, _ in control.receive():
            if command.get("command") == "begin":
                return {str(name): int(size) for name, size in command["host_pages"].items()}
    raise QemuGone("the parent has ended before the destination was there")


class _Service:
    """The connections of one server, one after another."""

    def __init__(
        self, server: PageServer, report: Report, control: Control | None, *, confirm_end: bool
    ) -> None:
        self._server = server
        self._report = report
        self._control = control
        self._next: socket.socket | None = None
        self._confirm_end = confirm_end and control is not None
        self._asked = self._confirmed = False
        server.on_control = self._on_control
        server.may_end = self._may_end

    def run(self, connection: socket.socket, *, resume: bool) -> Ending:
        server = self._server
        while True:
            self._listen()
            self._asked = self._confirmed = False
            try:
                if resume:
                    server.resume(connection)
                else:
                    server.begin(connection)
                ending = server.serve()
            except QemuGone:
                if not server.loaded:
                    raise
                ending = Ending.BROKEN
            if ending is not Ending.BROKEN and self._next is None:
                return ending
            if self._next is None:
                self._report(
                    {
                        "event": "broken",
                        "recoverable": server.loaded,
                        "end_sent": server.end_sent,
                        **server.status(),
                    }
                )
                if not server.loaded:
                    raise QemuGone(
                        "the destination closed the connection before it had loaded the device state"
                    )
                if not self._await_connection():
                    return ending
            assert self._next is not None
            connection, self._next, resume = self._next, None, True

    def _may_end(self) -> bool:
        """Return whether the end may be sent; ask the parent, once. One that has gone decides nothing."""
        if self._confirmed or not self._confirm_end:
            return True
        assert self._control is not None
        if self._control.gone:
            return True
        if not self._asked:
            self._asked = True
            self._report({"event": "sent", **self._server.status()})
        return False

    def _listen(self) -> None:
        self._server.control = None if self._control is None else self._control.fd

    def _await_connection(self) -> bool:
        """Wait for another connection; return False if none comes."""
        while self._next is None:
            if self._control is None or self._control.gone:
                return False
            if self._on_control() and self._next is None:
                return False
        return True

    def _on_control(self) -> bool:
        """Carry out what the parent says; return whether to let go of the connection."""
        assert self._control is not None
        stop = False
        for command, connection in self._control.receive():
            name = command.get("command")
            if name == "resume" and connection is not None:
                if self._next is not None:
                    self._next.close()
                self._next, stop = connection, True
            elif name == "push":
                with contextlib.suppress(UsageError):
                    self._server.set_push(str(command.get("policy")))
            elif name == "end":
                self._confirmed = self._asked
            elif name == "status":
                self._report({"event": "progress", **self._server.status()})
            elif name == "stop":
                stop = True
        self._listen()
        return stop


def _working_set(source: PageSource, path: str | None) -> list[TouchedRun]:
    if path is None:
        return []
    shown = "of the store" if path == IN_STORE else repr(path)
    try:
        if path == IN_STORE:
            recorded = current(decode_working_set(source.working_set()), source.identity)
        else:
            recorded = read_current_working_set(path, source.identity)
    except UsageError as error:
        raise UsageError(f"the working set {shown} cannot be used: {error}") from error
    if recorded.blocks != source.state.blocks:
        raise UsageError(f"the working set {shown} is of other RAM blocks")
    return list(recorded.working_set)


def _record(source: PageSource, server: PageServer, place: Path | None, seconds: float) -> None:
    """Write the recorded working set to ``place``; None is the store of the snapshot."""
    arguments = (source.identity, source.state.blocks, WorkingSet(server.touched()))
    if place is None:
        source.write_working_set(encode_working_set(*arguments, seconds))
    else:
        write_working_set(place, *arguments, seconds=seconds)
