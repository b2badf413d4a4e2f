"""Keeps the page server of a lazily restored guest going until the guest has all of its memory.

This is a program of its own, started by :mod:`pyqmigrate.vm.incoming.lazy_process` without ``site``; its
only argument, the snapshot, is there for people who read a list of processes. It outlives the
process that restored the guest. Its standard input is a socket to that process, the *parent*.

The page server (``pyqmigrate.page_server``) is its child, and sends the pages to QEMU over a socket. If
the server dies, the guest's processors stop at the first page that is missing, and a command like ``stop``
blocks QEMU's monitors. So the keeper has a monitor of its own, with out-of-band commands enabled from the start: by
``migrate-recover`` it gives QEMU a new connection, on which a new server asks what has arrived, and goes on.
The connections are passed to QEMU beforehand (``getfd`` is not an out-of-band command).

It imports the standard library and the modules of this folder only: it must start fast, and stay small.
The lines that it exchanges are JSON objects. From the parent:

===========  ======================================================================
setup        the first line: ``server`` (command line of a page server, without the
             snapshot and sockets), ``first`` (more words for the first server only),
             ``snapshot``, ``kept`` (a list of [absolute path, inherited descriptor] of its
             files), ``monitor`` and ``source`` (inherited descriptors: the monitor, and
             the socket on which QEMU expects the stream), ``hold`` (seconds without any
             push, while a working set is recorded, or null) and ``push`` (its policy then)
start        once QEMU waits for the stream: ``pid`` of QEMU, ``host_pages`` (page sizes
             of its blocks by name), and ``collapse``, a list of [address, length] of
             memory whose pages are to be made huge at the end; empty for none
===========  ======================================================================

To the parent, and to each client of its status socket, goes the state: see :class:`State`. The status
socket has an abstract name (:func:`status_name`); only processes of the same user and root are served.
A client may send ``{"resume": SNAPSHOT}``: the pages come from that copy of the snapshot from then on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from pyqmigrate.vm.incoming.keeper.lines import Lines
from pyqmigrate.vm.incoming.keeper.monitor import KeeperMonitor
from pyqmigrate.vm.incoming.keeper.server import ServerProcess

__all__ = ["DAMAGES_MAX", "ENDED", "Keeper", "State", "main", "status_name"]

ENDED = ("completed", "failed", "gone")
_SPARES = 8  # connections that QEMU has for recoveries: one is used by each
DAMAGES_MAX = 100
_WARNINGS_MAX = 20
_CLIENTS_MAX = 64
_RETRY = 0.01  # seconds between attempts to recover
_RETRY_MAX = 1.0
_BACKOFF = 0.05  # seconds until a server that did nothing is restarted; doubled
_BACKOFF_MAX = 5.0
_FINAL_STATUS = 10.0  # seconds from the last page until QEMU has to report completion

# Keys of the state, and the server's names for them.
_COUNTS = {"pages_left": "pages_left", "faults": "requests", "fault_seconds": "mean_latency"}
_DAMAGE = {"block": "block", "page": "page", "why": "error"}

State = dict[str, Any]
"""What is told about a restore:

==============  ===================================================================
state           ``starting``; ``running`` (pages are missing), ``recovering`` (the
                server is being replaced), then one of ``completed``, ``failed`` and
                ``gone`` (QEMU ended)
loaded          whether QEMU has loaded the device state: from then on a restore is
                not lost if the server dies
pages_left      data pages that were not sent yet, or null
faults          requests for pages by QEMU so far, and
fault_seconds   their mean latency in the server, or null
restarts        how often the server was replaced
damages         a list of ``block``, ``page`` and ``why``: pages that cannot be had
warnings        sentences on what went wrong
huge            bytes of memory that were made huge pages at the end
failure         why it ``failed``, or null
==============  ===================================================================
"""


def status_name(pid: int) -> str:
    """Return the abstract name of the status socket for the QEMU with this process id."""
    return f"\0pyqmigrate-lazy/{pid}"


class Keeper:
    """The server, the monitor, the parent and the clients of one restore; see the module."""

    def __init__(self, parent: socket.socket) -> None:
        self._parent = Lines(parent)
        self._clients: list[Lines] = []
        self._listener: socket.socket | None = None
        self._monitor: KeeperMonitor | None = None
        self._server: ServerProcess | None = None
        self._setup: dict[str, Any] = {}
        self._snapshot = ""
        self._expected: str | None = None  # the state of the snapshot, by a digest
        self._former: str | None = None  # the former snapshot, while another copy is tried
        self._start: dict[str, Any] = {}
        self._spares: list[tuple[str, socket.socket]] = []
        self._passing = False
        self._names = 0
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._backoff = _BACKOFF
        self._qemu_pidfd = -1
        self._all_sent = False
        self.state: State = {
            "state": "starting",
            "loaded": False,
            "pages_left": None,
            "faults": 0,
            "fault_seconds": None,
            "restarts": 0,
            "damages": [],
            "warnings": [],
            "huge": 0,
            "failure": None,
        }

    # --- the loop -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the restore has ended, in one of the states ENDED."""
        try:
            while self.state["state"] not in ENDED:
                self._wait()
        finally:
            self._close()

    def _wait(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        if due:
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for _, work in due:
                work()
            return
        sources = self._sources()
        poll = select.poll()
        for fd, (events, _) in sources.items():
            poll.register(fd, events)
        timeout = None
        if self._timers:
            timeout = max(min(when for when, _ in self._timers) - now, 0) * 1000 + 0.5
        for fd, _ in poll.poll(timeout):
            if self.state["state"] in ENDED:
                return
            sources[fd][1]()
            if self._server is None or fd == self._server.pidfd:
                return  # the descriptors may be others now

    def _sources(self) -> dict[int, tuple[int, Callable[[], None]]]:
        """Return what to poll: events and what handles them, by descriptor."""
        found: dict[int, tuple[int, Callable[[], None]]] = {}

        def add(lines: Lines, handle: Callable[[], None]) -> None:
            events = select.POLLIN | (select.POLLOUT if lines.unsent else 0)

            def work() -> None:
                lines.flush()
                handle()

            found[lines.fileno()] = (events, work)

        if not self._parent.closed:
            add(self._parent, self._hear_parent)
        if self._monitor is not None:
            add(self._monitor, self._hear_monitor)
        if self._listener is not None:
            found[self._listener.fileno()] = (select.POLLIN, self._accept)
        for client in self._clients:
            add(client, functools.partial(self._hear_client, client))
        if self._qemu_pidfd >= 0:
            found[self._qemu_pidfd] = (select.POLLIN, self._qemu_gone)
        if self._server is not None:
            server = self._server
            if not server.control.closed:
                add(server.control, self._hear_server)
            found[server.pidfd] = (select.POLLIN, self._server_ended)
        return found

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + seconds, work))

    # --- the parent and the clients -------------------------------------------------------------------

    def _hear_parent(self) -> None:
        for line in self._parent.receive():
            if "setup" in line:
                self._set_up(line["setup"])
            elif "start" in line:
                self._begin(line["start"])
        if self._parent.closed and not self.state["loaded"]:
            self._end("failed", "the process that restores the guest has ended")

    def _set_up(self, setup: dict[str, Any]) -> None:
        self._setup, self._snapshot = setup, setup["snapshot"]
        self._monitor = KeeperMonitor(socket.socket(fileno=setup["monitor"]), self._refill)
        self._start_server(socket.socket(fileno=setup["source"]), resume=False)

    def _begin(self, start: dict[str, Any]) -> None:
        self._start = start
        with contextlib.suppress(OSError):
            self._qemu_pidfd = os.pidfd_open(start["pid"])
            self._listen(start["pid"])
        if self._server is not None:
            self._server.control.send({"command": "begin", "host_pages": start["host_pages"]})
        if self._setup["hold"] is not None:
            self._later(self._setup["hold"], self._push)

    def _push(self) -> None:
        """Let the server send what nobody has asked for."""
        if self._server is not None:
            self._server.control.send({"command": "push", "policy": self._setup["push"]})

    def _listen(self, pid: int) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(status_name(pid))
            listener.listen(16)
        except OSError as error:
            listener.close()
            self._note(f"the progress of this restore cannot be asked for: {error.strerror}")
            return
        listener.setblocking(False)
        self._listener = listener

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        format_ = "iII"
        data = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(format_)
        )
        _, user, _ = struct.unpack(format_, data)
        if user not in (0, os.geteuid()) or len(self._clients) >= _CLIENTS_MAX:
            connection.close()
            return
        client = Lines(connection)
        self._clients.append(client)
        client.send(self.state)

    def _hear_client(self, client: Lines) -> None:
        for line in client.receive():
            if isinstance(line.get("resume"), str):
                self._resume_from(line["resume"])
        if client.closed:
            self._clients.remove(client)
            client.close()

    def _publish(self) -> None:
        for listener in (self._parent, *self._clients):
            if not listener.closed:
                listener.send(self.state)

    def _note(self, message: str) -> None:
        warnings = self.state["warnings"]
        if message not in warnings:
            warnings.append(message)
            del warnings[:-_WARNINGS_MAX]
            self._publish()

    # --- the server -----------------------------------------------------------------------------------

    def _start_server(self, source: socket.socket, *, resume: bool) -> None:
        snapshot, fds = self._unchanged_snapshot()
        if resume:
            more = ["--resume", "--host-pages", json.dumps(self._start["host_pages"])]
            if self._expected is not None:
                more += ["--expect", self._expected]
        else:
            more = ["--wait", *self._setup["first"]]
        words = [*self._setup["server"], "--snapshot", snapshot, *more]
        try:
            self._server = ServerProcess(words, source, fds)
        except OSError as error:
            self._end("failed", f"cannot start a page server: {error.strerror}")

    def _unchanged_snapshot(self) -> tuple[str, list[int]]:
        """Return what names the file that the restore began with, and descriptors that this needs.

        Under its name there may be another file by now, or none.
        """
        fds = []
        snapshot = self._snapshot
        for path, fd in self._setup["kept"]:
            fds.append(fd)
            if snapshot != path:
                continue
            try:
                found = os.stat(path)
            except OSError:
                found = None
            if found is None or not os.path.samestat(found, os.fstat(fd)):
                snapshot = f"/proc/self/fd/{fd}"
        return snapshot, fds

    def _hear_server(self) -> None:
        server = self._server
        assert server is not None
        for line in server.control.receive():
            self._handle(server, line)
        if server.control.closed:
            server.read_errors()

    def _handle(self, server: ServerProcess, line: dict[str, Any]) -> None:
        event = line.get("event")
        self._take_progress(line)
        if event == "loaded":
            server.served = True
            self._backoff = _BACKOFF
            self._former = None
            self.state |= {"loaded": True, "state": "running"}
        elif event == "damage":
            if not self._take_damage(line):
                return
        elif event == "opened":
            if self._expected is None:
                self._expected = str(line.get("state"))
            return
        elif event == "error":
            server.error = str(line.get("error"))
            return
        elif event == "broken":
            server.process.kill()  # another one goes on
            return
        elif event == "shut":
            if line.get("complete"):
                self._all_sent = True
            return
        elif event != "progress":
            return
        self._publish()

    def _take_progress(self, line: dict[str, Any]) -> None:
        for key, name in _COUNTS.items():
            if name in line:
                self.state[key] = line[name]

    def _take_damage(self, line: dict[str, Any]) -> bool:
        """List a page, unless that was done or there are too many; return whether it was listed."""
        damage = {name: line.get(key) for name, key in _DAMAGE.items()}
        damages = self.state["damages"]
        if damage in damages or len(damages) >= DAMAGES_MAX:
            return False
        damages.append(damage)
        return True

    def _server_ended(self) -> None:
        """Go on with another server, unless all is done."""
        server, self._server = self._server, None
        assert server is not None
        for line in server.control.receive():
            self._handle(server, line)
        how = server.close()
        if self.state["state"] in ENDED:
            return
        if self._all_sent:
            if server.error:
                self._note(server.error)
            self._await_completion(time.monotonic() + _FINAL_STATUS)
            return
        if not self.state["loaded"]:
            self._end("failed", how)
            return
        self._replace(server.served, how)

    def _replace(self, served: bool, how: str) -> None:
        """Start another server on another connection."""
        if self._former is not None and not served:
            self._note(f"the pages cannot come from {self._snapshot!r}: {how}")
            self._snapshot, self._former = self._former, None
        elif not served:
            self._note(how)
        self.state["restarts"] += 1
        self.state["state"] = "recovering"
        self._publish()
        if served:
            self._reconnect()
        else:
            self._later(self._backoff, self._reconnect)
            self._backoff = min(2 * self._backoff, _BACKOFF_MAX)

    def _reconnect(self) -> None:
        if not self._spares:
            self._refill()
            self._later(_RETRY, self._reconnect)
            return
        name, source = self._spares.pop(0)
        self._start_server(source, resume=True)
        self._recover(name, _RETRY)

    def _recover(self, name: str, pause: float) -> None:
        """Have QEMU take the connection ``name``, as soon as it has noticed the loss of the former."""
        if self.state["state"] in ENDED or self._monitor is None:
            return

        def answer(reply: dict[str, Any]) -> None:
            if "return" in reply:
                self._refill()
                return
            # QEMU notices when it reads or writes the next time, or it has completed.
            self._ask_status()
            self._later(pause, lambda: self._recover(name, min(2 * pause, _RETRY_MAX)))

        self._monitor.execute("migrate-recover", {"uri": f"fd:{name}"}, answer, oob=True)

    def _resume_from(self, snapshot: str) -> None:
        """Have the pages come from another copy of the snapshot."""
        if not self.state["loaded"] or self._all_sent:
            self._note("a restore that is not under way cannot go on from another copy")
            return
        self._former, self._snapshot = self._snapshot, snapshot
        self.state["damages"] = []
        if self._server is not None:  # else the next one is about to be started
            self._server.served = True
            self._server.process.kill()

    # --- QEMU -------------------------------------------------------------------------------------------

    def _hear_monitor(self) -> None:
        assert self._monitor is not None
        self._monitor.take()
        if self._monitor.closed:
            self._monitor.close()
            self._monitor = None
            self._qemu_gone()

    def _refill(self) -> None:
        """Give QEMU connections for later recoveries."""
        monitor = self._monitor
        if self._passing or monitor is None or not monitor.usable or len(self._spares) >= _SPARES:
            return
        ours, theirs = socket.socketpair()
        self._names += 1
        name = f"pyqmigrate-lazy-{self._names}"
        self._passing = True

        def answer(reply: dict[str, Any]) -> None:
            self._passing = False
            if "return" in reply:
                self._spares.append((name, ours))
                self._refill()
            else:
                ours.close()
                self._note(f"QEMU takes no connection for a recovery: {reply['error'].get('desc')}")

        with theirs:
            monitor.pass_fd(theirs.fileno(), name, answer)

    def _ask_status(self) -> None:
        if self._monitor is None:
            return

        def answer(reply: dict[str, Any]) -> None:
            status = reply.get("return", {}).get("status")
            if status == "completed":
                self._complete()
            elif status in ("failed", "cancelled"):
                reason = reply["return"].get("error-desc", status)
                self._end("failed", f"QEMU: {reason}")

        self._monitor.execute("query-migrate", {}, answer)

    def _qemu_gone(self) -> None:
        self._end("gone", "QEMU has ended")

    def _await_completion(self, deadline: float) -> None:
        if self.state["state"] in ENDED:
            return
        if time.monotonic() > deadline:  # its monitor is busy; it has said that all is there
            self._complete()
            return
        self._ask_status()
        self._later(_RETRY, lambda: self._await_completion(deadline))

    def _complete(self) -> None:
        if self.state["state"] in ENDED:
            return
        self.state["pages_left"] = 0
        if self._start.get("collapse"):
            self._make_huge()
        self._end("completed", None)

    def _make_huge(self) -> None:
        # It imports ctypes, which few restores need.
        from pyqmigrate.vm.incoming.keeper.collapse import collapse

        try:
            self.state["huge"] = collapse(self._qemu_pidfd, self._start["collapse"])
        except OSError as error:
            self._note(f"no huge pages: {error.strerror}")

    # --- the end ------------------------------------------------------------------------------------------

    def _end(self, state: str, failure: str | None) -> None:
        if self.state["state"] in ENDED:
            return
        self.state |= {"state": state, "failure": failure}
        self._publish()

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        deadline = time.monotonic() + 1
        for lines in (self._parent, *self._clients):
            while lines.unsent and not lines.closed and time.monotonic() < deadline:
                time.sleep(0.005)
                lines.flush()
            lines.close()
        if self._listener is not None:
            self._listener.close()


def main() -> None:
    """Keep the restore whose parent is standard input."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    Keeper(socket.socket(fileno=0)).run()
