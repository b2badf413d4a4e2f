"""What cannot be restored is refused, with the reason, and nothing is left running."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import (
    BlockMismatch,
    NotSupported,
    PyqmigrateError,
    QemuError,
    SnapshotError,
    TargetError,
    UsageError,
)
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.saved import RAM, Saved, goes_on, save_guest

pytestmark = pytest.mark.qemu

M = str(RAM >> 20)
PC = ["-M", "pc", "-m", M]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, PC)


def children() -> set[str]:
    """The processes that we started and that are not gone."""
    found = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found |= set(task.read_text().split())
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = children()
    yield
    assert children() == before


@pytest.fixture(autouse=True)
def nobody_complains(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs what a task ended with that nobody asked for; the command would print it."""
    yield
    gc.collect()
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def attempt(path: Path, command: list[str], **options: object) -> PyqmigrateError:
    """The error of a restore that has to fail."""

    async def run() -> RestoredVm:
        vm = await restore(path, command, **options)  # type: ignore[arg-type]
        await vm.end()
        return vm

    with pytest.raises(PyqmigrateError) as caught:
        asyncio.run(run())
    return caught.value


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_other_machine_type_is_refused_before_loading(
    saved: Saved, tmp_path: Path, mode: str
) -> None:
    command = saved.command("-M", "q35", "-m", M, serial=tmp_path / "serial")
    error = attempt(saved.path, command, mode=mode)
    assert isinstance(error, UsageError)
    assert "pc-i440fx-" in str(error)
    assert "pc-q35-" in str(error)


@pytest.mark.parametrize("mode", ["auto", "load"])
@pytest.mark.parametrize("size", [RAM // 2, 2 * RAM])
def test_other_ram_size_is_refused_before_loading(
    saved: Saved, tmp_path: Path, size: int, mode: str
) -> None:
    command = saved.command("-M", "pc", "-m", f"{size >> 20}M", serial=tmp_path / "serial")
    error = attempt(saved.path, command, mode=mode)
    assert isinstance(error, BlockMismatch)
    assert f"'pc.ram' has {size} bytes in QEMU and {RAM} in the snapshot" in str(error)


def test_device_with_memory_that_was_not_there_is_refused(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(*PC, "-vga", "std", serial=tmp_path / "serial")
    error = attempt(saved.path, command)
    assert isinstance(error, BlockMismatch)
    assert "vga.vram' is not in the snapshot" in str(error)


def test_backend_of_another_name_is_refused(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(
        "-M",
        "pc,memory-backend=mem",
        "-m",
        M,
        "-object",
        f"memory-backend-ram,id=mem,size={RAM}",
        serial=tmp_path / "serial",
    )
    assert isinstance(attempt(saved.path, command, mode="instant"), NotSupported)
    error = attempt(saved.path, command)
    assert isinstance(error, BlockMismatch)
    assert "'pc.ram' is missing" in str(error)


def test_qemu_that_does_not_start_is_shown_with_what_it_wrote(saved: Saved, tmp_path: Path) -> None:
    command = saved.command(*PC, "-device", "no-such-device", serial=tmp_path / "serial")
    error = attempt(saved.path, command)
    assert isinstance(error, QemuError)
    assert "ended with 1" in str(error)
    assert "no-such-device" in str(error)


def test_program_that_is_not_there_is_an_error(saved: Saved) -> None:
    error = attempt(saved.path, ["/no/such/qemu", *PC])
    assert isinstance(error, QemuError)
    assert "cannot start /no/such/qemu" in str(error)


def test_word_that_no_program_can_be_given_is_an_error(saved: Saved, tmp_path: Path) -> None:
    for word in ("a\0b", "\ud800"):
        error = attempt(saved.path, saved.command(*PC, "-name", word, serial=tmp_path / "serial"))
        assert isinstance(error, UsageError)
        assert "invalid command-line argument" in str(error)


def test_program_that_is_not_a_qemu_is_an_error(saved: Saved) -> None:
    assert "does not start" in str(attempt(saved.path, ["true", *PC]))


def test_stream_that_does_not_fit_is_shown_with_what_qemu_wrote(
    saved: Saved, tmp_path: Path
) -> None:
    """Devices are QEMU's to compare; here one of the snapshot's is missing."""
    path = tmp_path / "guest.mapped"
    data = bytearray(saved.path.read_bytes())
    at = data.rindex(b"\x05timer\x00")
    data[at : at + 6] = b"\x05times"
    path.write_bytes(data)
    error = attempt(path, saved.command(serial=tmp_path / "serial"))
    assert isinstance(error, QemuError)
    assert "failed to load" in str(error)
    assert "times" in str(error)


@pytest.mark.parametrize("cut", [100, RAM // 2, RAM])
def test_file_that_was_cut_never_reaches_qemu(saved: Saved, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "guest.mapped"
    path.write_bytes(saved.path.read_bytes()[:cut])
    assert isinstance(attempt(path, ["/no/such/qemu", *PC]), SnapshotError)


def test_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert isinstance(attempt(tmp_path / "none", ["/no/such/qemu", *PC]), TargetError)


def test_file_that_another_process_writes_is_refused(saved: Saved, tmp_path: Path) -> None:
    import fcntl

    with saved.path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        error = attempt(saved.path, saved.command(serial=tmp_path / "serial"))
    assert isinstance(error, TargetError)
    assert "writing the snapshot in place" in str(error)


def test_vhost_user_keeps_memory_from_being_mapped(saved: Saved, tmp_path: Path) -> None:
    """No such program serves the socket: QEMU is not started for it in mode instant."""
    command = saved.command(
        *PC,
        "-chardev",
        "null,id=c",
        "-netdev",
        "vhost-user,id=n,chardev=c",
        serial=tmp_path / "serial",
    )
    error = attempt(saved.path, command, mode="instant")
    assert isinstance(error, NotSupported)
    assert "vhost-user" in str(error)


def test_auto_is_lazy_and_says_why_where_memory_cannot_be_mapped(
    saved: Saved, tmp_path: Path
) -> None:
    serial, configuration = tmp_path / "serial", tmp_path / "vm.cfg"
    configuration.write_text(f'[memory]\n  size = "{M}M"\n')
    command = saved.command("-M", "pc", "-readconfig", str(configuration), serial=serial)

    async def run() -> None:
        vm = await restore(saved.path, command)
        try:
            assert vm.report.mode is Mode.LAZY
            assert "describes memory" in vm.report.why
            assert vm.lazy is not None
            await vm.lazy.completed()
            await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


def test_auto_loads_and_says_why_where_it_can_be_neither_mapped_nor_lazy(
    saved: Saved, disk: Path, tmp_path: Path
) -> None:
    serial, configuration = tmp_path / "serial", tmp_path / "vm.cfg"
    configuration.write_text(f'[memory]\n  size = "{M}M"\n')
    command = [
        *saved.command("-M", "pc", "-readconfig", str(configuration), serial=serial),
        *("-mem-path", str(disk / "ram")),
    ]

    async def run() -> None:
        vm = await restore(saved.path, command)
        try:
            assert vm.report.mode is Mode.LOAD
            assert "describes memory" in vm.report.why
            assert "QEMU fills only memory files on tmpfs" in vm.report.why
            await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


def test_auto_is_lazy_where_qemu_does_not_start_with_mapped_memory(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program around QEMU that closes the descriptors it does not know."""
    monkeypatch.setenv("FAULT", "can't open backing store /proc/self/fd/7 for guest RAM")
    serial, wrapper = tmp_path / "serial", tmp_path / "wrapper"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *memory-backend-file*) echo "$FAULT" >&2; exit 1;; esac\n'
        'exec qemu-system-x86_64 "$@"\n'
    )
    wrapper.chmod(0o755)
    command = [str(wrapper), *saved.command(serial=serial)[1:]]

    async def run() -> None:
        vm = await restore(saved.path, command)
        try:
            assert vm.report.mode is Mode.LAZY
            assert "open backing store" in vm.report.why
            assert vm.lazy is not None
            await vm.lazy.completed()
            await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


def test_reason_why_memory_could_not_be_mapped_is_not_lost(saved: Saved, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *memory-backend-file*) echo "no backing store";; '
        '*) echo "port is in use";; esac >&2\nexit 1\n'
    )
    wrapper.chmod(0o755)
    error = attempt(saved.path, [str(wrapper), *saved.command(serial=tmp_path / "serial")[1:]])
    assert isinstance(error, QemuError)
    assert str(error).index("port is in use") < str(error).index("no backing store")


def test_qemu_that_fails_for_another_reason_is_started_once(saved: Saved, tmp_path: Path) -> None:
    wrapper, starts = tmp_path / "wrapper", tmp_path / "starts"
    wrapper.write_text(f'#!/bin/sh\necho once >> {starts}\nexec qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        local = f"localaddr=127.0.0.1,localport={taken.getsockname()[1]}"
        command = saved.command(
            *PC, "-chardev", f"udp,id=c,host=127.0.0.1,port=9,{local}", serial=tmp_path / "serial"
        )
        error = attempt(saved.path, [str(wrapper), *command[1:]])
    assert "Address already in use" in str(error)
    assert starts.read_text() == "once\n"


def test_cancelled_restore_ends_its_qemu(saved: Saved, tmp_path: Path) -> None:
    async def run() -> None:
        for delay in (0.0, 0.005, 0.02, 0.05):
            task = asyncio.create_task(
                restore(saved.path, saved.command(serial=tmp_path / "serial"), mode="load")
            )
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
