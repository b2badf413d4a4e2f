"""A restore while the guest that was saved still runs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyqmigrate.vm.incoming.attempt
import pyqmigrate.vm.incoming.loading
import pyqmigrate.vm.incoming.mapped_start
from pyqmigrate import vm
from pyqmigrate.errors import PyqmigrateError, QemuError, UsageError
from pyqmigrate.format.qcow2 import encode_overlay
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.bare import BareQemu
from tests.harness.machine import BINARY

pytestmark = pytest.mark.qemu

MACHINE = ["-M", "pc", "-m", "16"]


@dataclass
class Original:
    """A guest that was saved and goes on: where its snapshot is, and how it was started."""

    qemu: BareQemu
    snapshot: Path
    disk: Path
    serial: Path

    def command(self, *arguments: str, disk: Path | None = None) -> list[str]:
        """Without its sockets."""
        return [
            BINARY,
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            *MACHINE,
            "-drive",
            f"file={disk or self.disk},if=virtio,format=raw",
            *(arguments if "-serial" in arguments else ["-serial", "null", *arguments]),
        ]

    def is_unharmed(self) -> None:
        async def ask(monitor: vm.Monitor) -> None:
            assert (await monitor.execute("query-status"))["running"]

        self.qemu.run(ask)
        with socket.socket(socket.AF_UNIX) as serial:
            serial.connect(str(self.serial))
        assert self.qemu.stderr().strip() == ""


@pytest.fixture(scope="module")
def original(module_disk: Path) -> Iterator[Original]:
    disk, serial = module_disk / "disk.img", module_disk / "serial.sock"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    with BareQemu(
        *MACHINE,
        "-drive",
        f"file={disk},if=virtio,format=raw",
        "-serial",
        f"unix:{serial},server=on,wait=off",
        run=True,
    ) as qemu:

        async def save(_: vm.Monitor) -> None:
            return

        qemu.run(save)  # it listens
        snapshot = module_disk / "guest.mapped"
        asyncio.run(vm.connect(qemu.socket).save(snapshot))
        yield Original(qemu, snapshot, disk, serial)
        qemu.kill()


def attempt(original: Original, command: list[str], **options: str) -> PyqmigrateError:
    async def run() -> None:
        await (await restore(original.snapshot, command, **options)).end()  # type: ignore[arg-type]

    with pytest.raises(PyqmigrateError) as caught:
        asyncio.run(run())
    return caught.value


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_its_sockets_are_not_taken_over(original: Original, mode: str) -> None:
    sockets = {"-qmp": original.qemu.socket, "-serial": original.serial}
    for option, path in sockets.items():
        words = [option, f"unix:{path},server=on,wait=off"]
        error = attempt(original, original.command(*words), mode=mode)
        assert isinstance(error, UsageError)
        assert f"another process listens at {path} ({' '.join(words)})" in str(error)
        original.is_unharmed()
    error = attempt(original, original.command(), mode=mode, qmp=str(original.qemu.socket))
    assert "another monitor listens" in str(error)
    original.is_unharmed()


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_its_disk_is_not_written_by_two(original: Original, mode: str) -> None:
    error = attempt(original, original.command(), mode=mode)
    assert isinstance(error, UsageError)
    assert f"'{original.disk}' is open for writing in process {original.qemu.process.pid}" in str(
        error
    )
    original.is_unharmed()


def test_overlay_over_its_disk_is_refused_and_one_over_a_copy_restores(
    original: Original, tmp_path: Path
) -> None:
    overlay, copy = tmp_path / "overlay.qcow2", tmp_path / "copy.img"
    with overlay.open("wb") as file:
        size = original.disk.stat().st_size
        for offset, data in encode_overlay(size, bytes(original.disk), "raw"):
            file.seek(offset)
            file.write(data)
    command = original.command("-drive", f"file={overlay},if=none,id=d", disk=tmp_path / "none")
    error = attempt(original, command)
    assert f"'{original.disk}', a backing file of '{overlay}', is open for writing" in str(error)
    copy.write_bytes(original.disk.read_bytes())

    async def run() -> None:
        guest = await restore(original.snapshot, original.command(disk=copy))
        try:
            assert guest.report.run_state == "running"
        finally:
            await guest.end()

    asyncio.run(run())
    original.is_unharmed()


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_disk_that_only_qemu_finds_in_use_is_its_own_error(
    original: Original, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyqmigrate.vm.incoming.mapped_start, "refuse_in_use", lambda _: None)
    error = attempt(original, original.command(), mode=mode)
    assert type(error) is QemuError
    assert "cannot resume the guest" in str(error)
    assert 'Failed to get "write" lock' in str(error)
    assert "Is another process using the image" in str(error)
    original.is_unharmed()


def test_guest_that_hangs_in_inmigrate_is_an_error_with_qemus_lines(
    original: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As QEMU has it where it lets the guest run by itself: of a snapshot that does not show its
    run state."""
    monkeypatch.setattr(pyqmigrate.vm.incoming.mapped_start, "refuse_in_use", lambda _: None)
    read = pyqmigrate.vm.incoming.attempt.read_saved_machine
    monkeypatch.setattr(
        pyqmigrate.vm.incoming.attempt,
        "read_saved_machine",
        lambda snapshot: read(snapshot)._replace(run_state=None),
    )
    monkeypatch.setattr(pyqmigrate.vm.incoming.loading, "_STATE_TIMEOUT", 0.5)
    error = attempt(original, original.command())
    assert type(error) is QemuError
    assert "'inmigrate'" in str(error)
    assert 'Failed to get "write" lock' in str(error)


def test_socket_that_all_clones_would_have_is_refused_with_the_way_out(
    original: Original, tmp_path: Path
) -> None:
    for words in (
        ["-qmp", f"unix:{tmp_path}/q,server=on,wait=off"],
        ["-gdb", "tcp::7777"],
        ["-chardev", f"socket,id=c,path={tmp_path}/q,server=on,wait=off", "-serial", "chardev:c"],
    ):
        command = original.command(*words, disk=tmp_path / "disk-{n}")
        with pytest.raises(UsageError, match=r"guests 1 and 2 would both listen at .* put \{n\}"):
            asyncio.run(clone(original.snapshot, command, 2, directory=tmp_path))
