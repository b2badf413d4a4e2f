"""Restores a guest after the process that was saving it was killed.

This is a program of its own, started by :mod:`pyqmigrate.vm.outgoing.transaction` as ``python -I -S
guardian.py PID SNAPSHOT`` (SNAPSHOT is there for people who read a list of processes). The socket
that is its standard input carries lines of JSON objects, which add up to the *journal*: how the
guest was found, and each step of the save, written before it is done. The line ``done`` dismisses
the guardian. If process PID ends or closes the socket without it, the guardian connects to the
monitor and runs :func:`rollback_steps`.

It imports the standard library only: it must start fast, and work when nothing else does. The keys
of a journal:

=============  ====================================================================
monitor        absolute path of the monitor's socket
pid            QEMU's process, or null if unknown
threads        the threads that it had when the save began; empty if unknown
snapshot       absolute path that the snapshot will have
token          marks the descriptors added to QEMU, and the unfinished file if it has
               a name
resume         whether the guest shall run
steps          a list of what the save has done: see :class:`Step`
capabilities   QEMU's capabilities that the save changes: name to former state
parameters     the same for parameters
directory      absolute path of the snapshot's directory
file           true once the unfinished file is open: its descriptor came with this line
disks          a list, empty without disk snapshots: objects of ``name``, ``node``
               (the overlay's), ``base`` (the node below), ``base_file``, ``file`` (the overlay
               as QEMU names it) and ``local_file`` (as this process does)
record         path of the VM's record, or ""
provisional    path of the record until the snapshot is published, or ""
=============  ====================================================================

If the snapshot was published before the process ended, its overlays stay and its record is
published too. Otherwise the overlays are committed into the files below. One that cannot be
committed is kept: it holds the guest's data. ``SNAPSHOT.left`` lists what could not be rolled back;
if that file exists, ``.left.1`` and so on is written.
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
from enum import StrEnum
from typing import Any, TypeAlias

__all__ = [
    "POLL_INTERVAL",
    "PARTIAL",
    "Busy",
    "Step",
    "Refused",
    "Command",
    "creation_of",
    "rollback_steps",
    "undo_disks",
]

PARTIAL = ".partial"  # suffix of unfinished files
_NAME_LEFT = 240  # bytes of a name before ".left" and a number: 255 are the limit
_LEFT_MAX = 1000
# Times in seconds.
POLL_INTERVAL = 0.01
_RESCUE_TIMEOUT = 600.0  # for the monitor to become free and the rollback to finish
_RETRY_INTERVAL = 0.2
_COMMIT_TIMEOUT = 60.0  # an overlay gets little data during one save
_RATE_SLOT = 0.12  # QEMU sends something in each slot of its rate limit, however low that is
_QUIET = 0.03  # this long without a byte: the channels are idle
_QUIET_TIMEOUT = 0.6
_REST_TIMEOUT = 5.0  # on a busy host, a channel may wait for a processor
_UNDER_WAY = {"setup", "active", "pre-switchover", "device", "cancelling", "failing", "wait-unplug"}
_POSTCOPY = {
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-recover-setup",
    "postcopy-device",
    "colo",
}
_CANCELLABLE = {"active", "pre-switchover", "wait-unplug"}
_BETWEEN = {"finish-migrate", "save-vm"}
_CRAWL = {"max-bandwidth": 10_000, "downtime-limit": 0}

Command: TypeAlias = "tuple[str, dict[str, Any] | None] | None"


class Step(StrEnum):
    """A journaled step of a save that has not been undone yet.

    Another client may take the same step at any time, so only the save's own steps are undone.
    """

    FDS = "fds"
    """Descriptors were added to QEMU."""
    SETTINGS = "settings"
    """Settings may have been changed."""
    DISKS = "disks"
    """Overlays may have been created, and disk snapshots taken."""
    STOPPED = "stopped"
    """The guest was stopped."""
    MIGRATING = "migrating"
    """A migration was started and may be active."""
    BACKGROUND = "background"
    """That migration is a background snapshot. The guest waits for it, so it is not slowed down."""
    MIGRATED = "migrated"
    """The migration has ended; if it completed, it left the guest in ``postmigrate``."""


class Refused(Exception):
    """QEMU answered a command with an error."""


class Busy(Exception):
    """Another client's migration is active; everything but the settings was rolled back."""


def rollback_steps(
    journal: dict[str, Any],
    *,
    resume: bool | None = None,
    published: bool = False,
    timeout: float | None = None,
) -> Generator[Command, Any, list[str]]:
    """Generate the commands that leave a guest as it was found, as (command, arguments).

    For None in place of a command, wait POLL_INTERVAL. Send in the result of each command, throw in
    an error as :class:`Refused`. Returns the errors. ``resume`` overrides whether the guest shall
    run. With ``published`` the guest keeps its overlays. Settings are not changed during another
    client's migration; if that has not ended after ``timeout`` seconds, Busy is raised.
    """
    errors: list[str] = []
    steps = set(journal["steps"])
    resume = journal["resume"] if resume is None else resume
    if resume and steps >= {Step.STOPPED, Step.BACKGROUND}:
        # Until QEMU can cancel it, it may touch all memory for a while.
        yield from _attempt("cont", None, errors, only_in={"paused"})
    if Step.MIGRATING in steps:
        yield from _end_migration(journal, errors, slow_down=Step.BACKGROUND not in steps)
    elif Step.MIGRATED in steps:
        yield from _wait_for_run_state()
    if resume:
        yield from _attempt("cont", None, errors, only_in=_stopped_by(steps))
    for entry in (yield "query-fdsets", None):
        if any(journal["token"] in member.get("opaque", "") for member in entry["fds"]):
            yield from _attempt("remove-fd", {"fdset-id": entry["fdset-id"]}, errors)
    if not published:
        yield from undo_disks(journal, errors)
    if Step.SETTINGS not in steps:
        return errors
    polls = None if timeout is None else _polls(timeout)
    while (yield "query-migrate", None).get("status") in _UNDER_WAY | _POSTCOPY:
        if polls is not None and (polls := polls - 1) < 0:
            raise Busy
        yield None
    if journal["capabilities"]:
        yield from _attempt("migrate-set-capabilities", _capabilities(journal), errors)
    if journal["parameters"]:
        yield from _attempt("migrate-set-parameters", journal["parameters"], errors)
    return errors


def _polls(seconds: float) -> int:
    return round(seconds / POLL_INTERVAL)


def _capabilities(journal: dict[str, Any]) -> dict[str, Any]:
    states = journal["capabilities"].items()
    return {"capabilities": [{"capability": name, "state": state} for name, state in states]}


def _stopped_by(steps: set[str]) -> set[str]:
    """Return the run states in which the save is what stopped the guest."""
    if steps & {Step.MIGRATING, Step.MIGRATED}:
        return {"postmigrate", "paused"}
    return {"paused"} if Step.STOPPED in steps else set()


def undo_disks(journal: dict[str, Any], errors: list[str]) -> Generator[Command, Any, None]:
    """Commit the overlays into the files below and remove them.

    QEMU is asked nothing if there are no disk snapshots. An overlay that QEMU does not use was
    created for a snapshot that was not taken.
    """
    _remove_record(journal)
    if not journal["disks"]:
        return
    if (yield "query-status", None)["status"] == "postmigrate":
        with contextlib.suppress(Refused):  # QEMU before 10.0: then the commit is refused
            yield "blockdev-set-active", {"active": True}
    nodes = {node.get("node-name") for node in (yield "query-named-block-nodes", {"flat": True})}
    for disk in journal["disks"]:
        try:
            yield from _end_creation(disk["node"], nodes)
            if disk["node"] in nodes:
                yield from _commit(disk["node"], disk["base"])
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(disk["local_file"])
        except Refused as error:
            errors.append(
                f"{_overlay_in_use(disk)}: undoing that failed ({error}); block-commit "
                f"{disk['node']} when the guest runs"
            )
        except OSError as error:
            errors.append(
                f"cannot remove {disk['file']} ({error.strerror}), which is no longer needed"
            )


def creation_of(node: str) -> tuple[str, str]:
    """Return the names of the job that creates the overlay of the node ``node``, and of the node of
    its file during that."""
    return f"create-{node}", f"{node}-file"


def _end_creation(overlay: str, nodes: set[str]) -> Generator[Command, Any, None]:
    """Wait for the end of an overlay's creation, and remove what is temporary."""
    name, node = creation_of(overlay)
    for _ in range(_polls(_COMMIT_TIMEOUT)):
        job = yield from _job(name)
        if job is None:
            break
        if job["status"] == "concluded":
            yield "job-dismiss", {"id": name}
            break
        yield None
    if node in nodes:
        yield "blockdev-del", {"node-name": node}


def _overlay_in_use(disk: dict[str, str]) -> str:
    return f"disk {disk['name']} goes on in {disk['file']} over {disk['base_file']}"


def _commit(node: str, base: str) -> Generator[Command, Any, None]:
    """Commit an overlay into the node below, and switch the guest to that."""
    name = f"undo-{node}"
    arguments = {"job-id": name, "device": node, "base-node": base, "auto-dismiss": False}
    if (yield from _job(name)) is None:  # a killed save may have started it
        yield "block-commit", arguments
    completing = False
    for _ in range(_polls(_COMMIT_TIMEOUT)):
        job = yield from _job(name)
        if job is None:
            raise Refused(f"the job {name} is gone")
        if job["status"] == "concluded":
            yield "job-dismiss", {"id": name}
            if "error" in job:
                raise Refused(job["error"])
            return
        if job["status"] == "ready" and not completing:
            completing = True
            yield "job-complete", {"id": name}
        yield None
    yield "job-cancel", {"id": name}  # the overlay still has everything
    raise Refused(f"the commit takes longer than {_COMMIT_TIMEOUT:g} s")


def _job(name: str) -> Generator[Command, Any, dict[str, Any] | None]:
    jobs = yield "query-jobs", None
    return next((job for job in jobs if job["id"] == name), None)


def _remove_record(journal: dict[str, Any]) -> None:
    """Remove the record of a snapshot that was not published, under its provisional name."""
    with contextlib.suppress(OSError):
        os.unlink(journal["provisional"])


def _publish_record(journal: dict[str, Any]) -> None:
    """Publish the prepared record of a snapshot that was published."""
    with contextlib.suppress(OSError):
        os.replace(journal["provisional"], journal["record"])
        directory = os.open(os.path.dirname(journal["record"]), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _end_migration(
    journal: dict[str, Any], errors: list[str], *, slow_down: bool
) -> Generator[Command, Any, None]:
    """Cancel the migration, or wait for its end, and for the run state that follows.

    QEMU 10.0.2 may crash when a cancel meets channels that are being set up or have pages left to
    send: it frees their bitmaps first. So the migration is slowed down until the channels are idle.
    What cannot be slowed down is left to complete. ``slow_down`` is False if there are no channels.
    """
    slowed, cancelled = not slow_down, False
    while (info := (yield "query-migrate", None)).get("status") in _UNDER_WAY:
        status = info["status"]
        if status == "active" and not slowed:
            slowed = True
            yield from _attempt("migrate-set-parameters", _CRAWL, errors)
            yield from _until_quiet(journal)
        elif status in _CANCELLABLE and not cancelled:
            cancelled = True
            yield from _attempt("migrate_cancel", None, errors)
        yield None
    yield from _wait_for_run_state()


def _wait_for_run_state() -> Generator[Command, Any, None]:
    while (yield "query-status", None)["status"] in _BETWEEN:
        yield None


def _until_quiet(journal: dict[str, Any]) -> Generator[Command, Any, None]:
    """Wait until the channels are idle: for a pause after QEMU sent something, which it does every 100
    ms at any rate limit, in which the channels' threads sleep."""
    slot, quiet = _polls(_RATE_SLOT), _polls(_QUIET)
    sent: list[int] = []
    pauses = 0
    for number in range(_polls(_REST_TIMEOUT)):
        yield None
        info = yield "query-migrate", None
        if info.get("status") != "active":
            return
        sent.append(info.get("ram", {}).get("transferred", 0))
        latest = sent[slot:]
        is_pause = bool(latest) and latest[0] != latest[-1]
        is_pause = is_pause and latest[-quiet:] == [latest[-1]] * quiet
        pauses += is_pause
        if pauses == 0 and number < _polls(_QUIET_TIMEOUT):
            continue
        if (is_pause or not pauses) and _new_threads_sleep(journal):
            return


def _new_threads_sleep(journal: dict[str, Any]) -> bool:
    """Return whether all threads that QEMU has started since the save began sleep.

    A channel with pages left to send runs, is ready to run, or writes (state R or D). On a busy host that can
    take longer than any pause in what QEMU has sent. True if it is not known.
    """
    pid, before = journal["pid"], set(journal.get("threads", ()))
    if pid is None or not before:
        return True
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return True
    return all(_sleeps(pid, thread) for thread in threads if thread not in before)


def _sleeps(pid: int, thread: int) -> bool:
    try:
        with open(f"/proc/{pid}/task/{thread}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("R", "D")
    except (OSError, IndexError):  # it has ended
        return True


def _attempt(
    command: str,
    arguments: dict[str, Any] | None,
    errors: list[str],
    *,
    only_in: set[str] | None = None,
) -> Generator[Command, Any, None]:
    """Run a command, if the run state is one of ``only_in``; note its error."""
    try:
        if only_in is not None and (yield "query-status", None)["status"] not in only_in:
            return
        yield command, arguments
    except Refused as error:
        errors.append(f"{command}: {error}")


class _Monitor:
    """A minimal QMP client. Raises OSError or EOFError when QEMU is gone."""

    def __init__(self, path: str, deadline: float) -> None:
        self._deadline = deadline
        self._ids = itertools.count()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        fd = os.open(path, os.O_PATH)
        try:
            self._socket.connect(f"/proc/self/fd/{fd}")  # a path of any length
        finally:
            os.close(fd)
        self._messages = self._read()
        next(self._messages)  # the greeting, once the client before has left
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        identity = f"guardian-{next(self._ids)}"
        request = {"execute": command, "id": identity} | (
            {"arguments": arguments} if arguments else {}
        )
        self._socket.sendall(json.dumps(request).encode())
        for message in self._messages:
            if message.get("id") != identity:
                continue  # an event, or a reply to the client before
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


def _rescue(journal: dict[str, Any], file: int, qemu: _QemuProcess) -> None:
    """Roll back; ``file`` is a descriptor of the unfinished file, -1 if that was not opened."""
    deadline = time.monotonic() + _RESCUE_TIMEOUT
    published = _is_published(journal, file)
    errors: list[str] | None = None
    while journal["steps"] and errors is None and time.monotonic() < deadline:
        try:
            errors = _roll_back(journal, deadline, published)
        except (FileNotFoundError, ConnectionRefusedError):
            if not qemu.is_running(unknown=False):
                break
            time.sleep(_RETRY_INTERVAL)  # the name of its socket may come back
        except (OSError, EOFError, ValueError, LookupError, Refused):
            time.sleep(_RETRY_INTERVAL)
    with contextlib.suppress(OSError):
        if (partial := _partial_file(journal)) is not None:
            os.unlink(partial)
    expired = time.monotonic() >= deadline
    if journal["steps"] and errors is None and qemu.is_running(unknown=expired):
        errors = _instructions(journal)
    if published:
        _publish_record(journal)
    else:
        _remove_record(journal)
    overlays = [] if published else _overlays_left(journal)
    with contextlib.suppress(OSError):
        _write_left(journal["snapshot"], [*(errors or []), *overlays])


class _QemuProcess:
    """A process, not mistaken for another one that gets its number later."""

    def __init__(self, pid: int | None) -> None:
        self._gone = False
        self._fd: int | None = None
        try:
            self._fd = None if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone = True
        except OSError:
            pass  # a kernel without pidfds

    def is_running(self, *, unknown: bool) -> bool:
        """Return whether it runs; ``unknown`` if that cannot be determined."""
        if self._gone or self._fd is None:
            return unknown and not self._gone
        return not select.select([self._fd], [], [], 0)[0]


def _roll_back(journal: dict[str, Any], deadline: float, published: bool) -> list[str] | None:
    """Return the errors, or None if ``deadline`` passed before the end."""
    monitor = _Monitor(journal["monitor"], deadline)
    commands = rollback_steps(journal, published=published)
    try:
        command = next(commands)
        while time.monotonic() < deadline:
            command = _execute(monitor, commands, command)
    except StopIteration as end:
        errors: list[str] = end.value
        return errors
    finally:
        monitor.close()
    return None


def _execute(
    monitor: _Monitor, commands: Generator[Command, Any, list[str]], command: Command
) -> Command:
    """Run one command and return the next."""
    if command is None:
        time.sleep(POLL_INTERVAL)
        return next(commands)
    try:
        result = monitor.execute(*command)
    except Refused as error:
        return commands.throw(error)
    return commands.send(result)


def _instructions(journal: dict[str, Any]) -> list[str]:
    """Return sentences and commands for an administrator: the monitor could not be reached."""
    steps = set(journal["steps"])
    lines = [
        f"a save of this guest was killed, and monitor {journal['monitor']} of process "
        f"{journal['pid'] or 'unknown'} could not be reached for {_RESCUE_TIMEOUT:g} s; to restore "
        "the guest by hand:"
    ]
    if Step.MIGRATING in steps:
        lines.append("the save's migration may be active: query-migrate, migrate_cancel")
    if _stopped_by(steps):
        state = "run (cont)" if journal["resume"] else "stay paused"
        lines.append(f"the save may have paused the guest; it should {state}")
    if Step.SETTINGS in steps:
        capabilities = _capabilities(journal) if journal["capabilities"] else {}
        for command, arguments in (
            ("migrate-set-capabilities", capabilities),
            ("migrate-set-parameters", journal["parameters"]),
        ):
            if arguments:
                lines.append(json.dumps({"execute": command, "arguments": arguments}))
    if Step.FDS in steps:
        lines.append(f"fdsets may have descriptors named {journal['token']}: remove-fd")
    return lines


def _overlays_left(journal: dict[str, Any]) -> list[str]:
    return [
        f"{_overlay_in_use(disk)}: if QEMU has ended, start it with that file"
        for disk in journal["disks"]
        if os.path.lexists(disk["local_file"]) or os.path.lexists(disk["file"])
    ]


def _write_left(snapshot: str, lines: list[str]) -> None:
    """Write ``SNAPSHOT.left``, always as a new file: one that exists may belong to another program
    or be an earlier guardian's."""
    if not lines:
        return
    directory, name = os.path.split(snapshot)
    name = os.fsdecode(os.fsencode(name)[:_NAME_LEFT])
    for number in range(_LEFT_MAX):
        path = f"{directory}/{name}.left" + (f".{number}" if number else "")
        with contextlib.suppress(FileExistsError):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            break
    else:
        return
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _is_published(journal: dict[str, Any], file: int) -> bool:
    """Return whether the snapshot has its final name."""
    try:
        return file >= 0 and os.fstat(file).st_nlink > 0 and _partial_file(journal) is None
    except OSError:
        return False


def _partial_file(journal: dict[str, Any]) -> str | None:
    """Return the path of the unfinished file, if it has a provisional name."""
    with os.scandir(journal["directory"]) as entries:
        for entry in entries:
            if entry.name.endswith(f".{journal['token']}{PARTIAL}"):
                return str(entry.path)
    return None


def _read_journal(pid: int) -> tuple[dict[str, Any], int, _QemuProcess] | None:
    """Read the journal until process ``pid`` ends.

    Returns the journal, the descriptor of the unfinished file or -1, and QEMU; None if the process
    wrote ``done``, or nothing.
    """
    received = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    process, gone = -1, False
    try:
        # A child that the process forked may hold the socket open for ever.
        process = os.pidfd_open(pid)
        poll.register(process, select.POLLIN)
    except ProcessLookupError:
        gone = True
    except OSError:
        pass  # a kernel without pidfds: the socket's end has to be enough
    journal: dict[str, Any] = {}
    file, qemu = -1, _QemuProcess(None)
    channel = socket.socket(fileno=0)
    while True:
        ready = {fd for fd, _ in poll.poll(0 if gone else None)}
        if 0 in ready:
            try:
                data, fds, _, _ = socket.recv_fds(channel, 65536, 1)
            except ConnectionError:  # it was killed
                data, fds = b"", []
            file = fds[0] if fds else file
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                if line == b"done":
                    return None
                if not journal:
                    qemu = _QemuProcess(json.loads(line)["pid"])
                journal |= json.loads(line)
            if data:
                continue
        elif not gone and process not in ready:
            continue
        return (journal, file, qemu) if journal else None


def _main() -> None:
    left = _read_journal(int(sys.argv[1]))
    if left is not None:
        _rescue(*left)


if __name__ == "__main__":
    _main()
