import asyncio
import contextlib
import gc
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qmp import QmpServer, Version, server
from pyqmigrate.qmp.connection import Connection
from tests.harness.idle_guest import IdleGuest
from tests.harness.qmp_server import ServerThread

ADD = b'{"execute":"add-fd"}'


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def null():
    fd = os.open("/dev/null", os.O_WRONLY)
    yield fd
    os.close(fd)


def test_greeting_in_compat_is_qemus(client):
    assert client.greeting == {
        "QMP": {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},
            "capabilities": ["oob"],
        }
    }


def test_greeting_in_strict_says_who_we_are_and_offers_nothing(serve):
    greeting = serve.connect(serve(policy=Policy.STRICT)).greeting["QMP"]
    assert greeting["capabilities"] == []
    assert greeting["version"]["package"].startswith("pyqmigrate ")


def test_version_can_be_given(serve):
    client = serve.connect(serve(version=Version(9, 2, 0, "mine")))
    expected = {"qemu": {"major": 9, "minor": 2, "micro": 0}, "package": "mine"}
    assert client.execute("query-version") == {"return": expected}


def test_socket_has_mode_0600_and_goes_away_with_the_server(server):
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    server.close()
    assert not server.path.exists()


def test_a_path_in_use_is_refused(server):
    with pytest.raises(TargetError, match="cannot listen on the QMP socket"):
        ServerThread(server.path)
    assert server.path.exists()


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(TargetError, match="Address already in use"):
        ServerThread(path)
    assert path.read_text() == "content"


def test_a_socket_that_no_process_serves_any_more_is_replaced(tmp_path, serve):
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "qmp0"))
    assert serve.connect(serve()).execute("query-fdsets") == {"return": []}


def test_a_server_whose_line_of_clients_is_full_is_not_taken_for_gone(tmp_path):
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as clients:
        busy.bind(str(path))
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        inode = path.stat().st_ino
        with pytest.raises(TargetError, match="Address already in use"):
            ServerThread(path)
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("kind", ["link", "datagram"])
def test_what_is_not_a_stream_socket_is_refused_and_kept(tmp_path, kind):
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "other"))
        if kind == "link":
            path.symlink_to("other")
        else:
            path = tmp_path / "other"
        with pytest.raises(TargetError, match="Address already in use"):
            ServerThread(path)
    assert path.is_symlink() == (kind == "link")
    assert (tmp_path / "other").is_socket()


def test_socket_of_a_relative_path_goes_away_whatever_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running = ServerThread("qmp")
    assert (tmp_path / "qmp").is_socket()
    monkeypatch.chdir("/")
    running.close()
    assert not (tmp_path / "qmp").exists()


def test_a_socket_that_took_the_name_stays(tmp_path):
    running = ServerThread(tmp_path / "qmp")
    (tmp_path / "qmp").rename(tmp_path / "old")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "qmp"))
        running.close()
        assert (tmp_path / "qmp").is_socket()


def test_a_peer_of_another_user_is_turned_away(serve, monkeypatch):
    monkeypatch.setattr(server, "_is_trusted", lambda _client: False)
    client = serve.connect(serve(), negotiate=False)
    assert client.line() is None
    client = serve.connect(serve(any_user=True))
    assert client.execute("stop") == {"return": {}}


def test_trust_is_for_ourselves_and_root(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert server._is_trusted(ours)
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
        assert server._is_trusted(ours) == (os.getuid() == 0)


def test_an_answer_comes_though_no_newline_was_sent(client):
    assert client.ask(b'{"execute":"query-fdsets"}') == {"return": []}


def test_several_messages_in_one_packet_are_answered_in_order(client):
    client.send(b"".join(b'{"execute":"query-status","id":%d}' % n for n in range(30)))
    assert [client.answer()["id"] for _ in range(30)] == list(range(30))


def test_a_message_cut_anywhere_is_answered(client):
    for byte in b'{"execute": "query-fdsets", "id": "\\u00e9"}':
        client.send(bytes([byte]))
    assert client.answer() == {"return": [], "id": "é"}


def test_a_parse_error_leaves_the_session_alive(client):
    assert client.ask(b"@\n") == {
        "error": {"class": "GenericError", "desc": "JSON parse error, stray '@'"}
    }
    assert "return" in client.execute("query-status")


def test_an_unterminated_object_is_ended_by_0xff(client):
    client.send(b'{"execute": {"a": [')
    assert "stray" in client.ask(b"\xff\n")["error"]["desc"]
    assert "return" in client.execute("query-status")


def test_negotiation_starts_over_with_every_connection(serve, server):
    serve.connect(server).close()
    client = serve.connect(server, negotiate=False)
    client.line()
    assert client.ask(b'{"execute":"query-status"}')["error"]["class"] == "CommandNotFound"


def test_compat_serves_one_client_at_a_time(serve, server):
    first = serve.connect(server)
    second = serve.connect(server, negotiate=False)
    second.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        second.line()
    second.close()
    first.close()
    second = serve.connect(server, negotiate=False)
    assert "QMP" in second.line()


def test_strict_serves_several_at_once(serve):
    server = serve(policy=Policy.STRICT)
    clients = [serve.connect(server) for _ in range(5)]
    for client in reversed(clients):
        assert client.execute("query-fdsets") == {"return": []}


def test_a_stalled_client_stops_no_other_client_and_is_cut_off_when_it_is_owed_too_much(serve):
    server = serve(policy=Policy.STRICT)
    stalled, other = serve.connect(server), serve.connect(server)
    for _ in range(2):  # each answer is large, and none is read
        stalled.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                stalled.sock.sendall(b'{"execute":"query-commands"}' * 100)
    for _ in range(80):
        for n in range(400):
            server.guest._tell("NOISE", {"n": n, "text": "x" * 200})
        assert other.execute("query-status")["return"]["running"]
    wait_until(lambda: len(server.server._connections) == 1)


def test_events_reach_clients_that_have_negotiated_and_no_others(serve):
    server = serve(policy=Policy.STRICT)
    ready, fresh = serve.connect(server), serve.connect(server, negotiate=False)
    fresh.line()
    assert ready.execute("stop") == {"return": {}}
    event = ready.event()
    assert event["event"] == "STOP"
    assert abs(event["timestamp"]["seconds"] - time.time()) < 60
    assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
    assert "data" not in event
    assert fresh.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}
    assert fresh.events == []


def test_events_of_a_migration_come_with_their_data(client, tmp_path):
    client.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
    )
    assert client.execute("migrate", uri=f"file:{tmp_path}/out") == {"return": {}}
    statuses = [client.event() for _ in range(3)]
    assert [event["data"]["status"] for event in statuses] == ["setup", "active", "completed"]


def test_quit_is_answered_then_announced_then_asked_of_the_embedder(server, client):
    assert client.execute("quit") == {"return": {}}
    event = client.event()
    assert (event["event"], event["data"]) == (
        "SHUTDOWN",
        {"guest": False, "reason": "host-qmp-quit"},
    )
    wait_until(server.server.quit_requested.is_set)


def test_quit_by_the_human_monitor_is_answered_first_too(server, client):
    assert client.execute("human-monitor-command", command_line="q") == {"return": ""}
    assert client.event()["event"] == "SHUTDOWN"
    wait_until(server.server.quit_requested.is_set)


def test_closing_the_server_ends_its_clients(server, client):
    server.close()
    assert client.line() is None


def test_a_descriptor_before_its_command_is_taken_by_it(client, null):
    client.send(b" ", [null])
    added = client.ask(ADD)["return"]
    assert added["fdset-id"] == 0
    assert client.execute("query-fdsets") == {
        "return": [{"fds": [{"fd": added["fd"]}], "fdset-id": 0}]
    }


def test_a_descriptor_inside_its_command_is_taken_by_it(client, null):
    client.send(b'{"execute":"add')
    client.send(b'-fd"', [null])
    assert "return" in client.ask(b"}")


def test_a_descriptor_with_the_closing_brace_is_taken(client, null):
    client.send(ADD[:-1])
    assert "return" in client.ask(b"}", [null])


def test_a_descriptor_after_the_closing_brace_is_for_the_next_command(client, null):
    client.send(ADD)
    client.send(ADD, [null])
    assert client.answer()["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"
    assert "return" in client.answer()


def test_pipelined_commands_each_take_their_own_descriptor(client, null):
    for n in range(20):
        client.send(b'{"execute":"add-fd","arguments":{"fdset-id":%d}}' % n, [null])
    for n in range(20):
        assert client.answer()["return"]["fdset-id"] == n


def test_one_message_gives_one_descriptor_however_many_it_brings(client, null):
    before = open_fds()
    client.send(b" ", [null] * 20)
    assert "return" in client.ask(ADD)
    assert "error" in client.ask(ADD)
    assert open_fds() == before + 1


def test_a_newer_message_replaces_the_pending_descriptor(server, client, tmp_path):
    before = open_fds()
    for name in ("old", "new"):
        fd = os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT)
        client.send(b" ", [fd])
        os.close(fd)
    fd = client.ask(ADD)["return"]["fd"]
    assert Path(f"/proc/self/fd/{fd}").readlink() == tmp_path / "new"
    assert open_fds() == before + 1


@pytest.mark.parametrize(
    "between",
    [
        b'{"execute":"query-status"}',
        b'{"execute":"nope"}',
        b"@\n",
        b"{}",
        b'{"execute":"add-fd","arguments":{"fdset-id":"x"}}',
        b'{"execute":"add-fd","arguments":{"fdset_id":1}}',
    ],
)
def test_a_descriptor_stays_pending_over_what_does_not_take_it(client, null, between):
    client.send(b" ", [null])
    client.ask(between)
    assert "return" in client.ask(ADD)


def test_a_descriptor_survives_negotiation(serve, server, null):
    client = serve.connect(server, negotiate=False)
    client.line()
    client.send(b" ", [null])
    client.ask(b'{"execute":"qmp_capabilities"}')
    assert "return" in client.ask(ADD)


def test_a_negative_id_uses_the_descriptor_up(client, null):
    before = open_fds()
    client.send(b" ", [null])
    assert client.execute("add-fd", fdset_id=-1)["error"]["desc"] == (
        "Parameter 'fdset-id' expects a non-negative value"
    )
    assert "error" in client.ask(ADD)
    assert open_fds() == before


def test_pending_descriptors_belong_to_one_connection(serve, null):
    server = serve(policy=Policy.STRICT)
    sender, other = serve.connect(server), serve.connect(server)
    sender.send(b" ", [null])
    assert "error" in other.ask(ADD)
    assert "return" in sender.ask(ADD)


def test_a_client_that_dies_with_descriptors_pending_leaks_none(serve, server, null):
    before = open_fds()
    client = serve.connect(server)
    client.send(b'{"exec', [null])
    client.close()
    wait_until(lambda: open_fds() == before)


def test_a_server_that_ends_leaves_no_named_descriptor_open(server, client, null):
    before = open_fds()
    client.send(b" ", [null])
    client.execute("getfd", fdname="kept")
    assert open_fds() == before + 1
    server.close()  # the fixture counts


def test_a_server_that_ends_amid_a_command_closes_what_followed_it(
    server, client, null, monkeypatch
):
    entered, released = threading.Event(), threading.Event()

    def stop():
        entered.set()
        released.wait(10)

    monkeypatch.setattr(server.guest, "stop", stop)
    server.loop.call_soon_threadsafe(time.sleep, 0.3)  # so that both messages are read at once
    client.send(b'{"execute":"stop"}')
    client.send(b" ", [null])
    assert entered.wait(10)
    threading.Timer(0.2, released.set).start()
    server.close()  # the fixture counts


def test_sets_and_names_survive_their_client(serve, server, null):
    client = serve.connect(server)
    client.send(b" ", [null])
    client.execute("add-fd", fdset_id=5)
    client.send(b" ", [null])
    client.execute("getfd", fdname="kept")
    client.close()
    client = serve.connect(server)
    assert client.execute("query-fdsets")["return"][0]["fdset-id"] == 5
    assert client.execute("closefd", fdname="kept") == {"return": {}}


def test_a_named_descriptor_is_used_up_by_a_migration(client, tmp_path):
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    client.send(b" ", [fd])
    os.close(fd)
    assert client.execute("getfd", fdname="out") == {"return": {}}
    assert client.execute("migrate", uri="fd:out") == {"return": {}}
    client.execute("cont")
    assert client.execute("migrate", uri="fd:out")["error"]["desc"] == (
        "File descriptor named 'out' has not been found"
    )
    assert client.execute("query-migrate")["return"]["status"] == "failed"


def test_a_thousand_rounds_leak_no_descriptor(serve, null):
    server = serve(hold=True)
    client = serve.connect(server)
    before = open_fds()
    for _ in range(1000):
        client.send(b'{"execute":"add-fd","arguments":{"fdset-id":1}}', [null])
        assert "return" in client.answer()
        client.execute("migrate", uri="file:/dev/fdset/1")
        client.execute("migrate_cancel")
        assert client.execute("remove-fd", fdset_id=1) == {"return": {}}
    assert open_fds() == before


def test_a_command_that_blocks_does_not_hold_up_other_clients(serve, monkeypatch):
    server = serve(policy=Policy.STRICT)
    slow, quick = serve.connect(server), serve.connect(server)
    entered, released, left = threading.Event(), threading.Event(), threading.Event()

    def stop():
        entered.set()
        released.wait(10)
        left.set()

    monkeypatch.setattr(server.guest, "stop", stop)
    slow.send(b'{"execute":"stop"}{"execute":"query-status","id":1}')
    assert entered.wait(10)
    assert "return" in quick.execute("query-status")
    assert not left.is_set()
    released.set()
    assert [slow.answer(), slow.answer()["id"]] == [{"return": {}}, 1]


def test_an_unforeseen_error_is_an_answer_too(server, client, monkeypatch):
    monkeypatch.setattr(server.guest, "memory_size", lambda: 1 // 0)
    assert client.execute("query-memory-size-summary")["error"]["desc"] == (
        "internal error; the log has the details"
    )
    assert "return" in client.execute("query-status")


def test_deep_nesting_is_answered_with_an_error(client):
    client.send(b"[" * 5000 + b"\xff\n")
    texts = []
    while not texts or "stray" not in texts[-1]:
        texts.append(client.answer()["error"]["desc"])
    assert texts.count("JSON nesting depth limit exceeded") == 4
    assert "return" in client.execute("query-status")


def test_an_identity_nested_as_deep_as_allowed_is_echoed(client):
    depth = 1022
    client.send(b'{"execute":"query-fdsets","id":' + b"[" * depth + b"]" * depth + b"}")
    line = client._lines.readline()
    assert b"[" * depth + b"]" * depth in line
    assert "return" in client.execute("query-status")


def test_a_message_over_the_limit_is_answered_with_an_error(serve):
    client = serve.connect(serve())
    chunk = b"x" * (1 << 20)
    client.send(b'{"execute":"')
    for _ in range(65):
        client.send(chunk)
    assert client.answer()["error"]["desc"] == "JSON token size limit exceeded"
    client.send(b"\xff\n")
    while "stray" not in client.answer()["error"]["desc"]:
        pass
    assert "return" in client.execute("query-status")


@pytest.mark.parametrize("policy", Policy)
def test_the_real_client_library_drives_it(serve, tmp_path, policy):
    program = Path(__file__).parents[2] / "harness/real_client.py"
    command = [sys.executable, program, serve(policy=policy).path, tmp_path / "guest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_round_trips_are_answered_in_the_order_they_were_asked(client):
    for n in range(500):
        assert client.ask(b'{"execute":"query-migrate","id":%d}' % n)["id"] == n


def test_closing_before_listening_is_harmless():
    async def run():
        with FdSets() as fdsets:
            async with QmpServer(IdleGuest(fdsets), fdsets):
                pass

    asyncio.run(run())


def test_a_file_name_that_is_not_text_is_answered_in_ascii(client, tmp_path):
    answer = client.execute("migrate", uri=f"file:{tmp_path}/é\x7f/x")
    assert json.dumps(answer).isascii()
    assert answer["error"]["desc"].startswith("Could not create")


def test_what_a_client_left_unread_is_let_go_at_once_and_not_when_python_collects(server):
    gc.collect()
    gc.disable()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(0.3)
            client.connect(str(server.path))
            with contextlib.suppress(TimeoutError):
                client.sendall(b'{"execute": "qmp_capabilities"}' * 10_000)
        wait_until(lambda: not any(isinstance(o, Connection) for o in gc.get_objects()))
    finally:
        gc.enable()
