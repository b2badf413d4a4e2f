"""The keeper of a mount: it holds the descriptor of /dev/fuse, and starts a worker again when it dies.

While a process has the descriptor open, a reader waits for its answer instead of getting SIGBUS. The
keeper does as little as possible, has one thread, and is the last process that the system kills when
memory is short. It knows the files by their numbers (:mod:`pyqmigrate.mount.nodes`), sees what the
worker does on the shared :class:`~pyqmigrate.mount.board.Board`, and answers for it.

The keeper ends when the mount is gone: unmounted, and no file of it open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.mount import protocol
from pyqmigrate.mount.asking import Asking, Listener, Object, error_of
from pyqmigrate.mount.board import Board
from pyqmigrate.mount.files import OpenFiles
from pyqmigrate.mount.handshake import answer_init
from pyqmigrate.mount.messages import Messages
from pyqmigrate.mount.mounting import set_read_ahead, unmount
from pyqmigrate.mount.nodes import Node
from pyqmigrate.mount.push import PushRange, encode_ranges, ranges_of
from pyqmigrate.mount.remembered import RememberedRequests
from pyqmigrate.mount.restarts import Restarts
from pyqmigrate.mount.server import Owner
from pyqmigrate.mount.waits import LongWaits, Wait, waits_of
from pyqmigrate.mount.worker import GONE, Worker, is_half_ended

__all__ = ["Keeper", "KeeperSettings"]

_TICK = 1.0
_END_LIMIT = 1.0  # for a worker to see that the mount is gone


@dataclass(frozen=True)
class KeeperSettings:
    """``directory`` is where it is mounted, ``device`` the st_dev of its files; ``place`` names the files
    in messages. ``read_ahead_kib`` is for the kernel, if it lets us (0: its own). With ``private``
    the directory and the one above it are removed in the end. ``record`` switches the log of reads
    on. ``ahead`` names the file whose working set a worker pushes by itself. With ``remember`` the
    keeper remembers the requests, as on kernels without RESEND. With ``follow`` messages go to the
    program that started it, too."""

    directory: str
    place: str
    owner: Owner
    device: int = 0
    read_ahead_kib: int = 0
    private: bool = False
    record: bool = False
    ahead: str = ""
    remember: bool = False
    follow: bool = False


class Keeper:
    """``fd`` is a new connection to the kernel, which has sent nothing but its first request.

    ``control`` is a socket to the process that started this one, or None: until that says "release",
    its end unmounts. ``listener`` is where anybody of this user may ask for the status.
    """

    def __init__(
        self,
        fd: int,
        open_files: OpenFiles,
        settings: KeeperSettings,
        *,
        control: socket.socket | None = None,
        listener: socket.socket | None = None,
        messages: Messages | None = None,
    ) -> None:
        self._fd = fd
        self._open_files = open_files
        self._settings = settings
        self._messages = Messages() if messages is None else messages
        self._board = Board(logging=settings.record)
        self._nodes: dict[int, Node] = {}
        self._opens: dict[int, int] = {}  # how often the kernel has opened each, by its number
        self._since: dict[int, int] = {}
        self._worker: Worker | None = None
        self._remembered: RememberedRequests | None = None
        self._began = time.monotonic()
        self._restarts = Restarts()
        self._serving = False  # whether a worker has ever served
        self._failure: PyqmigrateError | None = None
        self._mounted = True
        self._gone = False
        self._released = control is None
        self._ranges: list[PushRange] = []
        self._pushed = 0
        self._fetch = False
        self._long_waits = LongWaits()
        self._poll = select.poll()
        self._actions: dict[int, Callable[[int], None]] = {}
        answers = {
            "status": self._status,
            "reads": self._reads,
            "push": self._take_push,
            "fetch": self._take_fetch,
            "hide": self._hide,
            "release": self._release,
        }
        self._control = None if control is None else Asking(control, answers)
        self._listener = None if listener is None else Listener(listener, {"status": self._status})

    def run(self) -> None:
        """Serve until the mount is gone. If that cannot begin, unmount and raise the reason."""
        try:
            self._initialise()
            self._watch()
            while not self._gone:
                self._step()
        except BaseException:
            self._unmount()
            raise
        finally:
            self._end()

    def _initialise(self) -> None:
        """Answer the kernel's first request, and choose who reads the others."""
        settings = self._settings
        if not answer_init(self._fd, settings.directory, resend=not settings.remember):
            os.set_blocking(self._fd, False)
            self._remembered = RememberedRequests(self._fd)

    def _watch(self) -> None:
        """Register everything that the keeper waits for."""
        remembered = self._remembered
        if remembered is None:
            self._register(self._fd, 0, self._disconnected)
        else:
            self._register(self._fd, select.POLLIN, self._take_requests)
        if self._control is not None:
            self._register(self._control.fileno(), select.POLLIN, self._control_spoke)
        if self._listener is not None:
            self._register(self._listener.fileno(), select.POLLIN, self._accept)
        if threading.current_thread() is threading.main_thread():
            wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.set_wakeup_fd(woken)
            self._register(wake, select.POLLIN, self._terminate)

    def _step(self) -> None:
        """Wait for something, at most a second, and act on it."""
        now = time.monotonic()
        if self._worker is None and now >= self._restarts.start_at:
            self._start_worker()
        limit = _TICK if self._worker is not None else min(_TICK, self._restarts.start_at - now)
        events = self._poll.poll(max(limit, 0) * 1000)
        for fd, event in events:
            action = self._actions.get(fd)
            if action is not None:  # None: closed by the action before it
                action(event)
        worker = self._worker
        if not events and worker is not None and self._restarts.is_stuck(is_half_ended(worker.pid)):
            self._leave_stuck(worker)
        self._tell_long_waits()

    def _register(self, fd: int, events: int, action: Callable[[int], None]) -> None:
        self._poll.register(fd, events)
        self._actions[fd] = action

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._actions[fd]

    # The worker.

    def _start_worker(self) -> None:
        remembered = self._remembered
        try:
            if remembered is None:
                os.write(self._fd, protocol.encode_notify_resend())
            self._worker = worker = Worker(
                self._fd,
                self._open_files,
                list(self._nodes.values()),
                self._board,
                self._settings.owner,
                self._since,
                opens=self._opens,
                ahead=self._settings.ahead,
                forwarded=remembered is not None,
            )
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENOTCONN):
                self._gone = True
                return
            self._tell(f"cannot start a worker: {error}")
            self._restarts.not_started()
            return
        self._register(worker.fileno(), select.POLLIN, lambda _: self._hear())
        self._register(worker.ended, select.POLLIN, lambda _: self._worker_ended())
        if remembered is not None and worker.requests is not None:
            remembered.connect(worker.requests)
            self._register(worker.requests.fileno(), select.POLLIN, self._exchange)
            self._watch_unsent()

    def _hear(self) -> None:
        """Take what the worker said."""
        if self._worker is None:
            return
        for said in self._worker.said():
            if "node" in said:
                node = Node(**said["node"])
                self._nodes[node.number] = node
            elif "opens" in said:
                number, count = said["opens"]
                self._opens[number] = count
            elif "message" in said:
                self._tell(said["message"])
            elif "pushed" in said:
                self._pushed += said["pushed"]
                self._ranges = []
            elif "failed" in said:
                self._failure = error_of(said["failed"])
                self._tell(f"the worker cannot serve: {self._failure}")
            elif "serving" in said:
                self._served()

    def _served(self) -> None:
        """Say that the mount serves, the first time."""
        settings = self._settings
        if not self._serving and settings.read_ahead_kib:
            set_read_ahead(settings.device, settings.read_ahead_kib)
        if not self._serving and self._control is not None:
            self._control.send({"ready": os.getpid()})
        self._serving = True
        self._failure = None
        self._send_push()
        if self._fetch and self._worker is not None:
            self._worker.send_fetch()

    def _worker_ended(self) -> None:
        worker = self._worker
        assert worker is not None
        self._detach(worker)
        status = worker.reap()
        if status == GONE:
            self._gone = True
            return
        if not self._serving and self._failure is not None:
            raise self._failure
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        self._tell(f"worker {worker.pid} ended {how}; another one is started")
        self._restarts.worker_ended(self._board.totals().requests)

    def _leave_stuck(self, worker: Worker) -> None:
        """Start another worker beside one that was killed and does not end.

        A thread of it that pushes waits, in the kernel, for a page that is locked by a request: until that is
        answered, by the next worker.
        """
        self._detach(worker)
        self._register(worker.ended, select.POLLIN, lambda _: self._reap_stuck(worker))
        self._tell(f"worker {worker.pid} was killed and does not end; another one is started")
        self._restarts.worker_ended(self._board.totals().requests)

    def _reap_stuck(self, worker: Worker) -> None:
        self._forget(worker.ended)
        worker.reap()

    def _detach(self, worker: Worker) -> None:
        """Expect nothing more of it."""
        self._hear()
        self._forget(worker.fileno())
        self._forget(worker.ended)
        if self._remembered is not None and worker.requests is not None:
            self._forget(worker.requests.fileno())
            self._remembered.disconnect()
        self._worker = None
        self._since = self._board.clear()

    # Requests that the keeper passes on.

    def _take_requests(self, event: int) -> None:
        assert self._remembered is not None
        if event & ~select.POLLIN:
            self._gone = True
            return
        try:
            self._remembered.take_requests()
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENOTCONN):
                raise
            self._gone = True
        self._watch_unsent()

    def _exchange(self, event: int) -> None:
        assert self._remembered is not None
        self._remembered.take_answers()
        self._remembered.send()
        self._watch_unsent()

    def _watch_unsent(self) -> None:
        """Wait for room in the worker's socket, if something waits for it."""
        if self._worker is not None and self._worker.requests is not None:
            assert self._remembered is not None
            events = select.POLLIN | (select.POLLOUT if self._remembered.has_unsent else 0)
            self._poll.modify(self._worker.requests.fileno(), events)

    # The processes that talk to the keeper.

    def _disconnected(self, event: int) -> None:
        self._gone = True

    def _terminate(self, event: int) -> None:
        """Take the name away; who has a file open reads on."""
        for fd, action in self._actions.items():
            if action == self._terminate:
                os.read(fd, 64)
        self._tell("SIGTERM: the mount has no name any more; it ends with its last file")
        self._unmount()

    def _control_spoke(self, event: int) -> None:
        control = self._control
        assert control is not None
        if control.take():
            return
        self._forget(control.fileno())
        control.close()
        self._control = None
        if not self._released:
            self._unmount()

    def _accept(self, event: int) -> None:
        assert self._listener is not None
        client = self._listener.accept()
        if client is not None:
            self._register(client.fileno(), select.POLLIN, lambda _: self._serve_client(client))

    def _serve_client(self, client: Asking) -> None:
        assert self._listener is not None
        if not client.take():
            self._forget(client.fileno())
            del self._listener.clients[client.fileno()]
            client.close()

    def _unmount(self) -> None:
        """Take the name of the mount away, and its directory if it is private."""
        if self._mounted:
            self._mounted = False
            try:
                unmount(self._settings.directory, lazy=True)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # another process did it
                    self._tell(str(error))
        self._remove_directory()

    def _remove_directory(self) -> None:
        if self._settings.private:
            with contextlib.suppress(OSError):
                os.rmdir(self._settings.directory)
                os.rmdir(os.path.dirname(self._settings.directory))

    def _end(self) -> None:
        """End the worker and close everything."""
        worker = self._worker
        if worker is not None:
            if self._remembered is None:  # otherwise it does not see that the mount is gone
                select.select([worker.ended], [], [], _END_LIMIT)
            worker.kill()
            worker.reap()
        if self._control is not None:
            self._control.close()
        if self._listener is not None:
            self._listener.close()
        os.close(self._fd)
        self._remove_directory()

    def _tell_long_waits(self) -> None:
        """Keep a message for each wait that has become long."""
        for message in self._long_waits.new_messages(self._waits()):
            self._tell(message)

    def _tell(self, text: str) -> None:
        """Keep a message, and send it to the program that follows."""
        if self._messages.add(text) and self._settings.follow and self._control is not None:
            self._control.send({"message": text})

    def _waits(self) -> list[Wait]:
        remembered = self._remembered
        waiting = [] if remembered is None else remembered.waiting()
        return waits_of(self._board.activities(), waiting, self._nodes)

    # Answers.

    def _status(self, question: Object) -> Object:
        self._hear()  # of a read that the client has just seen fail
        totals = self._board.totals()
        fetched, demanded = self._board.fetched
        return {
            "directory": self._settings.directory,
            "place": self._settings.place,
            "keeper": os.getpid(),
            "worker": None if self._worker is None else self._worker.pid,
            "seconds": time.monotonic() - self._began,
            "restarts": self._restarts.count,
            "mounted": self._mounted,
            "resend": self._remembered is None,
            "requests": totals.requests,
            "reads": totals.reads,
            "bytes_read": totals.bytes,
            "failed": totals.failed,
            "pushed": self._pushed,
            "fetched": fetched,
            "fetched_on_demand": demanded,
            "waiting": [vars(wait) for wait in self._waits()],
            "messages": [message._asdict() for message in self._messages.all()],
        }

    def _reads(self, question: Object) -> Object:
        """Answer with the log of reads: names, and lists of number, offset and length."""
        self._hear()  # of the nodes that the log has
        names = {number: node.name for number, node in self._nodes.items()}
        return {"names": names, "reads": list(self._board.logged_reads())}

    def _take_push(self, question: Object) -> Object:
        """Have ranges pushed: lists of name, offset and length, in the order to push them."""
        if self._ranges:
            raise UsageError("another list is being pushed")
        self._hear()  # of a node that the client has just opened
        self._ranges = ranges_of(question["ranges"], self._nodes.values())
        if not self._settings.ahead:  # what the worker pushes by itself is counted from its start
            self._board.pushed = 0
        self._send_push()
        return {}

    def _send_push(self) -> None:
        """Send the list to the worker, if there is one that is not done."""
        if self._ranges and self._worker is not None:
            fd = encode_ranges(self._ranges)
            self._worker.send_push(fd)
            os.close(fd)

    def _take_fetch(self, question: Object) -> Object:
        """Have the rest of the open files fetched, by this worker and by each later one."""
        self._fetch = True
        if self._worker is not None:
            self._worker.send_fetch()
        return {}

    def _hide(self, question: Object) -> Object:
        self._unmount()
        return {}

    def _release(self, question: Object) -> Object:
        self._released = True
        return {}
