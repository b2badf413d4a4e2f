"""The guardian: how it rolls a save back, and when it does nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.vm.outgoing import guardian

TOKEN = "pyqmigrate-token"
JOURNAL: dict[str, Any] = {
    "monitor": "",
    "pid": None,
    "snapshot": "/nowhere/snapshot",
    "token": TOKEN,
    "resume": True,
    "steps": ["fds", "settings", "stopped", "migrating"],
    "capabilities": {"mapped-ram": False},
    "parameters": {"max-bandwidth": 7},
    "directory": "/",
    "file": False,
    "disks": [],
    "record": "",
    "provisional": "",
}


class Machine:
    """A fake QEMU, as far as the guardian needs it; ``refuses`` are commands that fail."""

    def __init__(
        self,
        migration: str = "completed",
        state: str = "postmigrate",
        refuses: tuple[str, ...] = (),
    ) -> None:
        self.migration = migration
        self.state = state
        self.refuses = refuses
        self.fdsets = {0: "another client's", 1: f"{TOKEN} buffered"}
        self.executed: list[str] = []
        self.patience = 200
        self.transferred = 0
        self.slow = False
        self.still = 0
        self.has_channels = True
        self.nodes = {"base"}
        self.jobs: list[dict[str, str]] = []

    def do(self, command: str, arguments: dict[str, Any] | None) -> Any:
        if not command.startswith("query"):
            self.executed.append(command)
        if command in self.refuses:
            raise guardian.Refused("no")
        match command:
            case "query-migrate":
                return {"status": self.migration, "ram": {"transferred": self.transferred}}
            case "query-status":
                return {"status": self.state}
            case "query-fdsets":
                return [
                    {"fdset-id": n, "fds": [{"fd": 9, "opaque": o}]} for n, o in self.fdsets.items()
                ]
            case "migrate_cancel":
                assert self.migration in ("active", "pre-switchover"), "QEMU would die of it"
                quiet = self.migration != "active" or self.still > 1
                assert quiet or not self.has_channels, "QEMU would die of it"
                self.migration = "cancelling"
            case "migrate-set-parameters":
                assert arguments is not None
                self.slow = arguments["max-bandwidth"] > 7
            case "cont":
                self.state = "running"
            case "query-named-block-nodes":
                return [{"node-name": node} for node in self.nodes]
            case "query-jobs":
                return self.jobs
            case "blockdev-del":
                assert arguments is not None
                self.nodes.remove(arguments["node-name"])
            case "block-commit":
                assert arguments is not None
                self.jobs = [{"id": arguments["job-id"], "status": "ready"}]
            case "job-complete":
                self.jobs[0]["status"] = "concluded"
            case "job-dismiss":
                self.jobs = []
            case "remove-fd":
                assert arguments is not None
                del self.fdsets[arguments["fdset-id"]]
        return {}

    def wait(self) -> None:
        self.patience -= 1
        assert self.patience >= 0, "it waits in vain"
        self.still += 1
        if not self.slow or self.patience % 10 == 0:
            self.transferred, self.still = self.transferred + 1, 0
        if self.migration == "setup":
            self.migration = "active"
        elif self.migration == "device":
            self.migration, self.state = "completed", "postmigrate"
        elif self.migration == "cancelling":
            self.migration, self.state = "cancelled", "running"
        if self.state == "finish-migrate":
            self.state = "postmigrate"


def drive(machine: Machine, journal: dict[str, Any] = JOURNAL, **arguments: Any) -> list[str]:
    steps = guardian.rollback_steps(journal, **arguments)
    step = next(steps)
    try:
        while True:
            if step is None:
                machine.wait()
                step = next(steps)
                continue
            try:
                result = machine.do(*step)
            except guardian.Refused as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as end:
        return list(end.value)


def test_complete_migration_is_followed_by_cont_and_settings() -> None:
    machine = Machine()
    assert drive(machine) == []
    assert machine.executed == [
        "cont",
        "remove-fd",
        "migrate-set-capabilities",
        "migrate-set-parameters",
    ]


@pytest.mark.parametrize("status", ["setup", "active"])
def test_migration_under_way_is_slowed_down_and_cancelled_in_a_pause(status: str) -> None:
    machine = Machine(status, "running")
    drive(machine)
    assert machine.executed[:2] == ["migrate-set-parameters", "migrate_cancel"]
    assert machine.executed.count("migrate_cancel") == 1


@pytest.mark.parametrize("status", ["setup", "active"])
def test_background_snapshot_is_cancelled_at_full_speed(status: str) -> None:
    """The guest waits for the pages that it changes until it is cancelled."""
    machine = Machine(status, "running")
    machine.has_channels = False
    drive(machine, JOURNAL | {"steps": [*JOURNAL["steps"], "background"]})
    assert machine.executed[0] == "migrate_cancel"


@pytest.mark.parametrize("resume", [True, False])
def test_guest_stopped_for_a_background_snapshot_runs_before_that_is_cancelled(
    resume: bool,
) -> None:
    machine = Machine("setup", "paused")
    machine.has_channels = False
    journal = JOURNAL | {"steps": [*JOURNAL["steps"], "background"], "resume": resume}
    drive(machine, journal)
    assert machine.executed[: 1 + resume] == ["cont", "migrate_cancel"][1 - resume :]


@pytest.fixture
def thread() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is told to sleep; its one thread stands for a channel."""
    program = "import sys\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_migration_is_not_cancelled_while_a_channel_is_about_to_send(
    thread: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: on a busy host it waits for a processor."""
    machine = Machine("active", "running")
    machine.patience = 450
    asleep: list[bool] = []

    def sleeps(pid: int, number: int) -> bool:
        found = real(pid, number)
        asleep.append(found)
        if len(asleep) == 100:
            os.kill(pid, signal.SIGSTOP)  # state T: it does not write, either
        return found

    real = guardian._sleeps
    monkeypatch.setattr(guardian, "_sleeps", sleeps)
    assert drive(machine, {**JOURNAL, "pid": thread.pid, "threads": [1]}) == []
    assert len(asleep) > 100 and not any(asleep[:100]) and asleep[-1]
    assert "migrate_cancel" in machine.executed


def test_threads_that_qemu_had_before_are_not_waited_for(thread: subprocess.Popen[bytes]) -> None:
    machine = Machine("active", "running")
    assert drive(machine, {**JOURNAL, "pid": thread.pid, "threads": [thread.pid]}) == []
    assert "migrate_cancel" in machine.executed


def test_migration_that_waits_is_cancelled_at_once() -> None:
    machine = Machine("pre-switchover", "finish-migrate")
    drive(machine)
    assert machine.executed[0] == "migrate_cancel"


def test_last_phase_is_let_come_to_its_end() -> None:
    machine = Machine("device", "finish-migrate")
    drive(machine)
    assert "migrate_cancel" not in machine.executed
    assert machine.state == "running"


def test_guest_that_runs_is_not_told_to() -> None:
    machine = Machine("failed", "running")
    drive(machine)
    assert "cont" not in machine.executed


def test_state_in_between_is_waited_for() -> None:
    machine = Machine("completed", "finish-migrate")
    drive(machine)
    assert machine.state == "running"


@pytest.mark.parametrize("state", ["io-error", "shutdown", "internal-error"])
def test_guest_that_stopped_by_itself_stays_as_it_is(state: str) -> None:
    machine = Machine("completed", state)
    drive(machine)
    assert machine.state == state


def test_guest_that_is_to_stand_still_is_not_told_to_run() -> None:
    machine = Machine()
    drive(machine, resume=False)
    assert machine.state == "postmigrate"


def test_only_descriptors_of_our_own_are_removed() -> None:
    machine = Machine()
    drive(machine)
    assert list(machine.fdsets.values()) == ["another client's"]


def test_refusal_does_not_keep_it_from_the_rest() -> None:
    machine = Machine(refuses=("cont", "migrate-set-capabilities"))
    errors = drive(machine)
    assert errors == ["cont: no", "migrate-set-capabilities: no"]
    assert "migrate-set-parameters" in machine.executed


def having_done(*steps: str) -> dict[str, Any]:
    return {**JOURNAL, "steps": list(steps)}


@pytest.mark.parametrize("status", ["setup", "active", "pre-switchover"])
def test_migration_of_another_client_is_let_come_to_its_end(status: str) -> None:
    machine = Machine(status, "running")
    machine.wait = lambda: setattr(machine, "migration", "completed")  # type: ignore[method-assign]
    assert drive(machine, having_done("fds", "settings")) == []
    assert machine.executed == ["remove-fd", "migrate-set-capabilities", "migrate-set-parameters"]


def test_settings_are_not_changed_under_a_migration_of_another_client() -> None:
    machine = Machine("active", "running")
    with pytest.raises(guardian.Busy):
        drive(machine, having_done("fds", "settings"), timeout=0.03)
    assert machine.executed == ["remove-fd"]


def test_guest_that_another_client_migrated_away_does_not_run_again() -> None:
    machine = Machine("completed", "postmigrate")
    drive(machine, having_done("settings", "stopped"))
    assert machine.state == "postmigrate"


def test_guest_that_another_client_paused_stays_paused() -> None:
    machine = Machine("none", "paused")
    drive(machine, having_done("settings"))
    assert machine.state == "paused"


def test_guest_that_was_only_stopped_goes_on() -> None:
    machine = Machine("none", "paused")
    drive(machine, having_done("stopped"))
    assert machine.executed == ["cont", "remove-fd"]


def with_disk(directory: Path) -> dict[str, Any]:
    """Return a journal with an overlay, and a record under its provisional name."""
    overlay, record = directory / "overlay", directory / "snapshot.vm.json"
    overlay.touch()
    provisional = directory / ".snapshot.vm.json.1"
    provisional.write_text("new")
    disk = {
        "name": "disk",
        "node": "overlay",
        "base": "base",
        "base_file": "image",
        "file": str(overlay),
        "local_file": str(overlay),
    }
    return {
        **JOURNAL,
        "disks": [disk],
        "record": str(record),
        "provisional": str(provisional),
        "directory": str(directory),
        "snapshot": str(directory / "snapshot"),
    }


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_overlay_is_committed_into_its_base_when_there_is_no_snapshot(tmp_path: Path) -> None:
    machine = Machine()
    machine.nodes.add("overlay")
    assert drive(machine, with_disk(tmp_path)) == []
    assert machine.executed[2:5] == ["block-commit", "job-complete", "job-dismiss"]
    assert listed(tmp_path) == []


def test_overlay_that_a_refused_transaction_left_is_removed(tmp_path: Path) -> None:
    machine = Machine()
    assert drive(machine, with_disk(tmp_path)) == []
    assert "block-commit" not in machine.executed
    assert listed(tmp_path) == []


def test_creation_of_an_overlay_is_awaited_and_undone(tmp_path: Path) -> None:
    machine = Machine()
    machine.nodes.add("overlay-file")
    machine.jobs = [{"id": "create-overlay", "status": "concluded"}]
    assert drive(machine, with_disk(tmp_path)) == []
    assert machine.executed[2:4] == ["job-dismiss", "blockdev-del"]
    assert machine.jobs == [] and machine.nodes == {"base"}
    assert listed(tmp_path) == []


def test_commit_that_was_under_way_is_not_begun_again(tmp_path: Path) -> None:
    machine = Machine()
    machine.nodes.add("overlay")
    machine.jobs = [{"id": "undo-overlay", "status": "ready"}]
    assert drive(machine, with_disk(tmp_path)) == []
    assert "block-commit" not in machine.executed
    assert machine.jobs == []


@pytest.mark.parametrize("command", ["block-commit", "job-complete"])
def test_overlay_that_cannot_be_committed_stays(tmp_path: Path, command: str) -> None:
    machine = Machine(refuses=(command,))
    machine.nodes.add("overlay")
    (sentence,) = drive(machine, with_disk(tmp_path))
    assert f"goes on in {tmp_path}/overlay over image" in sentence
    assert listed(tmp_path) == ["overlay"]


def test_disks_of_a_published_snapshot_are_left_alone(tmp_path: Path) -> None:
    machine = Machine()
    machine.nodes.add("overlay")
    drive(machine, with_disk(tmp_path), published=True)
    assert "block-commit" not in machine.executed
    assert "overlay" in listed(tmp_path)


def test_record_of_the_save_before_is_left_alone(tmp_path: Path) -> None:
    journal = with_disk(tmp_path)
    (tmp_path / "snapshot.vm.json").write_text("old")
    drive(Machine(), journal)
    assert listed(tmp_path) == ["snapshot.vm.json"]
    assert (tmp_path / "snapshot.vm.json").read_text() == "old"


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[tuple[Path, Machine]]:
    """A QMP server in front of a Machine, for one client."""
    machine = Machine()
    path = tmp_path / "monitor"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rw") as stream:
            greeting: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
            event: dict[str, Any] = {"event": "STOP", "timestamp": {}}
            stream.write(json.dumps(greeting) + "\r\n")
            stream.flush()
            decoder = json.JSONDecoder()
            received = ""
            while data := connection.recv(4096):
                received += data.decode()
                while received:
                    request, end = decoder.raw_decode(received)
                    received = received[end:]
                    stale = {"return": {}, "id": "of the client before"}
                    reply: dict[str, Any] = {"id": request["id"]}
                    try:
                        reply["return"] = machine.do(request["execute"], request.get("arguments"))
                    except guardian.Refused as error:
                        reply["error"] = {"class": "GenericError", "desc": str(error)}
                    for message in (event, stale, reply):
                        stream.write(json.dumps(message) + "\r\n")
                    stream.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    yield path, machine
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


class Started:
    """The program, watching process ``pid``, and the socket for its journal."""

    def __init__(
        self, *lines: dict[str, Any] | str, pid: int | None = None, fds: tuple[int, ...] = ()
    ) -> None:
        self.socket, its = socket.socketpair()
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, str(pid or os.getpid()), "x"],
                stdin=its.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        for line in lines:
            text = line if isinstance(line, str) else json.dumps(line)
            self.socket.sendall(text.encode() + b"\n")
        if fds:
            socket.send_fds(self.socket, [b'{"file": true}\n'], fds)

    def ends_well(self) -> None:
        """Close the socket; the program ends without output."""
        self.socket.close()
        output, _ = self.process.communicate(timeout=20)
        assert (self.process.returncode, output) == (0, b"")


def test_dismissed_guardian_does_nothing(monitor: tuple[Path, Machine]) -> None:
    path, machine = monitor
    Started({**JOURNAL, "monitor": str(path)}, "done").ends_well()
    assert machine.executed == []


def test_closed_socket_without_dismissal_starts_the_rollback(monitor: tuple[Path, Machine]) -> None:
    path, machine = monitor
    Started({**JOURNAL, "monitor": str(path)}).ends_well()
    assert machine.state == "running"
    assert "migrate-set-parameters" in machine.executed


def test_end_of_the_process_is_enough_when_the_socket_stays_open(
    monitor: tuple[Path, Machine],
) -> None:
    """A child that it forked may hold the socket open."""
    path, machine = monitor
    watched = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Started({**JOURNAL, "monitor": str(path)}, pid=watched.pid)
    watched.communicate(b"\n")
    assert started.process.wait(20) == 0
    assert machine.state == "running"
    started.ends_well()


def test_journal_entries_replace_earlier_ones(monitor: tuple[Path, Machine]) -> None:
    path, machine = monitor
    entries = {"steps": ["stopped"], "resume": False}
    Started({**JOURNAL, "monitor": str(path)}, entries).ends_well()
    assert machine.executed == ["qmp_capabilities", "remove-fd"]


def test_qemu_that_was_not_touched_is_left_alone(monitor: tuple[Path, Machine]) -> None:
    path, machine = monitor
    Started({**having_done(), "monitor": str(path)}).ends_well()
    assert machine.executed == []


def test_process_that_ends_before_it_said_anything_needs_nothing() -> None:
    Started().ends_well()


def test_qemu_that_is_gone_ends_it_silently(tmp_path: Path) -> None:
    Started({**JOURNAL, "monitor": str(tmp_path / "gone")}).ends_well()


@pytest.mark.parametrize("told", [True, False], ids=["told", "just opened"])
def test_unfinished_file_loses_its_provisional_name(tmp_path: Path, told: bool) -> None:
    unfinished, other = tmp_path / f".a.{TOKEN}.partial", tmp_path / ".b.2.partial"
    other.touch()
    with unfinished.open("wb") as file:
        fds = (file.fileno(),) if told else ()
        Started({**having_done(), "directory": str(tmp_path)}, fds=fds).ends_well()
    assert not unfinished.exists()
    assert other.exists()


def test_finished_file_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    with path.open("wb") as file:
        journal = {**having_done(), "directory": str(tmp_path)}
        Started(journal, fds=(file.fileno(),)).ends_well()
    assert path.exists()


@pytest.mark.parametrize("named", [True, False], ids=["published", "unpublished"])
def test_killed_save_leaves_the_disks_that_its_snapshot_needs(
    monitor: tuple[Path, Machine], tmp_path: Path, named: bool
) -> None:
    path, machine = monitor
    machine.nodes.add("overlay")
    directory = tmp_path / "snapshots"
    directory.mkdir()
    snapshot = directory / "snapshot"
    with snapshot.open("wb") as file:
        if not named:
            snapshot.unlink()
        journal = {**with_disk(directory), "monitor": str(path)}
        Started(journal, fds=(file.fileno(),)).ends_well()
    assert ("block-commit" in machine.executed) is not named
    kept = ["overlay", "snapshot", "snapshot.vm.json"]
    assert listed(directory) == (kept if named else [])
    if named:
        assert (directory / "snapshot.vm.json").read_text() == "new"


def test_overlay_that_qemu_left_when_it_ended_is_written_down(tmp_path: Path) -> None:
    Started({**with_disk(tmp_path), "monitor": str(tmp_path / "gone")}).ends_well()
    assert listed(tmp_path) == ["overlay", "snapshot.left"]
    word = (tmp_path / "snapshot.left").read_text()
    assert f"disk disk goes on in {tmp_path}/overlay over image" in word


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process in place of QEMU's."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def out_of_reach(directory: Path, qemu: subprocess.Popen[bytes], *steps: str) -> dict[str, Any]:
    return {
        **having_done(*steps),
        "monitor": str(directory / "gone"),
        "pid": qemu.pid,
        "snapshot": str(directory / "snapshot"),
    }


def test_qemu_that_lives_without_the_name_of_its_socket_is_waited_for(
    monitor: tuple[Path, Machine], tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    path, machine = monitor
    hidden = path.rename(tmp_path / "hidden")
    started = Started({**JOURNAL, "monitor": str(path), "pid": sleeper.pid})
    started.socket.close()
    with pytest.raises(subprocess.TimeoutExpired):
        started.process.wait(0.5)
    hidden.rename(path)
    started.ends_well()
    assert machine.state == "running"


def test_qemu_that_ended_is_not_waited_for(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    started = Started(out_of_reach(tmp_path, sleeper, "stopped"))
    started.socket.close()
    sleeper.kill()
    started.ends_well()
    assert listed(tmp_path) == []


def test_guest_that_was_not_reached_is_written_down(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "_RESCUE_TIMEOUT", 0.3)
    journal = out_of_reach(tmp_path, sleeper, "settings", "stopped")
    guardian._rescue(journal, -1, guardian._QemuProcess(sleeper.pid))
    first, state, *commands = (tmp_path / "snapshot.left").read_text().splitlines()
    assert f"process {sleeper.pid}" in first and "gone" in first
    assert "it should run (cont)" in state
    assert [json.loads(command)["execute"] for command in commands] == [
        "migrate-set-capabilities",
        "migrate-set-parameters",
    ]
    assert json.loads(commands[1])["arguments"] == JOURNAL["parameters"]


def test_refused_rollback_is_written_down(monitor: tuple[Path, Machine], tmp_path: Path) -> None:
    path, machine = monitor
    machine.refuses = ("cont",)
    Started({**JOURNAL, "monitor": str(path), "snapshot": str(tmp_path / "snapshot")}).ends_well()
    assert (tmp_path / "snapshot.left").read_text() == "cont: no\n"


@pytest.mark.parametrize("there", ["file", "link", "fifo"])
def test_words_are_written_over_no_other_file(tmp_path: Path, there: str) -> None:
    place, letter = tmp_path / "snapshot.left", tmp_path / "letter"
    letter.write_text("dear reader")
    if there == "file":
        place.write_text("what an earlier one left")
    elif there == "link":
        place.symlink_to("letter")
    else:
        os.mkfifo(place)
    for word in ("first", "second"):
        guardian._write_left(str(tmp_path / "snapshot"), [word])
    assert (tmp_path / "snapshot.left.1").read_text() == "first\n"
    assert (tmp_path / "snapshot.left.2").read_text() == "second\n"
    assert letter.read_text() == "dear reader"
    assert there != "file" or place.read_text() == "what an earlier one left"


def test_words_are_written_beside_a_file_with_the_longest_name(tmp_path: Path) -> None:
    guardian._write_left(str(tmp_path / ("ü" * 127)), ["word"])
    (path,) = tmp_path.iterdir()
    assert path.name.endswith(".left")
    assert path.read_text() == "word\n"
