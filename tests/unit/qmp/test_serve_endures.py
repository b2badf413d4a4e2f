"""What a server goes through without harm: many rounds, bad clients, clients that die."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import FileMemory, RamBlock, SnapshotError, open_snapshot
from pyqmigrate.migration import Migration
from pyqmigrate.qmp import QmpServer, connection
from tests.harness.contents import Contents, fill
from tests.harness.covering import covering
from tests.harness.directories import descriptors
from tests.harness.machine import GuestRam
from tests.harness.qmp_server import RawClient
from tests.harness.serve import Driver, Serve
from tests.harness.snapshots import load

MIB = 1 << 20
AT_REST = {"completed", "failed", "cancelled"}


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as started:
        yield started


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(8 * MIB) as memory:
        fill(memory.memory, Contents.SPECKLED)
        yield memory


@pytest.fixture
def server(driver: Driver, ram: GuestRam) -> Iterator[Serve]:
    with Serve(driver, ram) as started:
        yield started


@contextlib.contextmanager
def raw_client(path: Path) -> Iterator[RawClient]:
    client = RawClient(path)
    try:
        yield client
    finally:
        client.close()


def value(client: RawClient, command: str, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
    """What a command returns; it must not fail."""
    for fd in fds:
        client.send(b" ", [fd])
    answer = client.execute(command, **arguments)
    assert "return" in answer, (command, answer)
    return answer["return"]


def refused(client: RawClient, command: str, **arguments: Any) -> None:
    assert "error" in client.execute(command, **arguments), command


def ended(client: RawClient, limit: float = 30) -> str:
    """How the migration ended."""
    deadline = time.monotonic() + limit
    while (status := value(client, "query-migrate").get("status")) not in AT_REST:
        assert time.monotonic() < deadline, status
        time.sleep(0.001)
    return str(status)


def capable(client: RawClient, **capabilities: bool) -> None:
    states = [{"capability": n.replace("_", "-"), "state": on} for n, on in capabilities.items()]
    value(client, "migrate-set-capabilities", capabilities=states)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def wait_until(condition: Callable[[], object], limit: float = 10) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- descriptors, round after round ---------------------------------------------------------


def lend(client: RawClient, path: Path, *members: int) -> None:
    for flags in members:
        with opened(path, flags) as fd:
            assert value(client, "add-fd", (fd,), fdset_id=1)["fdset-id"] == 1


def migrated(client: RawClient, uri: str) -> None:
    value(client, "migrate", uri=uri)
    assert ended(client) == "completed"
    value(client, "cont")


def through_a_fdset(client: RawClient, disk: Path) -> None:
    lend(client, disk / "lent", os.O_WRONLY, os.O_WRONLY | os.O_DIRECT)
    migrated(client, "file:/dev/fdset/1,offset=4096")
    value(client, "remove-fd", fdset_id=1)
    assert value(client, "query-fdsets") == []


def to_a_path_and_a_named_descriptor(client: RawClient, disk: Path) -> None:
    migrated(client, f"file:{disk}/path")
    with opened(disk / "named", os.O_WRONLY) as fd:
        value(client, "getfd", (fd,), fdname="named")
        value(client, "getfd", (fd,), fdname="named")  # the first one is closed
    capable(client, mapped_ram=False, multifd=False)  # which a descriptor by name cannot have
    migrated(client, "fd:named")
    capable(client, mapped_ram=True, multifd=True)


def cancelled(client: RawClient, disk: Path) -> None:
    lend(client, disk / "lent", os.O_WRONLY, os.O_WRONLY | os.O_DIRECT)
    value(client, "migrate-set-parameters", max_bandwidth=1)
    value(client, "migrate", uri="file:/dev/fdset/1")
    value(client, "remove-fd", fdset_id=1)  # what the migration has borrowed stays open
    value(client, "migrate_cancel")
    assert ended(client) == "cancelled"
    value(client, "migrate-set-parameters", max_bandwidth=0)
    assert value(client, "query-fdsets") == []


def failed(client: RawClient, disk: Path) -> None:
    refused(client, "migrate", uri=f"file:{disk}/nowhere/file")
    refused(client, "migrate", uri="file:/dev/fdset/99")
    refused(client, "migrate", uri="fd:nobody")
    lend(client, disk / "lent", os.O_WRONLY)  # and none with O_DIRECT
    refused(client, "migrate", uri="file:/dev/fdset/1")
    value(client, "remove-fd", fdset_id=1)
    # One that opens and cannot be written: it may not grow.
    small = os.memfd_create("small", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(small, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    value(client, "getfd", (small,), fdname="small")
    os.close(small)
    capable(client, mapped_ram=False, multifd=False)
    value(client, "migrate", uri="fd:small")
    assert ended(client) == "failed"
    capable(client, mapped_ram=True, multifd=True)


def handed_over_in_vain(client: RawClient, disk: Path) -> None:
    refused(client, "add-fd")
    with opened(disk / "lent", os.O_WRONLY) as fd:
        client.send(b" ", [fd, fd, fd])
        refused(client, "add-fd", fdset_id=-1)
        client.send(b" ", [fd])
        refused(client, "getfd", fdname="1st")
        value(client, "getfd", (fd,), fdname="named")
        value(client, "closefd", fdname="named")
        client.send(b" ", [fd])
        refused(client, "getfd", name="named")  # stays pending
        client.send(b" ", [fd])  # replaces it
        number = value(client, "add-fd")["fd"]
        value(client, "remove-fd", fdset_id=0, fd=number)
    refused(client, "remove-fd", fdset_id=0)


ROUND = (through_a_fdset, to_a_path_and_a_named_descriptor, cancelled, failed, handed_over_in_vain)
ROUNDS = covering([5, 1000], short=[5], timeout=1200)


def leak(path: Path, disk: Path, rounds: int, count: Callable[[], Any]) -> None:
    """Fails when ``count`` is another after the rounds; the first one does what is done once."""
    with raw_client(path) as client:
        capable(client, mapped_ram=True, multifd=True, events=True)
        value(client, "migrate-set-parameters", direct_io=True, max_bandwidth=0)
        for step in ROUND:
            step(client, disk)
        before = count()
        for _ in range(rounds):
            for step in ROUND:
                step(client, disk)
            client.events.clear()
        assert count() == before


@pytest.mark.parametrize("rounds", ROUNDS)
def test_rounds_of_everything_leave_a_server_with_as_many_descriptors(
    server: Serve, disk: Path, rounds: int
) -> None:
    leak(server.socket, disk, rounds, server.descriptors)


@contextlib.contextmanager
def embedded(ram: GuestRam, path: Path) -> Iterator[None]:
    """A server of this process, on a thread."""
    ready = threading.Event()
    end: Callable[[], object] = ready.set

    async def serve() -> None:
        nonlocal end
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        end = lambda: loop.call_soon_threadsafe(done.set)  # noqa: E731
        async with QmpServer(migration, migration.fdsets) as server:
            await server.listen(path)
            ready.set()
            await done.wait()

    migration = Migration([RamBlock("pc.ram", FileMemory(ram.fd))])
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        end()
        thread.join(20)
        migration.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.usefixtures("same_descriptors")
def test_rounds_of_everything_leave_an_embedding_program_with_the_same_descriptors(
    ram: GuestRam, disk: Path, tmp_path: Path, rounds: int
) -> None:
    with embedded(ram, tmp_path / "qmp"):
        leak(tmp_path / "qmp", disk, rounds, descriptors)


# ---- one client migrates while others do what they like -------------------------------------


def begin(client: RawClient, path: Path, bandwidth: int) -> None:
    """A save that takes its time."""
    capable(client, mapped_ram=True, multifd=True, events=True)
    value(client, "migrate-set-parameters", direct_io=True, max_bandwidth=bandwidth)
    client.events.clear()
    value(client, "migrate", uri=f"file:{path}")


def statuses(client: RawClient) -> list[str]:
    """Of all events that are there, up to the end of the migration."""
    found: list[str] = []
    while not found or found[-1] not in AT_REST:
        event = client.event()
        if event["event"] == "MIGRATION":
            found.append(event["data"]["status"])
    return found


def whole(path: Path, ram: GuestRam) -> bool:
    return load(path)["pc.ram"].tobytes() == ram.memory[:]


def private_bytes(pid: int) -> int:
    """Resident memory of a process that is its own: what it maps of the guest's is not."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not tell")


def test_a_second_client_sees_the_migration_of_the_first(
    server: Serve, ram: GuestRam, disk: Path
) -> None:
    with raw_client(server.socket) as first, raw_client(server.socket) as second:
        begin(first, disk / "out", 16 * MIB)
        seen = []
        while not seen or seen[-1]["status"] not in AT_REST:
            seen.append(value(second, "query-migrate"))
        moved = [s["ram"]["transferred"] for s in seen if s["status"] == "active"]
        assert moved == sorted(moved)
        assert len(set(moved)) > 2
        assert seen[-1]["status"] == "completed"
        expected = ["setup", "active", "device", "completed"]
        assert statuses(first) == statuses(second) == expected
    assert whole(disk / "out", ram)


def test_a_second_client_may_cancel_the_migration_of_the_first(server: Serve, disk: Path) -> None:
    with raw_client(server.socket) as first, raw_client(server.socket) as second:
        begin(first, disk / "out", MIB)
        refused(second, "migrate", uri=f"file:{disk}/other")
        value(second, "migrate_cancel")
        # It may come before the first page.
        told = [status for status in statuses(first) if status != "active"]
        assert told == ["setup", "cancelling", "cancelled"]
    assert list(disk.iterdir()) == []


def send_all(client: RawClient, data: bytes) -> None:
    """Send as much as the server takes; it may hang up, or take no more."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
        client.send(data)


def one_long_string(client: RawClient) -> None:
    send_all(client, b'{"execute": "' + b"x" * (80 * MIB) + b'"}')


def many_small_values(client: RawClient) -> None:
    send_all(client, b'{"execute": [' + b"1," * (MIB + 1) + b"1]}")


def deep_nesting(client: RawClient) -> None:
    client.sock.settimeout(0.3)
    for _ in range(20):
        send_all(client, b"[" * 100_000 + b"\xff")


def answers_that_nobody_reads(client: RawClient) -> None:
    client.sock.settimeout(0.3)
    send_all(client, b'{"execute": "query-commands"}' * 100_000)


def a_large_answer_that_nobody_reads(client: RawClient) -> None:
    client.sock.settimeout(2)
    send_all(client, b'{"execute": "query-status", "id": "' + b"\xc3\xa9" * (10 * MIB) + b'"}')


BAD = [  # and how many at once
    (one_long_string, 2),
    pytest.param(many_small_values, 1, marks=pytest.mark.long),
    (deep_nesting, 2),
    (answers_that_nobody_reads, 2),
    (a_large_answer_that_nobody_reads, 2),
]


@pytest.mark.parametrize(
    ("misbehave", "count"), BAD, ids=lambda bad: getattr(bad, "__name__", None)
)
def test_bad_clients_neither_hurt_the_migration_of_another_nor_grow_the_server(
    server: Serve, ram: GuestRam, disk: Path, misbehave: Callable[[RawClient], None], count: int
) -> None:
    pid = server.process.pid
    with raw_client(server.socket) as good:
        value(good, "query-status")
        before = most = private_bytes(pid)
        with contextlib.ExitStack() as stack:
            begin(good, disk / "out", 4 * MIB)  # about a second and a half
            threads = []
            for _ in range(count):
                bad = stack.enter_context(raw_client(server.socket))
                threads.append(threading.Thread(target=misbehave, args=[bad]))
                threads[-1].start()
            slowest = 0.0
            while any(thread.is_alive() for thread in threads):
                asked = time.monotonic()
                value(good, "query-migrate")
                slowest = max(slowest, time.monotonic() - asked)
                most = max(most, private_bytes(pid))
                time.sleep(0.002)
            assert slowest < 10
            # Messages of up to 64 MiB are kept while they come; an answer is as long as its id.
            assert most - before < 2 * 5 * 64 * MIB
            assert statuses(good) == ["setup", "active", "device", "completed"]
        assert value(good, "query-migrate")["total-time"] < 30_000
        # What they brought is let go; the allocator keeps some of what it had, once.
        wait_until(lambda: private_bytes(pid) - before < 64 * MIB)
    assert whole(disk / "out", ram)


def test_a_large_answer_is_not_kept_for_a_client_that_takes_none_of_it(
    ram: GuestRam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_PATIENCE", 0.3)
    with embedded(ram, tmp_path / "qmp"), raw_client(tmp_path / "qmp") as stalled:
        question = b'{"execute": "query-status", "id": "' + b"x" * (6 * MIB) + b'"}'
        assert len(json.dumps(stalled.ask(question))) > 6 * MIB  # one that reads gets it all
        stalled.send(question)
        time.sleep(1.5)
        received = 0
        while data := stalled.sock.recv(MIB):
            received += len(data)
        assert received < 4 * MIB


# ---- clients that die -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b" ", b'{"execute": "add', b'{"execute": "add-fd"}{"exec', b'{"id": "' + b"x" * 9999]
)
def test_a_client_that_dies_with_descriptors_pending_leaks_none(
    server: Serve, disk: Path, said: bytes
) -> None:
    with raw_client(server.socket) as other, opened(disk / "lent", os.O_WRONLY) as fd:
        before = server.descriptors()
        for _ in range(20):
            client = RawClient(server.socket)
            client.send(said, [fd] * 5)
            client.close()
        wait_until(lambda: server.descriptors() == before + len(value(other, "query-fdsets")))
        for fdset in value(other, "query-fdsets"):
            value(other, "remove-fd", fdset_id=fdset["fdset-id"])
        assert server.descriptors() == before


def test_a_client_that_dies_before_it_reads_its_answers_leaks_nothing(
    server: Serve, disk: Path
) -> None:
    with raw_client(server.socket) as other, opened(disk / "lent", os.O_WRONLY) as fd:
        before = server.descriptors()
        for _ in range(20):
            client = RawClient(server.socket)
            client.send(b'{"execute": "query-commands"}' * 200, [fd])
            client.close()
        wait_until(lambda: server.descriptors() == before)
        assert value(other, "query-fdsets") == []


def test_a_migration_outlives_the_client_that_began_it(
    server: Serve, ram: GuestRam, disk: Path
) -> None:
    with raw_client(server.socket) as client:
        lend(client, disk / "out", os.O_WRONLY, os.O_WRONLY | os.O_DIRECT)
        capable(client, mapped_ram=True, multifd=True)
        value(client, "migrate-set-parameters", direct_io=True, max_bandwidth=16 * MIB)
        value(client, "migrate", uri="file:/dev/fdset/1")
        client.send(b'{"execute": "query-mig')
    with raw_client(server.socket) as client:
        assert ended(client) == "completed"
    assert whole(disk / "out", ram)


# ---- a server that is killed ----------------------------------------------------------------

HEADER = b"X" * 4096
PLACES = {
    "path": ("file:{path}", 0),
    "offset": ("file:{path},offset=4096", 4096),
    "fdset": ("file:/dev/fdset/1", 0),
    "fdset-offset": ("file:/dev/fdset/1,offset=4096", 4096),
}


def start_slowly(client: RawClient, path: Path, place: str, bandwidth: int) -> None:
    """A save that has written some of its pages when this returns, unless it has no limit."""
    uri, _ = PLACES[place]
    capable(client, mapped_ram=True, multifd=True, events=True)
    value(client, "migrate-set-parameters", direct_io=True, max_bandwidth=bandwidth)
    if "fdset" in uri:
        lend(client, path, os.O_WRONLY, os.O_WRONLY | os.O_DIRECT)
    value(client, "migrate", uri=uri.format(path=path))
    if bandwidth:
        wait_until(lambda: "transferred" in value(client, "query-migrate").get("ram", {}))
        wait_until(lambda: value(client, "query-migrate")["ram"]["normal"] > 0)


def target_of(path: Path, offset: int) -> str:
    return f"file:{path},offset={offset}" if offset else str(path)


@pytest.mark.parametrize("place", PLACES)
def test_a_server_killed_amid_a_save_leaves_what_is_not_a_snapshot_and_can_be_saved_over(
    driver: Driver, ram: GuestRam, disk: Path, place: str
) -> None:
    path, offset = disk / "out", PLACES[place][1]
    if offset:
        path.write_bytes(HEADER)
    with Serve(driver, ram) as server:
        with raw_client(server.socket) as client:
            start_slowly(client, path, place, 4 * MIB)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    if place == "path":
        assert list(disk.iterdir()) == []
    else:
        with path.open("rb") as file:
            assert file.read(offset) == HEADER[:offset]
            assert file.read(4) == bytes(4)  # the magic is written last
        assert path.stat().st_blocks * 512 > 2 * len(HEADER)  # and pages were written
        with pytest.raises(SnapshotError), open_snapshot(target_of(path, offset)):
            pass
    with Serve(driver, ram) as server, raw_client(server.socket) as client:
        start_slowly(client, path, place, 0)
        assert ended(client) == "completed"
    assert load(target_of(path, offset))["pc.ram"].tobytes() == ram.memory[:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("place", PLACES)
def test_a_server_ended_by_a_signal_cancels_its_save_and_cleans_up(
    driver: Driver, ram: GuestRam, disk: Path, place: str, number: signal.Signals
) -> None:
    path, offset = disk / "out", PLACES[place][1]
    if offset:
        path.write_bytes(HEADER)
    with Serve(driver, ram) as server, raw_client(server.socket) as client:
        start_slowly(client, path, place, 4 * MIB)
        client.events.clear()
        assert server.end(number, limit=5) == 0
        assert statuses(client) == ["cancelling", "cancelled"]
        assert client.line() is None
        assert not server.socket.exists()
        assert "Traceback" not in server.stderr()
    if place == "path":
        assert list(disk.iterdir()) == []
    else:
        with path.open("rb") as file:
            assert file.read(offset + 4) == HEADER[:offset] + bytes(4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_server_without_a_save_ends_at_once_by_a_signal(
    server: Serve, number: signal.Signals
) -> None:
    with raw_client(server.socket):
        assert server.end(number, limit=5) == 0
        assert not server.socket.exists()
