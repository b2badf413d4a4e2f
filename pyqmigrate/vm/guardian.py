"""Puts a guest back as it was found, when the process that was saving it is no more.

This is a program of its own, started by :mod:`pyqmigrate.vm.custody` as ``python -I -S
guardian.py PID``. On standard input it gets one line of JSON, the *finding*: how the guest was
found, and what is going to be changed. Then it waits. A second line means that all is well; if
process PID ends, or closes the pipe, without having said so, the guardian connects to the monitor
and does what :func:`put_back` says.

It imports nothing but the standard library: it must start fast, and work when nothing else does.
A finding has these keys:

=============  ====================================================================
monitor        path of the monitor's socket, absolute
token          in the names of the descriptors that were handed to QEMU
resume         whether the guest ran
capabilities   QEMU's capabilities that will have been changed: name to former state
parameters     the same for parameters
directory      where the snapshot was to be, absolute
file           number of an inherited descriptor of the unfinished file, or -1
=============  ====================================================================
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

__all__ = ["A_MOMENT", "PARTIAL", "Refused", "Step", "put_back"]

PARTIAL = ".partial"  # what the names of unfinished files end in
_PATIENCE = 600.0  # seconds, for the monitor to become free and the migration to end
_UNDER_WAY = {"setup", "active", "pre-switchover", "device", "cancelling", "failing", "wait-unplug"}
_MAY_BE_CANCELLED = {"active", "pre-switchover", "wait-unplug"}
_BETWEEN = {"finish-migrate", "save-vm"}
# Moments: QEMU's time slot for bandwidth; no news for so long; and after so many it must do.
_ONE_SLOT, _QUIET, _LONGEST_WAIT = 12, 3, 60
A_MOMENT = 0.01  # seconds
_CRAWL = {"max-bandwidth": 10_000, "downtime-limit": 0}
_STOPPED_BY_US = {"postmigrate", "paused"}

Step: TypeAlias = "tuple[str, dict[str, Any] | None] | None"


class Refused(Exception):
    """QEMU answered a command with an error."""


def put_back(finding: dict[str, Any], *, resume: bool | None = None) -> Generator[
    Step, Any, list[str]
]:
    """The commands that leave a guest as it was found: generator of (command, arguments).

    None in place of a command means to wait A_MOMENT. The result of each is to be sent in, an
    error thrown in as :class:`Refused`. Returns what could not be done. ``resume`` overrides
    whether the guest is to run.
    """
    trouble: list[str] = []
    yield from _end_migration(trouble)
    if finding["resume"] if resume is None else resume:
        yield from _attempt("cont", None, trouble)
    if finding["capabilities"]:
        entries = [{"capability": n, "state": s} for n, s in finding["capabilities"].items()]
        yield from _attempt("migrate-set-capabilities", {"capabilities": entries}, trouble)
    if finding["parameters"]:
        yield from _attempt("migrate-set-parameters", finding["parameters"], trouble)
    for entry in (yield "query-fdsets", None):
        if any(finding["token"] in member.get("opaque", "") for member in entry["fds"]):
            yield from _attempt("remove-fd", {"fdset-id": entry["fdset-id"]}, trouble)
    return trouble


def _end_migration(trouble: list[str]) -> Generator[Step, Any, None]:
    """No migration is under way any more, and the run state is not one in between.

    QEMU 10.0.2 dies now and then of a cancel that finds its channels being set up, or with pages
    that they have not begun with: it takes their bitmaps away first. So it is slowed down until
    the channels have nothing to do, and what cannot be slowed down is let come to its end.
    """
    slowed = cancelled = False
    while (info := (yield "query-migrate", None)).get("status") in _UNDER_WAY:
        status = info["status"]
        if status == "active" and not slowed:
            slowed = True
            yield from _attempt("migrate-set-parameters", _CRAWL, trouble)
            yield from _until_quiet()
        elif status in _MAY_BE_CANCELLED and not cancelled:
            cancelled = True
            yield from _attempt("migrate_cancel", None, trouble)
        yield None
    while (yield "query-status", None)["status"] in _BETWEEN:
        yield None


def _until_quiet() -> Generator[Step, Any, None]:
    """QEMU sends something every 100 ms, however slow it is told to be; then comes a pause."""
    sent: list[int] = []
    for _ in range(_LONGEST_WAIT):
        yield None
        info = yield "query-migrate", None
        if info.get("status") != "active":
            return
        sent.append(info.get("ram", {}).get("transferred", 0))
        latest = sent[_ONE_SLOT:]
        pause = latest[-_QUIET:]
        if latest and latest[0] != latest[-1] and pause == [latest[-1]] * _QUIET:
            return


def _attempt(
    command: str, arguments: dict[str, Any] | None, trouble: list[str]
) -> Generator[Step, Any, None]:
    try:
        if command == "cont" and (yield "query-status", None)["status"] not in _STOPPED_BY_US:
            return
        yield command, arguments
    except Refused as error:
        trouble.append(f"{command}: {error}")


class _Monitor:
    """The plainest QMP client there is. OSError or EOFError when QEMU is gone."""

    def __init__(self, path: str, deadline: float) -> None:
        self._deadline = deadline
        self._ids = itertools.count()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory, name = os.path.split(path)
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            self._socket.connect(f"/proc/self/fd/{fd}/{name}")  # a path of any length
        finally:
            os.close(fd)
        self._messages = self._read()
        next(self._messages)  # the greeting: comes when whoever else is there has left
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        identity = f"guardian-{next(self._ids)}"
        request = {"execute": command, "id": identity} | (
            {"arguments": arguments} if arguments else {}
        )
        self._socket.sendall(json.dumps(request).encode())
        for message in self._messages:
            if message.get("id") != identity:
                continue  # an event, or the answer to a command of the client before
            if "error" in message:
                raise Refused(message["error"]["desc"])
            return message["return"]
        raise EOFError

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> Iterator[dict[str, Any]]:
        received = b""
        while True:
            *lines, received = received.split(b"\n")
            yield from (json.loads(line) for line in lines)
            self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            received += data


def _rescue(finding: dict[str, Any]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            _put_back(finding, deadline)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            break  # QEMU is gone
        except (OSError, EOFError, ValueError, LookupError, Refused):
            time.sleep(0.2)
    with contextlib.suppress(OSError):
        _remove_partial(finding)


def _put_back(finding: dict[str, Any], deadline: float) -> None:
    monitor = _Monitor(finding["monitor"], deadline)
    steps = put_back(finding)
    try:
        step = next(steps)
        while time.monotonic() < deadline:
            step = _answer(monitor, steps, step)
    except StopIteration:
        pass
    finally:
        monitor.close()


def _answer(monitor: _Monitor, steps: Generator[Step, Any, list[str]], step: Step) -> Step:
    if step is None:
        time.sleep(A_MOMENT)
        return next(steps)
    try:
        result = monitor.execute(*step)
    except Refused as error:
        return steps.throw(error)
    return steps.send(result)


def _remove_partial(finding: dict[str, Any]) -> None:
    """A file that has a name already, but not its own."""
    if finding["file"] < 0 or not (info := os.fstat(finding["file"])).st_nlink:
        return
    with os.scandir(finding["directory"]) as entries:
        for entry in entries:
            if entry.name.endswith(PARTIAL) and entry.inode() == info.st_ino:
                os.unlink(entry.path)  # noqa: PTH108


def _all_is_well(pid: int) -> tuple[dict[str, Any] | None, bool]:
    """Wait; the finding, if one came, and whether its process ended well."""
    received = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    process, gone = -1, False
    try:
        # A child that the process forked may hold the pipe open for ever.
        process = os.pidfd_open(pid)
        poll.register(process, select.POLLIN)
    except ProcessLookupError:
        gone = True
    except OSError:
        pass  # a kernel without pidfds: the pipe alone has to tell
    while True:
        ready = {fd for fd, _ in poll.poll(0 if gone else None)}
        if 0 in ready:
            data = os.read(0, 65536)
            received += data
            lines = received.split(b"\n")
            if len(lines) > 2:
                return None, True
            if data:
                continue
        elif not gone and process not in ready:
            continue
        lines = received.split(b"\n")
        return (json.loads(lines[0]), False) if len(lines) == 2 else (None, False)


def _main() -> None:
    finding, well = _all_is_well(int(sys.argv[1]))
    if finding is not None and not well:
        _rescue(finding)


if __name__ == "__main__":
    _main()
