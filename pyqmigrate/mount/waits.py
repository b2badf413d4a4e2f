"""Who waits for what, and since when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyqmigrate.mount import protocol
from pyqmigrate.mount.board import Activity
from pyqmigrate.mount.nodes import Node
from pyqmigrate.mount.remembered import RememberedRequest

__all__ = ["LongWaits", "Wait", "waits_of"]

_LONG = 5.0  # seconds: a wait that is worth a message

_WORK = {
    protocol.READ: "read",
    protocol.LOOKUP: "lookup",
    protocol.GETATTR: "stat",
    protocol.OPEN: "open",
    protocol.OPENDIR: "list",
    protocol.READDIR: "list",
    protocol.LSEEK: "seek",
}


@dataclass(frozen=True)
class Wait:
    """A request without an answer.

    ``pid`` and ``command`` are of the process that waits; 0 and "" if the kernel reads ahead, or the
    process is in another PID namespace. ``file`` is empty for the directory. ``offset`` and ``length`` in bytes are
    those of a read, otherwise 0.
    """

    unique: int
    pid: int
    command: str
    work: str
    file: str
    offset: int
    length: int
    seconds: float


def waits_of(
    activities: Iterable[Activity],
    remembered: Iterable[RememberedRequest],
    nodes: Mapping[int, Node],
) -> list[Wait]:
    """Return the waits of the requests that a worker serves and that a keeper remembers, the longest
    first."""
    found = {activity.unique & ~protocol.RESENT: activity for activity in activities}
    for request, message, since_ns in remembered:
        unique = request.unique & ~protocol.RESENT
        offset = length = 0
        if request.operation == protocol.READ:
            with contextlib.suppress(protocol.BadRequest):
                _, offset, length = protocol.decode_range(message[protocol.HEADER_BYTES :])
        about = (unique, request.node, offset, since_ns, request.operation, length)
        found[unique] = Activity(*about, request.pid, request.uid)
    now = time.monotonic_ns()
    waits = [_wait(activity, nodes, now) for activity in found.values()]
    return sorted(waits, key=lambda wait: -wait.seconds)


class LongWaits:
    """The waits that became long, each of which is reported once."""

    def __init__(self) -> None:
        self._reported: set[int] = set()

    def new_messages(self, waits: Iterable[Wait]) -> list[str]:
        """Return a message for each of the ``waits``, all that there are now, that has become long."""
        found = [wait for wait in waits if wait.seconds >= _LONG]
        messages = [_message(wait) for wait in found if wait.unique not in self._reported]
        self._reported = {wait.unique for wait in found}
        return messages


def _message(wait: Wait) -> str:
    who = f"process {wait.pid} ({wait.command})" if wait.pid else "the kernel"
    return (
        f"{who} waits for {wait.file or 'the directory'} at file offset "
        f"{wait.offset:#x} since {wait.seconds:.0f} s"
    )


def _wait(activity: Activity, nodes: Mapping[int, Node], now: int) -> Wait:
    pid, command = _process_of(activity.pid)
    node = nodes.get(activity.node)
    return Wait(
        activity.unique & ~protocol.RESENT,
        pid,
        command,
        _WORK.get(activity.operation, f"operation {activity.operation}"),
        "" if node is None else node.name,
        activity.offset,
        activity.length,
        max(now - activity.started_ns, 0) / 1e9,
    )


def _process_of(thread: int) -> tuple[int, str]:
    """Return the process of a thread, and the name of its program; 0 and "" if it is not there."""
    if not thread:
        return 0, ""
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        process = int(fields["Tgid"])
        with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
            return process, file.read().rstrip("\n")
    return 0, ""
