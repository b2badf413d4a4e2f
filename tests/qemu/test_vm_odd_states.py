"""Guests that nobody paused and that do not run, and devices whose state QEMU cannot save."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import QemuError
from pyqmigrate.format.device.sections import global_state
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.guest.run_state import LOADABLE, what_stopped
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.plan.check import check
from tests.harness.bare import BareQemu
from tests.harness.saving import wait_until

pytestmark = pytest.mark.qemu

# What firmware that does nothing else begins with.
_FIRMWARE = """
        .code16
panic:  movw    $0x505, %dx             # pvpanic
        movb    $1, %al
        outb    %al, %dx
1:      hlt
        jmp     1b
        .org    0x100
fault:  lidtl   %cs:nothing             # three faults are a reset
        int3
nothing: .word  0
        .long   0
        .org    0xfff0
        jmp     START
        .org    0x10000
"""
_MACHINE = ["-M", "pc", "-m", "32"]
_STATES = {"guest-panicked": "panic", "shutdown": "fault"}
_KEEP = ["-device", "pvpanic", "-no-reboot", "-no-shutdown", "-action", "panic=pause"]


def firmware(directory: Path, start: str) -> Path:
    built, image = directory / f"{start}.o", directory / f"{start}.bin"
    source = _FIRMWARE.replace("START", start)
    subprocess.run(["as", "--32", "-o", built, "-"], input=source.encode(), check=True)
    link = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext=0xffff0000", "-e", start]
    subprocess.run([*link, "-o", image, built], check=True, capture_output=True)
    return image


def loaded_state(path: Path, image: Path | None = None) -> str:
    """What a QEMU is that has loaded the snapshot, without -S."""
    firmware = [] if image is None else ["-bios", str(image), *_KEEP]

    async def load(monitor: Any) -> None:
        wanted = [{"capability": "mapped-ram", "state": True}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
        await monitor.execute("migrate-incoming", {"uri": f"file:{path}"})
        while (await monitor.execute("query-migrate")).get("status") != "completed":
            await asyncio.sleep(0.01)
        while (await monitor.execute("query-status"))["status"] == "inmigrate":
            await asyncio.sleep(0.01)

    with BareQemu(*_MACHINE, "-incoming", "defer", *firmware, run=True) as qemu:
        qemu.run(load)
        return qemu.run_state()


@pytest.mark.parametrize("engine", ["qemu", "direct"])
@pytest.mark.parametrize("state", _STATES)
def test_state_of_a_guest_that_stopped_by_itself_is_kept_and_named(
    state: str, engine: str, tmp_path: Path
) -> None:
    image = firmware(tmp_path, _STATES[state])
    with BareQemu(*_MACHINE, "-bios", str(image), *_KEEP, run=True) as qemu:
        wait_until(lambda: qemu.run_state() == state, "it does not stop")
        warnings = qemu.run(check).warnings
        report = asyncio.run(save(qemu.socket, tmp_path / "snapshot", engine=engine))
    sentence = what_stopped(state)
    assert sentence is not None and state in sentence and "restore" in sentence
    assert sentence in warnings
    assert sentence in report.notes
    assert loaded_state(tmp_path / "snapshot", image) == state


def test_qemu_can_load_every_state_that_is_called_loadable(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    with BareQemu(*_MACHINE) as qemu:
        assert qemu.run_state() == "prelaunch"
        asyncio.run(save(qemu.socket, path, engine="direct"))
    with open_snapshot(path) as snapshot:
        found = next(s for s in snapshot.stream.sections if s.name == global_state("paused").name)
    for state in sorted(LOADABLE - {"running", "suspended"}):
        with path.open("r+b") as file:
            file.seek(found.body_offset)
            file.write(global_state(state).data)
        assert loaded_state(path) == state


@contextlib.contextmanager
def file_system_backend(path: Path) -> Iterator[None]:
    """As much of a vhost-user back-end as QEMU needs to start; it cannot migrate."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4)

    def answer(client: socket.socket) -> None:
        with client:
            while len(head := client.recv(12)) == 12:
                request, _, length = struct.unpack("<III", head)
                body = client.recv(length, socket.MSG_WAITALL) if length else b""
                reply = {
                    1: struct.pack("<Q", 1 << 32 | 1 << 30 | 1 << 26),
                    6: bytes(8),
                    11: body[:4] + bytes(4),
                    15: struct.pack("<Q", 2),
                    17: struct.pack("<Q", 8),
                }.get(request)
                if reply is not None:
                    client.sendall(struct.pack("<III", request, 5, len(reply)) + reply)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                answer(listener.accept()[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def test_device_that_cannot_be_saved_is_named_by_either_engine(tmp_path: Path) -> None:
    shared = "memory-backend-memfd,id=mem,size=32M,share=on"
    device = [
        "-chardev",
        f"socket,id=fs,path={tmp_path}/fs",
        "-device",
        "vhost-user-fs-pci,chardev=fs,tag=share,id=shared-files",
    ]
    with (
        file_system_backend(tmp_path / "fs"),
        BareQemu(
            "-object", shared, "-M", "q35,memory-backend=mem", "-m", "32", *device, run=True
        ) as qemu,
    ):
        wait_until(lambda: qemu.run_state() == "running", "it does not run")
        said = {}
        for engine in ("auto", "direct", "qemu"):
            with pytest.raises(QemuError) as caught:
                asyncio.run(save(qemu.socket, tmp_path / "snapshot", engine=engine))
            said[engine] = " ".join([*getattr(caught.value, "__notes__", ()), str(caught.value)])
            assert qemu.run_state() == "running"
        capabilities = qemu.run(lambda m: m.execute("query-migrate-capabilities"))
        assert not any(c["state"] for c in capabilities if c["capability"] == "multifd")
        qemu.kill()
    assert not (tmp_path / "snapshot").exists()
    assert "pre-save failed: vhost-user-fs" in said["qemu"]
    assert "shared-files (vhost-user-fs-pci)" in said["direct"]
    assert "pre-save failed: vhost-user-fs" in said["auto"] and said["direct"] in said["auto"]
