"""Who is at the other end of a monitor's connection, whatever QEMU says."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pyqmigrate.errors import GuestMemoryError
from pyqmigrate.vm.guest.process import Mapping, Process, find_process, open_mapped, read_mappings
from pyqmigrate.vm.qemu import peer as peer_module
from pyqmigrate.vm.qemu.peer import Peer

NOBODY = 65534

_SERVER = """
import ctypes, os, socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
if sys.argv[2] == "listen":
    listener.listen()
if sys.argv[3]:
    os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
    # As after execve(): this process may be looked at by its user.
    ctypes.CDLL(None).prctl(4, int(sys.argv[4]), 0, 0, 0)
accepted, _ = listener.accept()
accepted.send(b"!")
sys.stdin.read()
"""


@contextlib.contextmanager
def served(
    directory: Path, *, listens: bool = True, user: int | None = None, dumpable: bool = True
) -> Iterator[tuple[subprocess.Popen[bytes], Peer]]:
    """Start a process that accepts a connection of this one; yield it and the peer that the kernel shows.

    Without ``listens`` this process calls listen() and hands the socket on, as managers do.
    """
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(directory / "monitor"))
        if not listens:
            listener.listen()
        command = [
            sys.executable,
            "-c",
            _SERVER,
            str(listener.fileno()),
            "listen" if listens else "",
            "" if user is None else str(user),
            str(int(dumpable)),
        ]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
        ) as child:
            try:
                while True:
                    with contextlib.suppress(ConnectionRefusedError):
                        client.connect(str(directory / "monitor"))
                        break
                client.settimeout(30)
                assert client.recv(1) == b"!"
                yield child, Peer.of(client)
            finally:
                child.kill()


def anything(space: Sequence[Mapping]) -> bool:
    return bool(space)


def pid_of(found: tuple[Process | None, str]) -> int | str:
    process, why_not = found
    if process is None:
        return why_not
    process.close()
    return process.pid


def own_threads() -> list[int]:
    return [thread.native_id for thread in threading.enumerate() if thread.native_id is not None]


@pytest.mark.parametrize("listens", [True, False], ids=["its-own-socket", "of-a-manager"])
def test_process_that_accepted_the_connection_is_found(tmp_path: Path, listens: bool) -> None:
    with served(tmp_path, listens=listens) as (child, peer):
        assert peer.pid == (child.pid if listens else os.getpid())
        assert pid_of(find_process(peer, [child.pid], anything)) == child.pid


def test_without_sock_diag_the_names_of_connections_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: socket.socket) -> int:
        raise OSError

    monkeypatch.setattr(peer_module, "_other_end", refuse)
    with served(tmp_path, listens=False) as (child, peer):
        assert pid_of(find_process(peer, [child.pid], anything)) == child.pid
        assert "not at the other end" in str(pid_of(find_process(peer, own_threads(), anything)))


def test_connection_that_is_not_accepted_yet_is_held_by_no_process(tmp_path: Path) -> None:
    """Its other end has no inode, and neither has a descriptor that is not a socket."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "monitor"))
        listener.listen()
        client.connect(str(tmp_path / "monitor"))
        assert "not at the other end" in str(Peer.of(client).why_not(os.getpid()))


def test_threads_of_a_bystander_are_not_believed(tmp_path: Path) -> None:
    """A QEMU that lies names any process's threads; here those of this one, which runs as root or
    at least as the same user."""
    with served(tmp_path) as (_, peer):
        assert "not at the other end" in str(pid_of(find_process(peer, own_threads(), anything)))


def test_manager_that_handed_the_socket_on_is_not_believed(tmp_path: Path) -> None:
    with served(tmp_path, listens=False) as (_, peer):
        assert peer.pid == os.getpid()
        assert "not at the other end" in str(pid_of(find_process(peer, own_threads(), anything)))


def test_program_in_between_is_named(tmp_path: Path) -> None:
    with served(tmp_path) as (child, peer):
        found = str(pid_of(find_process(peer, [1 << 22], anything)))
        assert f"process {child.pid} (python" in found and "socat" in found


def test_memory_that_does_not_fit_is_not_believed(tmp_path: Path) -> None:
    with served(tmp_path) as (child, peer):
        found = find_process(peer, [child.pid], lambda _: False)
        assert "no memory where QEMU reports" in str(pid_of(found))


def test_process_that_ended_is_not_found(tmp_path: Path) -> None:
    with served(tmp_path) as (child, peer):
        child.kill()
        child.wait()
        assert isinstance(pid_of(find_process(peer, [child.pid], anything)), str)


def test_process_that_ended_meanwhile_is_noticed(tmp_path: Path) -> None:
    with served(tmp_path) as (child, peer):
        process, _ = find_process(peer, [child.pid], anything)
        assert process is not None
        process.check()
        child.kill()
        child.wait()
        with pytest.raises(GuestMemoryError, match="has ended"):
            process.check()
        process.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")


@needs_root
def test_listener_that_is_root_may_have_given_up_its_rights(tmp_path: Path) -> None:
    with served(tmp_path, user=NOBODY) as (child, peer):
        assert peer.uid == 0
        assert pid_of(find_process(peer, [child.pid], anything)) == child.pid


@needs_root
@pytest.mark.parametrize("dumpable", [True, False])
def test_process_with_more_rights_than_the_listener_is_refused(
    tmp_path: Path, dumpable: bool
) -> None:
    """As one that listened and then started a set-user-ID program: it has the same number."""
    with served(tmp_path, user=NOBODY, dumpable=dumpable) as (child, peer):
        listener = Peer(child.pid, NOBODY, NOBODY, peer.sockets)
        if dumpable:
            assert listener.why_not(child.pid) is None
        else:
            assert "does not have the rights" in str(listener.why_not(child.pid))
        stranger = Peer(child.pid, NOBODY - 1, NOBODY, peer.sockets)
        assert "does not have the rights" in str(stranger.why_not(child.pid))


@needs_root
def test_name_that_leads_elsewhere_is_not_opened(tmp_path: Path) -> None:
    """The path of a mapping is a name that QEMU's user may have given to another file since."""
    ours, secret = tmp_path / "ram", tmp_path / "secret"
    ours.write_bytes(b"guest" * 4096)
    secret.write_bytes(b"secret")
    with ours.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[:5] == b"guest"
        mapped = next(m for m in read_mappings(os.getpid()) if m.path == str(ours))
    ours.unlink()
    ours.symlink_to(secret)
    path_only = os.open(secret, os.O_PATH)
    try:
        with pytest.raises(OSError):
            open_mapped(os.getpid(), mapped)
    finally:
        os.close(path_only)
