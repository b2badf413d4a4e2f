"""Keeps the page server of a lazily restored guest going until the guest has all of its memory.

This is a program of its own (:mod:`pyqmigrate.vm.incoming.keeper.boot`), started by
:mod:`pyqmigrate.vm.incoming.lazy_keeper` without ``site``. It outlives the process that restored the guest. Its
standard input is a socket to that process, the *parent*.

The page server (``pyqmigrate.page_server``) is its child, and sends the pages to QEMU over a socket. If
the server dies, the guest's processors stop at the first page that is missing, and a command like ``stop``
blocks QEMU's monitors. So the keeper has a monitor of its own, with out-of-band commands enabled from the start: by
``migrate-recover`` it gives QEMU a new connection, on which a new server asks what has arrived, and goes on.
Until the guest runs, the parent uses that monitor.

It imports the standard library and the modules of this folder only: it must start fast, and stay small.
The lines that it exchanges are JSON objects. From the parent:

===========  ======================================================================
setup        the first line: ``server`` (options of each page server), ``first`` (more
             for the first one), ``snapshot``, ``kept`` (the absolute paths of its files;
             empty for one without a name), ``hold`` (seconds without any push, while a
             working set is recorded, or null) and ``push`` (its policy then). The
             descriptors that come along are the monitor, the socket on which QEMU expects
             the stream, and the kept files
start        once QEMU waits for the stream: ``pid`` of QEMU, ``host_pages`` (page sizes
             of its blocks by name), ``blocks`` (their names), and ``collapse``, a list of [address, length] of
             memory whose pages are to be made huge at the end; empty for none
monitor      once the parent does not use the monitor any more
===========  ======================================================================

To the parent, and to each client of its status socket, goes the state: see
:data:`~pyqmigrate.vm.incoming.keeper.state.State`. The status socket has an abstract name
(:func:`~pyqmigrate.vm.incoming.keeper.state.status_name`); only processes of the same user and root are served.
A client may send ``{"resume": SNAPSHOT}``: the pages come from that copy of the snapshot from then on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from typing import Any

from pyqmigrate.vm.incoming.keeper.clients import Clients
from pyqmigrate.vm.incoming.keeper.lines import Lines
from pyqmigrate.vm.incoming.keeper.loop import Loop, Sources
from pyqmigrate.vm.incoming.keeper.monitor import KeeperMonitor
from pyqmigrate.vm.incoming.keeper.plugged import plugged_in
from pyqmigrate.vm.incoming.keeper.recovery import RETRY, Recoveries
from pyqmigrate.vm.incoming.keeper.server import ServerProcess, ServerProgram
from pyqmigrate.vm.incoming.keeper.state import Progress, State

__all__ = ["Keeper", "ignore_signals"]

_BACKOFF = 0.05  # seconds until a server that did nothing is restarted; doubled
_BACKOFF_MAX = 5.0
_UNPLUGGED = 0.5  # seconds between looks at whether memory is still plugged in
_FINAL_STATUS = 10.0  # seconds from the last page until QEMU has to report completion


class Keeper:
    """The server, the monitor, the parent and the clients of one restore; see the module.

    ``first`` is a server that waits for its order, or None: ``program`` starts one, as later.
    """

    def __init__(
        self, parent: socket.socket, program: ServerProgram, first: ServerProcess | None = None
    ) -> None:
        self._parent = Lines(parent, takes_fds=True)
        self._program = program
        self._server = first
        self._loop = Loop()
        self._progress = Progress(self._publish)
        self._clients = Clients(lambda: self._progress.values, self._resume_from)
        self._recoveries = Recoveries(self._loop, self._progress.note, self._not_recovered)
        self._monitor: KeeperMonitor | None = None
        self._monitor_is_ours = False
        self._setup: dict[str, Any] = {}
        self._kept: list[tuple[str, int]] = []
        self._snapshot = ""
        self._expected: str | None = None  # the state of the snapshot, by a digest
        self._former: str | None = None  # the former snapshot, while another copy is tried
        self._start: dict[str, Any] = {}
        self._backoff = _BACKOFF
        self._qemu_pidfd = -1
        self._all_sent = False

    def run(self) -> None:
        """Work until the restore has ended, in one of the states ENDED."""
        try:
            while not self._progress.ended:
                self._loop.wait(self._sources(), self._still_valid)
        finally:
            self._close()

    def _still_valid(self, fd: int) -> bool:
        return not self._progress.ended and self._server is not None and fd != self._server.pidfd

    def _sources(self) -> Sources:
        found: Sources = {}
        if not self._parent.closed:
            found |= self._parent.source(self._hear_parent)
        if self._monitor is not None and self._monitor_is_ours:
            found |= self._monitor.source(self._hear_monitor)
        found |= self._clients.sources()
        if self._qemu_pidfd >= 0:
            found[self._qemu_pidfd] = (select.POLLIN, self._qemu_gone)
        if self._server is not None:
            server = self._server
            if not server.control.closed:
                found |= server.control.source(self._hear_server)
            found[server.pidfd] = (select.POLLIN, self._server_ended)
        return found

    # --- the parent -----------------------------------------------------------------------------------

    def _hear_parent(self) -> None:
        for line in self._parent.receive():
            if "setup" in line:
                self._set_up(line["setup"])
            elif "start" in line:
                self._begin(line["start"])
            elif "monitor" in line:
                self._take_monitor()
        if self._parent.closed and not self._progress.loaded:
            self._progress.end("failed", "the process that restores the guest has ended")

    def _set_up(self, setup: dict[str, Any]) -> None:
        self._setup, self._snapshot = setup, setup["snapshot"]
        monitor, source, *kept = self._parent.fds
        self._parent.fds = []
        self._kept = list(zip(setup["kept"], kept, strict=True))
        self._monitor = KeeperMonitor(socket.socket(fileno=monitor))
        self._start_server(socket.socket(fileno=source), resume=False)

    def _take_monitor(self) -> None:
        if self._monitor is not None and not self._monitor_is_ours:
            self._monitor_is_ours = True
            self._recoveries.use(self._monitor)

    def _begin(self, start: dict[str, Any]) -> None:
        self._start = start
        if self._server is not None:
            self._server.control.send({"command": "begin", "host_pages": start["host_pages"]})
        with contextlib.suppress(OSError):
            self._qemu_pidfd = os.pidfd_open(start["pid"])
            try:
                self._clients.listen(start["pid"])
            except OSError as error:
                self._progress.note(
                    f"the progress of this restore cannot be asked for: {error.strerror}"
                )
        if self._setup["hold"] is not None:
            self._loop.later(self._setup["hold"], self._push)

    def _push(self) -> None:
        """Let the server send what nobody has asked for."""
        if self._server is not None:
            self._server.control.send({"command": "push", "policy": self._setup["push"]})

    def _publish(self, state: State) -> None:
        for listener in (self._parent, *self._clients.lines()):
            if not listener.closed:
                listener.send(state)

    # --- the server -----------------------------------------------------------------------------------

    def _start_server(self, source: socket.socket, *, resume: bool) -> None:
        if resume:
            more = ["--resume", "--host-pages", json.dumps(self._start["host_pages"])]
            if self._expected is not None:
                more += ["--expect", self._expected]
        else:
            more = ["--wait", *self._setup["first"]]
        try:
            server = self._server or self._program.spawn()
        except OSError as error:
            source.close()
            self._progress.end("failed", f"cannot start a page server: {error.strerror}")
            return
        self._server = server
        words = [*self._setup["server"], "--confirm-end", *more]
        server.serve(words, self._unchanged_snapshot(), source, [fd for _, fd in self._kept])

    def _unchanged_snapshot(self) -> str | int:
        """Return the name of the file that the restore began with, or its index among the kept ones:
        under its name there may be another file by now, or none."""
        for index, (path, fd) in enumerate(self._kept):
            if self._snapshot != path:
                continue
            try:
                found = os.stat(path)
            except OSError:
                return index
            return path if os.path.samestat(found, os.fstat(fd)) else index
        return self._snapshot

    def _hear_server(self) -> None:
        server = self._server
        assert server is not None
        for line in server.control.receive():
            self._handle(server, line)
        if server.control.closed:
            server.read_errors()

    def _handle(self, server: ServerProcess, line: dict[str, Any]) -> None:
        event = line.get("event")
        self._progress.count(line)
        if event == "loaded":
            server.served = True
            self._backoff = _BACKOFF
            self._former = None
            self._progress.values |= {"loaded": True, "state": "running"}
        elif event == "damage":
            if server.dismissed or not self._progress.add_damage(line):
                return
        elif event == "opened":
            if self._expected is None:
                self._expected = str(line.get("state"))
            return
        elif event == "error":
            server.error = str(line.get("error"))
            return
        elif event == "broken":
            server.kill()  # another one goes on
            return
        elif event == "sent":
            self._may_end(server)
        elif event == "shut":
            if line.get("complete"):
                self._all_sent = True
            return
        elif event != "progress":
            return
        self._progress.publish()

    def _server_ended(self) -> None:
        """Go on with another server, unless all is done."""
        server = self._server
        assert server is not None
        for line in server.control.receive():
            self._handle(server, line)
        self._server = None
        how = server.close()
        if self._progress.ended:
            return
        if self._all_sent:
            if server.error:
                self._progress.note(server.error)
            self._await_completion(time.monotonic() + _FINAL_STATUS)
            return
        if not self._progress.loaded:
            self._progress.end("failed", how)
            return
        self._replace(server.served, how)

    def _replace(self, served: bool, how: str) -> None:
        """Start another server on another connection."""
        if self._former is not None and not served:
            self._progress.note(f"the pages cannot come from {self._snapshot!r}: {how}")
            self._snapshot, self._former = self._former, None
        elif not served:
            self._progress.note(how)
        self._progress.values["restarts"] += 1
        self._progress.values["state"] = "recovering"
        self._progress.publish()
        if served:
            self._reconnect()
        else:
            self._loop.later(self._backoff, self._reconnect)
            self._backoff = min(2 * self._backoff, _BACKOFF_MAX)

    def _reconnect(self) -> None:
        if self._progress.ended:
            return
        spare = self._recoveries.take()
        if spare is None:
            self._loop.later(RETRY, self._reconnect)
            return
        name, source = spare
        self._start_server(source, resume=True)
        self._recoveries.recover(name)

    def _not_recovered(self) -> bool:
        """Ask QEMU whether it has completed; return whether to try again."""
        if not self._progress.ended:
            self._ask_status()
        return not self._progress.ended

    def _resume_from(self, snapshot: str) -> None:
        """Have the pages come from another copy of the snapshot."""
        if not self._progress.loaded or self._all_sent:
            self._progress.note("a restore that is not under way cannot go on from another copy")
            return
        self._former, self._snapshot = self._snapshot, snapshot
        self._progress.values["damages"] = []
        if self._server is not None:  # else the next one is about to be started
            self._server.served = self._server.dismissed = True
            self._server.kill()

    # --- QEMU -------------------------------------------------------------------------------------------

    def _hear_monitor(self) -> None:
        assert self._monitor is not None
        self._monitor.take()
        if self._monitor.closed:
            self._monitor.close()
            self._monitor = None
            self._recoveries.use(None)
            self._qemu_gone()

    def _ask_status(self) -> None:
        if self._monitor is None:
            return

        def answer(reply: dict[str, Any]) -> None:
            status = reply.get("return", {}).get("status")
            if status == "completed":
                self._complete()
            elif status in ("failed", "cancelled"):
                reason = reply["return"].get("error-desc", status)
                self._progress.end("failed", f"QEMU: {reason}")

        self._monitor.execute("query-migrate", {}, answer)

    def _may_end(self, server: ServerProcess) -> None:
        """Let the server send the end, unless memory was plugged in: QEMU does not register it for post-copy,
        and fails to unregister it, and the blocks after it, at the end. The guest would wait for ever at a zero
        page of those."""
        if self._progress.ended or server is not self._server:
            return
        if self._monitor is None or not self._monitor_is_ours:
            self._loop.later(RETRY, lambda: self._may_end(server))
            return

        def answer(reply: dict[str, Any]) -> None:
            blocks = plugged_in(str(reply.get("return", "")), self._start["blocks"])
            if not blocks:
                server.control.send({"command": "end"})
                return
            self._progress.note(
                f"{', '.join(map(repr, blocks))}: memory that was plugged in while pages were missing. QEMU "
                "could not end the migration rightly, so the page server stays: unplug it, and it ends"
            )
            self._loop.later(_UNPLUGGED, lambda: self._may_end(server))

        self._monitor.execute("human-monitor-command", {"command-line": "info ramblock"}, answer)

    def _qemu_gone(self) -> None:
        self._progress.end("gone", "QEMU has ended")

    def _await_completion(self, deadline: float) -> None:
        if self._progress.ended:
            return
        if time.monotonic() > deadline:  # its monitor is busy; it has said that all is there
            self._complete()
            return
        if self._monitor_is_ours:
            self._ask_status()
        self._loop.later(RETRY, lambda: self._await_completion(deadline))

    def _complete(self) -> None:
        if self._progress.ended:
            return
        self._progress.values["pages_left"] = 0
        if self._start.get("collapse"):
            self._make_huge()
        self._progress.end("completed", None)

    def _make_huge(self) -> None:
        # It imports ctypes, which few restores need.
        from pyqmigrate.vm.incoming.keeper.collapse import collapse

        try:
            self._progress.values["huge"] = collapse(self._qemu_pidfd, self._start["collapse"])
        except OSError as error:
            self._progress.note(f"no huge pages: {error.strerror}")

    # --- the end ------------------------------------------------------------------------------------------

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        deadline = time.monotonic() + 1
        for lines in (self._parent, *self._clients.lines()):
            while lines.unsent and not lines.closed and time.monotonic() < deadline:
                time.sleep(0.005)
                lines.flush()
            lines.close()
        self._clients.close()


def ignore_signals() -> None:
    """Ignore the signals of a terminal, and writes to a parent that has ended."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
