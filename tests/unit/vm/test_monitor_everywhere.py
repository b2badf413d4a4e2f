"""Every verb and function that takes a monitor takes PATH and unix:PATH, and refuses the rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyqmigrate import vm
from pyqmigrate.cli import main
from pyqmigrate.errors import PyqmigrateError, QemuError, UsageError
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.migration import Migration
from pyqmigrate.qmp import QmpServer
from pyqmigrate.vm import sync
from pyqmigrate.vm.outgoing.save import save

VERBS = {
    "vm save": ["vm", "save", "--qmp", "{qmp}", "{directory}/s"],
    "vm check": ["vm", "check", "--qmp", "{qmp}"],
    "vm restore": ["vm", "restore", "--qmp", "{qmp}", "{directory}/none", "--", "qemu-kvm"],
    "serve": ["serve", "--qmp", "{qmp}", "--ram", "a={directory}/none"],
}
CALLS: dict[str, Callable[[str], object]] = {
    "connect": vm.connect,
    "sync.connect": sync.connect,
    "QmpServer.listen": lambda qmp: asyncio.run(_listen(qmp)),
    "Monitor.connect": lambda qmp: asyncio.run(vm.Monitor.connect(qmp)),
    "save": lambda qmp: asyncio.run(save(qmp, "/none/snapshot")),
    "restore": lambda qmp: sync.restore("/none", ["qemu-kvm"], qmp=qmp),
}


async def _listen(qmp: str) -> None:
    with contextlib.closing(Migration([RamBlock("a", bytearray(1 << 20))])) as migration:
        async with QmpServer(migration, migration.fdsets) as server:
            await server.listen(qmp)


@pytest.mark.parametrize("verb", VERBS)
def test_verb_refuses_what_is_not_a_unix_socket(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(qmp="tcp:localhost:4444", directory=tmp_path) for word in VERBS[verb]]
    assert main(words) == 2
    assert "'tcp:localhost:4444' is not a UNIX socket" in capsys.readouterr().err


@pytest.mark.parametrize("front", ["", "unix:"])
def test_server_listens_whatever_the_length_of_its_path(tmp_path: Path, front: str) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    path = directory / "serve.qmp"

    async def serve() -> None:
        with contextlib.closing(Migration([RamBlock("a", bytearray(1 << 20))])) as migration:
            for _ in range(2):  # the second time over the remains of the first
                async with QmpServer(migration, migration.fdsets) as server:
                    await server.listen(f"{front}{path}")
                    async with await vm.Monitor.connect(path) as monitor:
                        assert (await monitor.execute("query-status"))["status"]
                assert not path.exists()
                with socket.socket(socket.AF_UNIX) as left, contextlib.chdir(directory):
                    left.bind(path.name)
            async with QmpServer(migration, migration.fdsets) as server:
                await server.listen(path)
                path.unlink()
                path.write_text("of another process")
            assert path.read_text() == "of another process"

    asyncio.run(serve())


@pytest.mark.parametrize("call", CALLS)
def test_function_refuses_what_is_not_a_unix_socket(call: str) -> None:
    with pytest.raises(UsageError, match="not a UNIX socket"):
        CALLS[call]("localhost:4444")


@contextlib.contextmanager
def silent_socket(path: Path) -> Iterator[None]:
    """A socket at a path of any length that closes each connection."""
    directory = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"/proc/self/fd/{directory}/short")
        os.rename("short", path.name, src_dir_fd=directory, dst_dir_fd=directory)
        os.close(directory)
        listener.listen()
        yield


@pytest.mark.parametrize("front", ["", "unix:"])
@pytest.mark.parametrize("name", ["q", "n" * 200])
def test_socket_is_found_whatever_its_length(tmp_path: Path, front: str, name: str) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()

    async def connect() -> None:
        await vm.Monitor.connect(f"{front}{directory / name}", timeout=0.5)

    with silent_socket(directory / name), pytest.raises(QemuError, match="no greeting"):
        asyncio.run(connect())


def test_call_of_sync_inside_an_event_loop_says_what_to_use(tmp_path: Path) -> None:
    handle = sync.connect(tmp_path / "q")
    calls: dict[str, Callable[[], object]] = {
        "Vm.save": lambda: handle.save(tmp_path / "s"),
        "Vm.check": handle.check,
        "restore": lambda: sync.restore(tmp_path / "s", ["qemu-kvm"]),
        "clone": lambda: sync.clone(tmp_path / "s", ["qemu-kvm"], 1),
    }

    async def inside() -> None:
        for name, call in calls.items():
            with pytest.raises(PyqmigrateError, match=f"await pyqmigrate.vm.{name}") as caught:
                call()
            assert isinstance(caught.value, UsageError)

    asyncio.run(inside())
