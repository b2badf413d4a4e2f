"""A pool's socket: whose guest is whose, and clients that misbehave. The pool has no QEMUs."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.vm.pool.protocol import LINE_MAX
from pyqmigrate.vm.pool.server import PoolServer
from tests.harness.pools import FakePool, PoolClient, until

PATIENCE = 30.0  # seconds


def serve(
    path: Path, work: Callable[[FakePool, Path], Any], *, keep: bool = False, open_gate: bool = True
) -> FakePool:
    """Run ``work`` in a thread, beside a server."""

    async def run() -> FakePool:
        pool = FakePool()
        if not open_gate:
            pool.gate.clear()
        async with PoolServer(pool, path, keep=keep):  # type: ignore[arg-type]
            async with asyncio.timeout(PATIENCE):
                await asyncio.to_thread(work, pool, path)
        return pool

    return asyncio.run(run())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.sock"


def test_client_takes_resets_and_ends_a_guest(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as client:
            guest = client.ask("take")["guest"]
            assert guest == {
                "number": 1,
                "pid": 1,
                "qmp": "/run/1.qmp",
                "run_state": "running",
                "mode": "instant",
                "sockets": [],
            }
            reply = client.ask("reset")
            assert (reply["ended"], reply["guest"]["number"]) == (1, 2)
            assert client.ask("status")["guests"] == [2]
            assert client.ask("end") == {"ended": 2}
            assert pool.taken == []

    serve(path, work)


def test_requests_that_are_sent_together_are_answered_in_order(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as client:
            client.send(
                b'{"command":"take","id":"a"}\n{"command":"reset","id":7}\n{"command":"end"}\n'
            )
            replies = [client.receive() for _ in range(3)]
        assert [reply.get("id") for reply in replies] == ["a", 7, None]
        assert [reply.get("ended") for reply in replies] == [None, 1, 2]

    serve(path, work)


def test_guest_of_another_client_cannot_be_ended_or_reset(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as one, PoolClient(path) as other:
            number = one.ask("take")["guest"]["number"]
            for command in ("end", "reset"):
                error = other.ask(command, number=number)["error"]
                assert error == {
                    "type": "UsageError",
                    "message": f"guest {number} is not one of this client's",
                }
            assert "this client has 0 guests" in other.ask("reset")["error"]["message"]
            assert [guest.number for guest in pool.taken] == [number]

    serve(path, work)


def test_one_of_several_guests_is_named_by_its_number(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as client:
            client.ask("take")
            client.ask("take")
            assert "this client has 2 guests" in client.ask("end")["error"]["message"]
            assert client.ask("end", number=2) == {"ended": 2}

    serve(path, work)


def test_guests_of_a_client_that_hangs_up_are_ended_and_no_others(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as other:
            kept = other.ask("take")["guest"]["number"]
            with PoolClient(path) as client:
                client.ask("take")
                client.ask("take")
            until(lambda: len(pool.taken) == 1, "the guests are not ended")
            assert [guest.number for guest in pool.taken] == [kept]

    serve(path, work)


def test_client_that_hangs_up_while_it_waits_gets_no_guest(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        client = PoolClient(path)
        client.send(b'{"command":"take"}\n')
        until(lambda: pool.waiting == 1, "it does not wait")
        client.close()
        until(lambda: pool.waiting == 0, "it waits for ever")

    assert serve(path, work, open_gate=False).guests == {}


def test_kept_guest_goes_on_and_any_client_may_end_it(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as client:
            client.ask("take")
            client.ask("take")
        with PoolClient(path) as other:
            until(lambda: other.ask("status")["kept"] == [1, 2], "they are not kept")
            assert other.ask("end", number=1) == {"ended": 1}
            assert other.ask("reset", number=2)["guest"]["number"] == 3
            assert other.ask("status")["guests"] == [3]

    assert [guest.number for guest in serve(path, work, keep=True).taken] == [3]


def test_kept_guest_whose_client_never_learned_of_it_is_ended(path: Path) -> None:
    gate: list[Callable[[], None]] = []

    async def run() -> FakePool:
        pool, loop = FakePool(), asyncio.get_running_loop()
        pool.gate.clear()
        gate.append(lambda: loop.call_soon_threadsafe(pool.gate.set))

        def work() -> None:
            client = PoolClient(path)
            client.send(b'{"command":"take"}\n')
            until(lambda: pool.waiting == 1, "it does not wait")
            client.close()
            gate[0]()
            until(lambda: bool(pool.guests), "there is no guest")
            until(lambda: not pool.taken, "it goes on")

        async with PoolServer(pool, path, keep=True):  # type: ignore[arg-type]
            await asyncio.to_thread(work)
        return pool

    assert asyncio.run(run()).taken == []


@pytest.mark.parametrize(
    "line", [b"\n", b"nonsense\n", b"[" * 3000 + b"\n", b"\xff\xfe\n", b'{"command":"rm -rf"}\n']
)
def test_bad_request_is_answered_and_the_next_one_served(path: Path, line: bytes) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as client:
            client.send(line)
            assert client.receive()["error"]["type"] == "UsageError"
            assert client.ask("take")["guest"]["number"] == 1

    serve(path, work)


def test_request_that_is_too_long_ends_the_connection_and_its_guests(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as client:
            client.ask("take")
            client.send(b"x" * (LINE_MAX + 1))
            assert f"at most {LINE_MAX} bytes" in client.receive()["error"]["message"]
            with pytest.raises((EOFError, ConnectionError)):
                client.receive()
            until(lambda: not pool.taken, "its guest goes on")

    serve(path, work)


def test_client_that_never_reads_makes_the_server_keep_little(path: Path) -> None:
    """The server stops reading its requests once its replies do not leave."""

    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as silent, PoolClient(path) as other:
            silent.socket.settimeout(1)
            sent = 0
            with pytest.raises(TimeoutError):
                while sent < 64 << 20:
                    sent += silent.socket.send(b'{"command":"status"}\n' * 1000)
            assert other.ask("take")["guest"]["number"] == 1

    serve(path, work)


def test_client_beyond_the_most_is_turned_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqmigrate.vm.pool.server._CLIENTS_MAX", 2)

    def work(pool: FakePool, path: Path) -> None:
        with PoolClient(path) as one, PoolClient(path) as two:
            one.ask("status")
            two.ask("status")
            with PoolClient(path) as three:
                assert "the pool has 2 clients" in three.receive()["error"]["message"]
            assert one.ask("take")["guest"]["number"] == 1

    serve(path, work)


def test_limit_of_the_pool_is_an_error_of_the_request(path: Path) -> None:
    def work(pool: FakePool, path: Path) -> None:
        pool.limit = 1
        with PoolClient(path) as client:
            client.ask("take")
            assert client.ask("take")["error"]["type"] == "TargetError"
            assert client.ask("reset")["ended"] == 1

    serve(path, work)


def test_closed_server_hangs_up_and_removes_its_socket(path: Path) -> None:
    clients: list[PoolClient] = []

    def work(pool: FakePool, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        clients.append(PoolClient(path))
        clients[0].ask("take")

    before = len(os.listdir("/proc/self/fd"))
    pool = serve(path, work)
    with pytest.raises((EOFError, ConnectionError)):
        clients[0].receive()
    clients[0].close()
    assert pool.taken == []
    assert not path.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_socket_in_use_is_not_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(str(path))
        holder.listen()
        with pytest.raises(TargetError, match="cannot listen on the pool's socket"):
            serve(path, lambda pool, path: None)
        assert path.exists()


def test_file_in_the_way_is_not_replaced(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(TargetError):
        serve(path, lambda pool, path: None)
    assert path.read_text() == "mine"


def say_as_nobody(path: Path) -> str:
    """What the pool answers to a process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            with PoolClient(path) as client:
                os.write(writer, str(client.receive()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return answer.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_other_user_is_turned_away_even_if_the_socket_lets_it_in() -> None:
    def work(pool: FakePool, path: Path) -> None:
        path.chmod(0o666)
        assert "only the user who runs the pool may use it" in say_as_nobody(path)
        assert pool.guests == {}

    with tempfile.TemporaryDirectory(prefix="pool-") as name:
        Path(name).chmod(0o755)
        serve(Path(name) / "s", work)
