"""The worker's part of the protocol: requests in, replies out, on threads that do not wait for each other.

As many threads serve as requests are slow, up to :data:`~pyqmigrate.mount.board.SLOTS`: one of them always
waits for the next request, so that a store that does not answer delays nobody but its readers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from pyqmigrate.errors import PyqmigrateError, SnapshotError
from pyqmigrate.io.plain_file import FileOfFrames, views_of
from pyqmigrate.io.threads import start_thread
from pyqmigrate.io.view import DAMAGED
from pyqmigrate.log import logger
from pyqmigrate.mount import protocol
from pyqmigrate.mount.board import SLOTS, Activity, Board
from pyqmigrate.mount.interrupts import Interrupts
from pyqmigrate.mount.nodes import Node, Nodes
from pyqmigrate.mount.protocol import ROOT, Attributes, BadRequest, Request

__all__ = ["Connection", "Owner", "Server"]

_IDLE_MAX = 3  # threads that wait for requests
_NAME_SECONDS = 1  # for so long the kernel may keep a name: another snapshot may get it
_ATTRIBUTE_SECONDS = 3600  # a node never changes
_SMALL = 64 << 10  # bytes of a read: what is read ahead, or from one end to the other, is larger
_ERRNO_END = 512  # the kernel takes no others
# Errors that say nothing about the store: of names, of seeks beyond the end, and of the requests.
_EXPECTED = (errno.ENOENT, errno.ENXIO, errno.EINVAL)


Body: TypeAlias = bytes | bytearray | memoryview


class Connection(Protocol):
    """Where requests come from and replies go to."""

    def receive(self, buffer: bytearray) -> int | None:
        """Wait for a request and return its length; None when the mount is gone."""
        ...

    def reply(self, unique: int, body: Sequence[Body], error: int) -> None:
        """Answer a request, with a body in parts. If nobody waits for the answer, that is not an
        error."""
        ...

    def store(self, node: int, offset: int, data: Sequence[Body]) -> bool:
        """Put ``data``, in parts, into the page cache of a node. Return whether the kernel took it."""
        ...


class Owner:
    """Who the files belong to, and who may read them: everybody, or only the owner."""

    def __init__(self, uid: int, gid: int, *, readable_by_all: bool) -> None:
        self.uid = uid
        self.gid = gid
        self.file_mode = stat.S_IFREG | (0o444 if readable_by_all else 0o400)
        self.directory_mode = stat.S_IFDIR | (0o555 if readable_by_all else 0o500)


class Server:
    """Serves the files of ``nodes`` until the mount is gone.

    ``since`` says since when (ns) requests of an earlier worker wait, by number. ``report`` gets a
    message for each read that failed.
    """

    def __init__(
        self,
        connection: Connection,
        nodes: Nodes,
        board: Board,
        owner: Owner,
        *,
        since: dict[int, int],
        report: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._nodes = nodes
        self._board = board
        self._owner = owner
        self._since = since
        self._report = report
        self._interrupts = Interrupts(self._abandon)
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        self._free = list(range(SLOTS))
        self._idle = 0
        self._gone = threading.Event()
        self.looked_up = threading.Event()  # the kernel knows a node
        self._listings: dict[int, list[str]] = {}
        self._started_ns = time.time_ns()
        self._handlers: dict[int, Callable[[Request, memoryview], Body]] = {
            protocol.LOOKUP: self._lookup,
            protocol.GETATTR: self._getattr,
            protocol.OPEN: self._open,
            protocol.RELEASE: self._release,
            protocol.OPENDIR: self._opendir,
            protocol.READDIR: self._readdir,
            protocol.RELEASEDIR: self._releasedir,
            protocol.LSEEK: self._seek,
            protocol.STATFS: lambda request, body: protocol.encode_statfs(),
            protocol.FLUSH: lambda request, body: b"",
            protocol.DESTROY: lambda request, body: b"",
        }

    def run(self) -> None:
        """Serve; return when the mount is gone. Threads that wait for a store may be left over."""
        self._start_thread()
        self._gone.wait()

    def _start_thread(self) -> None:
        """Start a thread if there is a slot for it."""
        with self._lock:
            if not self._free:
                return
            slot = self._free.pop()
            self._idle += 1
        thread = threading.Thread(target=self._serve, args=(slot,), daemon=True)
        try:
            start_thread(thread)
        except OSError as error:
            with self._lock:
                self._free.append(slot)
                self._idle -= 1
            logger.warning("%s: fewer requests are served at once", error)
            if len(self._free) == SLOTS:
                raise

    def _serve(self, slot: int) -> None:
        buffer = bytearray(protocol.REQUEST_MAX)
        try:
            while (length := self._connection.receive(buffer)) is not None:
                with self._lock:
                    self._idle -= 1
                    alone = self._idle == 0
                if alone:
                    self._start_thread()
                self._answer(slot, buffer, length)
                with self._lock:
                    if self._idle >= _IDLE_MAX:
                        self._free.append(slot)
                        return
                    self._idle += 1
            self._gone.set()
        except BaseException:
            logger.exception("a thread of the mount failed")
            os._exit(1)  # the keeper starts another worker

    def _answer(self, slot: int, buffer: bytearray, length: int) -> None:
        """Answer one request, whatever it is."""
        try:
            request = Request.decode(buffer, length)
        except BadRequest as error:
            logger.warning("%s", error)
            return
        body = memoryview(buffer)[protocol.HEADER_BYTES : length]
        operation, unique = request.operation, request.unique
        if operation in (protocol.FORGET, protocol.BATCH_FORGET):
            return  # numbers are never given to another file
        if operation == protocol.INTERRUPT:
            self._interrupt(unique, body)
            return
        offset = size = 0
        wrong: BadRequest | None = None
        if operation == protocol.READ:
            try:
                _, offset, size = protocol.decode_range(body)
            except BadRequest as error:
                wrong = error
        started = self._since.pop(unique & ~protocol.RESENT, 0) or time.monotonic_ns()
        about = (unique, request.node, offset, started, operation, size, request.pid, request.uid)
        self._board.begin(slot, Activity._make(about))
        self._interrupts.begin(unique, request.pid)
        answer: Sequence[Body] = ()
        failure = 0
        try:
            if wrong is not None:
                raise wrong
            if operation == protocol.READ:
                answer = self._read(request.node, offset, size)
            elif operation in self._handlers:
                answer = (self._handlers[operation](request, body),)
            else:
                failure = errno.ENOSYS
        except Exception as error:
            failure = self._failure(request, body, error)
        finally:
            self._interrupts.end(unique)
            read = sum(map(len, answer)) if operation == protocol.READ else -1
            self._board.end(slot, read, failed=failure not in (0, errno.ENOSYS, errno.ENOENT))
        self._connection.reply(unique, answer, failure)
        if operation == protocol.LOOKUP and not failure:
            self.looked_up.set()
        if operation == protocol.READ and size <= _SMALL and not failure:
            self._store_around(request.node, offset, size)

    def _failure(self, request: Request, body: memoryview, error: Exception) -> int:
        """Return the errno for a request that failed, and report it if the store is the reason."""
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        if not isinstance(error, OSError | PyqmigrateError):
            logger.exception("operation %d of the mount failed", request.operation)
        if request.operation == protocol.READ:
            number = errno.EIO  # nothing else means something to a reader of a file
        elif number >= _ERRNO_END:
            number = errno.EIO
        if number not in _EXPECTED:
            damaged = f"{DAMAGED}: " if isinstance(error, SnapshotError) else ""
            self._report(f"{self._work_of(request, body)}: {damaged}{error}")
        return number

    def _work_of(self, request: Request, body: memoryview) -> str:
        """Return for a message what a request wanted."""
        with contextlib.suppress(OSError):
            if request.operation == protocol.LOOKUP:
                return f"{protocol.decode_name(body)}: cannot be shown"
            name = "the directory" if request.node == ROOT else self._nodes.get(request.node).name
            if request.operation != protocol.READ:
                return name
            _, offset, length = protocol.decode_range(body)
            return f"{name}: cannot read {length} bytes at file offset {offset:#x}"
        return f"file {request.node}"

    def _interrupt(self, unique: int, body: memoryview) -> None:
        try:
            known = self._interrupts.interrupt(protocol.decode_unique(body))
        except BadRequest as error:
            logger.warning("%s", error)
            return
        if not known:  # perhaps another thread has just received it: the kernel asks again
            self._connection.reply(unique, (), errno.EAGAIN)

    def _abandon(self, unique: int) -> None:
        self._connection.reply(unique, (), errno.EINTR)

    def _read(self, number: int, offset: int, length: int) -> Sequence[Body]:
        node = self._nodes.get(number)
        length = max(min(length, node.size - offset), 0)
        self._board.log(number, offset, length)
        file = self._nodes.acquire(number)
        try:
            self._nodes.count_read(number)
            # With fewer bytes, the kernel would show zeros instead of the rest.
            return views_of(file, offset, length)
        finally:
            self._nodes.release(number)

    def _store_around(self, number: int, offset: int, length: int) -> None:
        """Put what was decompressed for a small read into the page cache, so that no neighbour of a
        page has to be asked for. Not while reads are recorded: they would be fewer.

        One thread at a time: the kernel keeps it waiting while another page of these is being read.
        """
        if self._board.logging or not self._storing.acquire(blocking=False):
            return
        try:
            file = self._nodes.acquire(number)
            try:
                if isinstance(file, FileOfFrames):
                    end = min(offset + length, self._nodes.get(number).size)
                    first, last = file.cheap_range(offset, length)
                    for start, stop in ((end, last), (first, offset)):
                        if start < stop:
                            data = file.views(start, stop - start)
                            self._connection.store(number, start, data)
            finally:
                self._nodes.release(number)
        except (OSError, PyqmigrateError) as error:
            logger.debug("node %d: %s", number, error)  # a reader of these bytes hears of it
        finally:
            self._storing.release()

    def _lookup(self, request: Request, body: memoryview) -> Body:
        name = protocol.decode_name(body)
        node = self._nodes.find(name) if request.node == ROOT else None
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return protocol.encode_entry(self._attributes(node), _NAME_SECONDS, _ATTRIBUTE_SECONDS)

    def _getattr(self, request: Request, body: memoryview) -> Body:
        if request.node == ROOT:
            owner = self._owner
            root = (ROOT, owner.directory_mode, 0, 0, self._started_ns, owner.uid, owner.gid)
            return protocol.encode_attributes(Attributes._make(root), _ATTRIBUTE_SECONDS)
        node = self._nodes.get(request.node)
        return protocol.encode_attributes(self._attributes(node), _ATTRIBUTE_SECONDS)

    def _attributes(self, node: Node) -> Attributes:
        owner = self._owner
        size = (node.size, node.allocated, node.mtime_ns)
        return Attributes(node.number, owner.file_mode, *size, owner.uid, owner.gid)

    def _open(self, request: Request, body: memoryview) -> Body:
        self._nodes.count_open(request.node)
        return protocol.encode_open(0, protocol.KEEP_CACHE)

    def _release(self, request: Request, body: memoryview) -> Body:
        self._nodes.count_close(request.node)
        return b""

    def _seek(self, request: Request, body: memoryview) -> Body:
        offset, whence = protocol.decode_seek(body)
        node = self._nodes.get(request.node)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise BadRequest(f"a seek of kind {whence}")
        if offset >= node.size:
            raise OSError(errno.ENXIO, "beyond the end of the file")
        file = self._nodes.acquire(request.node)
        try:
            found = file.next_data(offset) if whence == os.SEEK_DATA else file.next_hole(offset)
        finally:
            self._nodes.release(request.node)
        if found is None:
            raise OSError(errno.ENXIO, "only a hole follows")
        return protocol.encode_seek(found)

    def _opendir(self, request: Request, body: memoryview) -> Body:
        handle = int.from_bytes(os.urandom(7), "little")  # not one of an earlier worker
        self._listings[handle] = self._listing()
        return protocol.encode_open(handle)

    def _readdir(self, request: Request, body: memoryview) -> Body:
        handle, offset, length = protocol.decode_range(body)
        names = self._listings.get(handle)
        if names is None:  # an earlier worker opened the directory
            names = self._listings[handle] = self._listing()
        entries = bytearray()
        for position in range(offset, len(names)):
            name = names[position]
            of_directory = name in (".", "..")
            entry = protocol.encode_directory_entry(
                ROOT if of_directory else protocol.UNKNOWN_NODE,
                position + 1,
                os.fsencode(name),
                of_directory,
            )
            if len(entries) + len(entry) > length:
                break
            entries += entry
        return entries

    def _listing(self) -> list[str]:
        return [".", "..", *sorted(set(self._nodes.files.names()))]

    def _releasedir(self, request: Request, body: memoryview) -> Body:
        self._listings.pop(protocol.decode_handle(body), None)
        return b""
