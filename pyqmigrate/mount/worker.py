"""A worker: the process that opens the files and answers. It may die at any moment.

It is forked from the keeper, which has everything imported: the next one serves after milliseconds.
What a worker says goes over a socket of packets: each new node before the kernel hears of it, how often
each is open, messages, and that it serves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from pyqmigrate.errors import PyqmigrateError, TargetError
from pyqmigrate.io.threads import start_thread
from pyqmigrate.log import logger
from pyqmigrate.mount.asking import error_object
from pyqmigrate.mount.board import Board
from pyqmigrate.mount.connection import DeviceConnection, KeeperConnection
from pyqmigrate.mount.files import OpenFiles, ShownFiles
from pyqmigrate.mount.nodes import Node, Nodes
from pyqmigrate.mount.push import PushRange, decode_ranges, push
from pyqmigrate.mount.server import Owner, Server

__all__ = ["GONE", "Worker", "is_half_ended"]

GONE = 0  # exit status: the mount is gone

_PACKET_MAX = 1 << 16
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Worker:
    """The keeper's side of a worker. ``requests`` is the socket of remembered requests, or None."""

    def __init__(
        self,
        fd: int,
        open_files: OpenFiles,
        nodes: Iterable[Node],
        board: Board,
        owner: Owner,
        since: dict[int, int],
        *,
        opens: Mapping[int, int],
        ahead: str,
        forwarded: bool,
    ) -> None:
        """Fork it; the working set of the file ``ahead``, if it is not empty, is pushed at once. ``opens``
        is how often the kernel has opened each of the nodes.

        Raises OSError if the system has no room for a process.
        """
        kind = socket.SOCK_SEQPACKET
        self._channel, channel = socket.socketpair(socket.AF_UNIX, kind)
        self.requests: socket.socket | None = None
        requests = None
        if forwarded:
            self.requests, requests = socket.socketpair(socket.AF_UNIX, kind)
        try:
            pid = os.fork()
        except OSError:
            for end in (self._channel, channel, self.requests, requests):
                if end is not None:
                    end.close()
            raise
        if pid == 0:
            connection = DeviceConnection(fd)
            if requests is not None:
                connection = KeeperConnection(fd, requests)
            _close_others({fd, channel.fileno(), requests.fileno() if requests else -1})
            _main(_Work(connection, open_files, nodes, opens, board, owner, since, channel, ahead))
        channel.close()
        if requests is not None:
            requests.close()
        self.pid = pid
        self.ended = os.pidfd_open(pid)  # readable when it has ended
        self._channel.setblocking(False)
        if self.requests is not None:
            self.requests.setblocking(False)

    def fileno(self) -> int:
        return self._channel.fileno()

    def said(self) -> list[dict[str, Any]]:
        """Return what it has said since."""
        found = []
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while packet := self._channel.recv(_PACKET_MAX):
                found.append(json.loads(packet))
        return found

    def send_push(self, fd: int) -> None:
        """Have it push the ranges of a file; see :func:`~pyqmigrate.mount.push.push`."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            socket.send_fds(self._channel, [b"push"], [fd])

    def send_fetch(self) -> None:
        """Have it read the rest of the open files into the local cache."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._channel.send(b"fetch")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Wait for its end, close everything and return its status, as subprocess has it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.ended)
        self._channel.close()
        if self.requests is not None:
            self.requests.close()
        return os.waitstatus_to_exitcode(status)


def is_half_ended(pid: int) -> bool:
    """Return whether the first thread of a process has ended, and the process not, or is not waited for."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False


class _Work:
    """What a worker process needs."""

    def __init__(
        self,
        connection: DeviceConnection,
        open_files: OpenFiles,
        nodes: Iterable[Node],
        opens: Mapping[int, int],
        board: Board,
        owner: Owner,
        since: dict[int, int],
        channel: socket.socket,
        ahead: str,
    ) -> None:
        self._connection = connection
        self._open_files = open_files
        self._known = nodes
        self._opens = opens
        self._board = board
        self._owner = owner
        self._since = since
        self._channel = channel
        self._ahead = ahead
        self._pushed_ahead = False
        self._sending = threading.Lock()

    def run(self) -> None:
        """Serve until the mount is gone."""
        known = list(self._known)
        if known:
            from pyqmigrate.mount.late_files import LateFiles

            files: ShownFiles = LateFiles(self._open_files)
        else:
            files = self._open_files()
        files.on_request(self._board.count_fetch)
        nodes = Nodes(
            files, known, self._announce, opens=self._opens, count_opens=self._announce_opens
        )
        server = Server(
            self._connection, nodes, self._board, self._owner, since=self._since, report=self.report
        )
        if known:
            server.looked_up.set()  # by an earlier worker
            reopening = threading.Thread(target=nodes.reopen, args=(self.report,), daemon=True)
            start_thread(reopening)
        pushing = threading.Thread(target=self._push_ahead, args=(nodes, server), daemon=True)
        if self._ahead:
            start_thread(pushing)
        listening = threading.Thread(target=self._listen, args=(nodes, pushing), daemon=True)
        start_thread(listening)
        self._say({"serving": True})
        server.run()

    def report(self, text: str) -> None:
        self._say({"message": text})

    def failed(self, error: Exception) -> None:
        self._say({"failed": error_object(error)})

    def _announce(self, node: Node) -> None:
        self._say({"node": vars(node)})

    def _announce_opens(self, number: int, count: int) -> None:
        self._say({"opens": (number, count)})

    def _say(self, said: dict[str, Any]) -> None:
        packet = json.dumps(said).encode()
        if len(packet) > _PACKET_MAX:
            raise TargetError(errno.EMSGSIZE, "too long a message to the keeper")
        with self._sending, contextlib.suppress(ConnectionError):
            self._channel.send(packet)

    def _push_ahead(self, nodes: Nodes, server: Server) -> None:
        """Push the working set of the file ``ahead``, if it has one."""
        from pyqmigrate.mount.working_sets import working_set_ranges

        try:
            node = nodes.find(self._ahead)
            if node is None:
                return
            file = nodes.acquire(node.number)
            try:
                ranges = working_set_ranges(file)
            finally:
                nodes.release(node.number)
        except (OSError, PyqmigrateError) as error:
            logger.debug("%s: nothing is read ahead: %s", self._ahead, error)  # a reader is told
            return
        if ranges:
            self._pushed_ahead = True
            pieces = (PushRange(node.number, offset, length) for offset, length in ranges)
            taken = push(pieces, self._connection, nodes, self._board, server.looked_up)
            self._say({"pushed": taken})

    def _listen(self, nodes: Nodes, pushing: threading.Thread) -> None:
        """Take what the keeper sends: lists to push, and to fetch the rest. Both begin when what is
        pushed ahead is done; a list is then that, again."""
        while True:
            message, fds, _, _ = socket.recv_fds(self._channel, 64, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                return
            if self._ahead:
                pushing.join()
            for fd in fds:
                ranges = decode_ranges(fd)
                taken = 0
                if not self._pushed_ahead:
                    taken = push(ranges, self._connection, nodes, self._board)
                self._say({"pushed": taken})
            if message == b"fetch":
                start_thread(threading.Thread(target=self._fetch, args=(nodes,), daemon=True))

    def _fetch(self, nodes: Nodes) -> None:
        """Read the rest; pushing and answering go first, as readers of the store."""
        try:
            nodes.files.fetch_rest()
        except (OSError, PyqmigrateError) as error:
            self.report(f"cannot fetch the rest: {error}")


class _ToKeeper(logging.Handler):
    """Log records become messages of the keeper."""

    def __init__(self, work: _Work) -> None:
        super().__init__(logging.WARNING)
        self._work = work

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self._work.report(self.format(record))


def _main(work: _Work) -> NoReturn:
    """Be the worker."""
    status = 1
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("0")
        logger.addHandler(_ToKeeper(work))
        work.run()
        status = GONE
    except (OSError, PyqmigrateError) as error:
        work.failed(error)
    except BaseException:
        logger.exception("the worker of the mount failed")
    finally:
        os._exit(status)


def _close_others(kept: set[int]) -> None:
    """Close the keeper's descriptors: its sockets would not see its end."""
    start = 3
    for fd in sorted(fd for fd in kept if fd >= 3):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))
