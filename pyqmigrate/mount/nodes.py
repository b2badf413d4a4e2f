"""Nodes: the numbers by which the kernel calls the files of a mount, and the open files behind them.

A number belongs to one name and one content for as long as the mount lives. If another snapshot gets
the name, it gets another number, and who has the old file open continues to read the old one. The
keeper keeps the table, and which files programs have open: a new worker gets both. It opens these files
at once, so that no store removes them, and the others as they are used.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pyqmigrate.errors import PyqmigrateError, TargetError, UsageError
from pyqmigrate.io.plain_file import HeldFile, PlainFile
from pyqmigrate.mount.files import COMPANIONS, BytesFile, ShownFiles
from pyqmigrate.mount.protocol import ROOT

__all__ = ["Node", "Nodes"]

_IDLE_MAX = 16  # files that stay open without a user
_EXTENTS_MAX = 4096  # looked at for the allocated size


@dataclass(frozen=True)
class Node:
    """A file of the mount. ``suffix`` is that of a companion of the file ``base``, or empty.

    ``size`` and ``allocated`` in bytes. ``identity`` is that of the base (:class:`ShownFiles`), and
    ``digest`` that of the content of a companion.
    """

    number: int
    base: str
    suffix: str
    identity: str
    digest: str
    size: int
    allocated: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.base + self.suffix

    @property
    def content(self) -> tuple[str, str, str]:
        """Return what no two nodes have in common."""
        return self.name, self.identity, self.digest


class _OpenFile:
    """The file of a node. ``opens`` of the kernel and ``users`` in this process keep it open."""

    def __init__(self, file: PlainFile | None = None) -> None:
        self.file = file
        self.opens = 0
        self.users = 0
        self.let_go = False  # a store may remove it: it is held again before its next use
        self.opening = threading.Lock()


class Nodes:
    """The table of a worker. ``announce`` is called with each new node before its first use.

    ``opens`` is how often the kernel has opened each node, by its number, when an earlier worker served;
    ``count_opens`` is called with a number and its new count.
    """

    def __init__(
        self,
        files: ShownFiles,
        known: Iterable[Node],
        announce: Callable[[Node], None],
        *,
        opens: Mapping[int, int] | None = None,
        count_opens: Callable[[int, int], object] = lambda number, count: None,
    ) -> None:
        self.files = files
        self._announce = announce
        self._count_opens = count_opens
        self._lock = threading.Lock()
        self._by_number = {node.number: node for node in known}
        self._by_content = {node.content: node for node in self._by_number.values()}
        self._next = max(self._by_number, default=ROOT) + 1
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()  # the one used last is at the end
        self._adding: dict[str, threading.Lock] = {}
        for number, count in (opens or {}).items():
            self._files[number] = _OpenFile()
            self._files[number].opens = count

    def reopen(self, report: Callable[[str], object]) -> None:
        """Open the files that the kernel has open since an earlier worker, so that no store removes them.

        ``report`` is called with a message for each that cannot be opened.
        """
        with self._lock:
            numbers = [number for number, entry in self._files.items() if entry.opens]
        for number in numbers:
            try:
                self.acquire(number)
                self.release(number)
            except (OSError, PyqmigrateError) as error:
                report(f"{self.get(number).name} is open, but cannot be opened again: {error}")

    def get(self, number: int) -> Node:
        """Return a node. Raises TargetError (ESTALE) for a number that was never given."""
        try:
            return self._by_number[number]
        except KeyError:
            raise TargetError(errno.ESTALE, f"no file has the number {number}") from None

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of all files that have had this name, the newest first."""
        with self._lock:
            found = [node.number for node in self._by_number.values() if node.name == name]
        return sorted(found, reverse=True)

    def find(self, name: str) -> Node | None:
        """Return the node of the file that has this name now; None if there is none."""
        identity = self.files.identity(name)
        if identity is not None:
            known = self._of_content(name, identity, "")
            if known is not None:
                return known
            with self._lock:
                adding = self._adding.setdefault(name, threading.Lock())
            with adding:  # a file is not opened twice
                return self._of_content(name, identity, "") or self._add(name, "", identity, "")
        for suffix in COMPANIONS:
            base = self.find(name[: -len(suffix)]) if name.endswith(suffix) else None
            if base is not None and not base.suffix:
                return self._companion(base, suffix)
        return None

    def acquire(self, number: int) -> PlainFile:
        """Return the file of a node, for use until :meth:`release`; open it if it is not.

        Raises TargetError: ESTALE if another file has its name by now.
        """
        node = self.get(number)
        with self._lock:
            entry = self._files.get(number)
            if entry is None:
                entry = self._files[number] = _OpenFile()
            entry.users += 1
            file = None if entry.let_go else entry.file
        if file is not None:
            return file
        try:
            with entry.opening:
                if entry.let_go and isinstance(entry.file, HeldFile) and not entry.file.hold():
                    gone, entry.file = entry.file, None
                    gone.close()
                entry.let_go = False
                if entry.file is None:
                    entry.file = self._open(node)
                return entry.file
        except BaseException:
            self.release(number)
            raise

    def release(self, number: int) -> None:
        """End the use of a file."""
        with self._lock:
            entry = self._files[number]
            entry.users -= 1
            if entry.opens > 0 or entry.users > 0:
                return
            self._files.move_to_end(number)
            unused = self._take_unused()
        for file in unused:
            file.close()
        self._let_go(entry)

    def _let_go(self, entry: _OpenFile) -> None:
        """Let a file without a user be removed, which is kept open for the next one."""
        if not isinstance(entry.file, HeldFile):
            return
        with entry.opening:
            with self._lock:
                entry.let_go = not (entry.opens or entry.users)
            if entry.let_go:
                entry.file.let_go()

    def count_open(self, number: int) -> None:
        """Keep the file of a node open until :meth:`count_close`."""
        self.acquire(number)
        with self._lock:
            entry = self._files[number]
            entry.opens += 1
            self._count_opens(number, entry.opens)
        self.release(number)

    def count_read(self, number: int) -> None:
        """Keep the file that is in use open: the kernel reads it, so a program has it open.

        An earlier worker may have been killed before it counted that.
        """
        entry = self._files[number]
        if not entry.opens:
            with self._lock:
                entry.opens = max(entry.opens, 1)
                self._count_opens(number, entry.opens)

    def count_close(self, number: int) -> None:
        """Take back a :meth:`count_open`."""
        with self._lock:
            entry = self._files.get(number)
            if entry is None:
                return
            entry.opens = max(entry.opens - 1, 0)
            self._count_opens(number, entry.opens)
            entry.users += 1
        self.release(number)

    def _of_content(self, name: str, identity: str, digest: str) -> Node | None:
        with self._lock:
            return self._by_content.get((name, identity, digest))

    def _add(
        self, base: str, suffix: str, identity: str, digest: str, file: PlainFile | None = None
    ) -> Node:
        """Open the file of a new node, unless ``file`` is it, and return the node."""
        if file is None:
            file = self.files.open(base)
        try:
            allocated = _allocated(file)
            with self._lock:
                node = self._by_content.get((base + suffix, identity, digest))
                if node is None:
                    about = (file.size, allocated, file.mtime_ns)
                    node = Node(self._next, base, suffix, identity, digest, *about)
                    self._announce(node)
                    self._next += 1
                    self._by_number[node.number] = node
                    self._by_content[node.content] = node
                    self._files[node.number], file = _OpenFile(file), None
                unused = self._take_unused()
                entry = self._files.get(node.number)
        finally:
            if file is not None:
                file.close()
        for other in unused:
            other.close()
        if entry is not None:
            self._let_go(entry)
        return node

    def _companion(self, base: Node, suffix: str) -> Node | None:
        content = self._companion_content(base, suffix)
        if content is None:
            return None
        digest = _digest(content)
        known = self._of_content(base.name + suffix, base.identity, digest)
        return known or self._add(
            base.name, suffix, base.identity, digest, BytesFile(content, base.mtime_ns)
        )

    def _companion_content(self, base: Node, suffix: str) -> bytes | None:
        file = self.acquire(base.number)
        try:
            return file.companions.get(suffix)
        finally:
            self.release(base.number)

    def _open(self, node: Node) -> PlainFile:
        if self.files.identity(node.base) == node.identity:
            try:
                file = self.files.open(node.base)
            except (TargetError, UsageError) as error:  # UsageError: the store does not have it
                if isinstance(error, TargetError) and error.errno != errno.ENOENT:
                    raise
                raise _stale(node) from error
            if not node.suffix:
                return file
            try:
                content = file.companions.get(node.suffix)
            finally:
                file.close()
            if content is not None and _digest(content) == node.digest:
                return BytesFile(content, node.mtime_ns)
        raise _stale(node)

    def _take_unused(self) -> list[PlainFile]:
        """Remove the files without a user that have been unused for longest; return them."""
        idle = [
            number for number, entry in self._files.items() if not entry.opens and not entry.users
        ]
        removed = [self._files.pop(number) for number in idle[: max(len(idle) - _IDLE_MAX, 0)]]
        return [entry.file for entry in removed if entry.file is not None]


def _stale(node: Node) -> TargetError:
    return TargetError(errno.ESTALE, "it was removed, or is another file now", node.name)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _allocated(file: PlainFile) -> int:
    """Return the bytes outside of holes; from the 4096th extent on everything counts."""
    total = position = 0
    for _ in range(_EXTENTS_MAX):
        start = file.next_data(position) if position < file.size else None
        if start is None:
            return total
        position = min(file.next_hole(start), file.size)
        if position <= start:
            raise TargetError(errno.EIO, f"a hole at {position} that ends before {start}")
        total += position - start
    return total + file.size - position
