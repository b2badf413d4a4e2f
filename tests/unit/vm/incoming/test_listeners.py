"""The sockets of a command line, and whether another process listens on them."""

from __future__ import annotations

import shlex
import socket
import time
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.listeners import listeners, refuse_taken
from pyqmigrate.vm.qemu.command_line import CommandLine


def command(text: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *shlex.split(text)])


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("-qmp unix:/a,server=on,wait=off", ["/a"]),
        ("-qmp-pretty unix:/a,server,nowait", ["/a"]),
        ("-monitor unix:/a,,b,server=on", ["/a,b"]),
        ("-serial mon:unix:/a,server=on", ["/a"]),
        ("-serial unix:/a", []),
        ("-serial tcp:localhost:4444,server=on,wait=off", ["localhost:4444"]),
        ("-serial telnet::4444,server", ["*:4444"]),
        ("-serial tcp:localhost:4444", []),
        ("-gdb tcp::1234", ["*:1234"]),
        ("-gdb unix:/a,server=on", ["/a"]),
        ("-s", ["*:1234"]),
        ("-chardev socket,id=c,path=/a,server=on,wait=off", ["/a"]),
        ("-chardev socket,id=c,path=/a", []),
        ("-chardev socket,id=c,path=/a,server=on,abstract=on", []),
        ("-chardev socket,id=c,host=127.0.0.1,port=77,server=on", ["127.0.0.1:77"]),
        ("-chardev socket,id=c,host=127.0.0.1,port=77,to=99,server=on", []),
        ('-chardev \'{"backend":"socket","id":"c","path":"/a","server":true}\'', ["/a"]),
        ("-vnc unix:/a", ["/a"]),
        ("-vnc :1", ["*:5901"]),
        ("-vnc [::1]:2", ["::1:5902"]),
        ("-vnc localhost:1,websocket=on", ["localhost:5901", "localhost:5701"]),
        ("-vnc none", []),
        ("-vnc host:1,reverse=on", []),
        ("-display vnc=:3", ["*:5903"]),
        ("-spice port=5930,tls-port=5931,addr=127.0.0.1", ["127.0.0.1:5930", "127.0.0.1:5931"]),
        ("-spice unix=on,addr=/a,disable-ticketing=on", ["/a"]),
        ("-netdev socket,id=n,listen=:77", ["*:77"]),
        ("-netdev stream,id=n,server=on,addr.type=unix,addr.path=/a", ["/a"]),
        ("-netdev stream,id=n,addr.type=unix,addr.path=/a", []),
        ("-object monitor-qmp,id=m,chardev=c -chardev socket,id=c,path=/a,server=on", ["/a"]),
        ("-mon chardev=c,mode=control -chardev socket,id=c,path=/a,server=on", ["/a"]),
        ("-netdev user,id=n -drive file=/a -m 64", []),
    ],
)
def test_sockets_are_found_in_every_form(text: str, addresses: list[str]) -> None:
    assert [listener.address for listener in listeners(command(text))] == addresses


def test_sockets_of_a_configuration_file_are_found_and_pipes_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "vm.cfg"
    file.write_text(
        '# a comment\n[chardev "mon"]\n  backend = "socket"\n  path = "/a,b"\n  server = "on"\n'
        '[machine]\n  type = "pc"\n[spice]\n  port = "77"\n'
    )
    found = list(listeners(command(f"-readconfig {file} -readconfig /dev/fd/99")))
    assert [listener.address for listener in found] == ["/a,b", "*:77"]
    assert str(found[0].option).startswith(f"-readconfig {file}")


def test_socket_that_answers_is_refused_and_sees_a_client_that_leaves(tmp_path: Path) -> None:
    path = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(UsageError, match=rf"listens at {path} \(-qmp unix:{path},server=on\)"):
            refuse_taken(command(f"-qmp unix:{path},server=on"))
        with pytest.raises(UsageError, match=f"another monitor listens at {path}"):
            refuse_taken(command("-m 64"), path)
        for _ in range(2):
            client, _address = listener.accept()
            with client:
                assert client.recv(1) == b""
    refuse_taken(command(f"-qmp unix:{path},server=on"), path)  # the listener is closed


def test_socket_with_a_full_queue_answers_too(tmp_path: Path) -> None:
    path = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        started = time.monotonic()
        with pytest.raises(UsageError, match="listens"):
            refuse_taken(command(f"-serial unix:{path},server=on"))
        assert time.monotonic() - started < 5


def test_port_that_is_taken_is_refused_without_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for option in (f"-serial tcp:127.0.0.1:{port},server=on", f"-gdb tcp::{port}"):
            with pytest.raises(UsageError, match=f":{port} "):
                refuse_taken(command(option))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    refuse_taken(command(f"-serial tcp:127.0.0.1:{port},server=on"))


def test_monitor_without_a_directory_and_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        refuse_taken(command("-m 64"), tmp_path / "none" / "qmp")
    with pytest.raises(UsageError, match="has 120 bytes"):
        refuse_taken(command("-m 64"), tmp_path / ("x" * 120))
    refuse_taken(command("-m 64"), tmp_path / "new")


def test_file_that_is_not_a_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("of a user")
    with pytest.raises(UsageError, match="is not a socket"):
        refuse_taken(command("-m 64"), path)
    with pytest.raises(UsageError, match="is not a socket"):
        refuse_taken(command(f"-qmp unix:{path},server=on"))
