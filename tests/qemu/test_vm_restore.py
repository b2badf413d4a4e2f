"""A guest that QEMU saved goes on in a new QEMU, however its memory gets there."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.launch import launch
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.saved import (
    RAM,
    Saved,
    fill,
    goes_on,
    memory_of,
    migrate,
    save_guest,
    serial_says,
)
from tests.harness.unpacked import emulator
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

M = str(RAM >> 20)
NODES = [
    "-m",
    M,
    "-object",
    f"memory-backend-ram,id=m0,size={RAM // 2}",
    "-object",
    f"memory-backend-memfd,id=m1,size={RAM // 2},share=on",
    "-numa",
    "node,memdev=m0",
    "-numa",
    "node,memdev=m1",
]
DEVICES = ["-vga", "std", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"]
MACHINES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "pc": (["-M", "pc", "-m", M], ("pc.ram",)),
    "q35 with devices": (["-M", "q35", "-m", M, *DEVICES], ("pc.ram",)),
    "microvm": (["-M", "microvm", "-m", M], ("microvm.ram",)),
    "two nodes": (["-M", "pc", *NODES], ("m0", "m1")),
}
# Other ways to say the same memory as ``-M pc -m``.
SPELLINGS = {
    "memfd": [
        "--machine",
        "pc,memory-backend=pc.ram",
        "-m",
        M,
        "-object",
        f"memory-backend-memfd,id=pc.ram,size={M}M,share=on,prealloc=on",
    ],
    "json": [
        "-M",
        "pc",
        "-machine",
        "memory-backend=pc.ram",
        "-m",
        M,
        "-object",
        f'{{"qom-type":"memory-backend-ram","id":"pc.ram","size":{RAM}}}',
    ],
    "json of libvirt": [
        "-M",
        "pc",
        "-machine",
        "memory-backend=pc.ram",
        "-m",
        M,
        "-object",
        f'{{"qom-type":"memory-backend-ram","id":"pc.ram","size":{RAM},"host-nodes":[0],'
        '"policy":"bind","prealloc":true,"merge":false}',
    ],
    "nodes of the host": [
        "-M",
        "pc,memory-backend=pc.ram",
        "-m",
        M,
        "-object",
        f"memory-backend-ram,id=pc.ram,size={RAM},host-nodes=0,host-nodes=0,policy=bind,dump=off",
    ],
    "mem-path": ["-M", "pc", "-m", f"size={RAM >> 10}k", "-mem-path", "/dev/shm", "-mem-prealloc"],
}


@pytest.fixture(scope="module", params=MACHINES)
def saved(request: pytest.FixtureRequest, module_disk: Path) -> Saved:
    arguments, blocks = MACHINES[request.param]
    directory = module_disk / request.param.replace(" ", "-")
    directory.mkdir()
    return save_guest(directory, arguments, blocks)


@pytest.fixture(scope="module")
def saved_pc(module_disk: Path) -> Saved:
    directory = module_disk / "plain"
    directory.mkdir()
    return save_guest(directory, *MACHINES["pc"])


@pytest.fixture
def serial(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "serial"


async def prove(saved: Saved, serial: Path, command: list[str], mode: str) -> RestoredVm:
    """Restore paused, compare all memory, let it run and see it go on."""
    vm = await restore(saved.path, command, mode=mode, paused=True)
    try:
        assert vm.report.run_state == "paused"
        if vm.lazy is not None:
            await vm.lazy.completed()
        assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
        await vm.monitor.execute("cont")
        await goes_on(saved, vm, serial)
    finally:
        await vm.end()
    return vm


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_guest_goes_on_where_it_was_saved(saved: Saved, serial: Path, mode: str) -> None:
    vm = asyncio.run(prove(saved, serial, saved.command(serial=serial), mode))
    assert vm.report.mode == mode
    assert set(vm.report.mapped_blocks) == (set(saved.blocks) if mode == "instant" else set())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_memory_is_mapped_however_the_command_line_asks_for_it(
    saved_pc: Saved, serial: Path, spelling: str
) -> None:
    command = saved_pc.command(*SPELLINGS[spelling], serial=serial)
    vm = asyncio.run(prove(saved_pc, serial, command, "auto"))
    assert vm.report.mode is Mode.INSTANT


@pytest.mark.parametrize("mode", ["instant", "load"])
@pytest.mark.parametrize("grows", [True, False])
def test_tables_of_the_firmware_may_have_another_length(
    disk: Path, serial: Path, mode: str, grows: bool
) -> None:
    """As another QEMU makes them: it takes the length of the snapshot."""
    (disk / "table").write_bytes(bytes(range(250)) * 240)
    more = [word for n in range(3) for word in ("-acpitable", f"sig=TST{n},data={disk}/table")]
    pc = MACHINES["pc"][0]
    saved = save_guest(disk, [*pc, *more] if grows else pc)
    command = saved.command(*pc, *([] if grows else more), serial=serial)

    async def run() -> None:
        vm = await restore(saved.path, command, mode=mode)
        try:
            memory = await memory_of(vm.monitor, vm.process.pid)
            name = "/rom@etc/acpi/tables"
            assert len(memory[name]) == len(saved.memory[name])
            await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


def test_old_bytes_under_clear_bits_do_not_reach_the_guest(disk: Path, serial: Path) -> None:
    saved = save_guest(disk, *MACHINES["pc"])
    with open_snapshot(saved.path) as snapshot, saved.path.open("r+b") as file:
        block = snapshot.blocks["pc.ram"]
        clear = [page for page in range(block.num_pages) if not block.bitmap[page]]
        for page in clear:
            file.seek(block.pages_offset + page * block.page_size)
            file.write(b"\xee" * block.page_size)
    assert len(clear) > 1000
    vm = asyncio.run(prove(saved, serial, saved.command(serial=serial), "instant"))
    assert vm.report.stale_pages == len(clear)


def test_running_guest_runs_at_once(saved_pc: Saved, serial: Path) -> None:
    async def run() -> None:
        vm = await restore(saved_pc.path, saved_pc.command(serial=serial))
        try:
            assert vm.report.run_state == "running"
            await goes_on(saved_pc, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.mark.parametrize(("paused", "state"), [(None, "paused"), (False, "running")])
def test_guest_saved_paused_runs_when_that_is_asked(
    disk: Path, serial: Path, paused: bool | None, state: str
) -> None:
    saved = save_guest(disk, *MACHINES["pc"], paused=True)

    async def run() -> None:
        vm = await restore(saved.path, saved.command(serial=serial), paused=paused)
        try:
            assert vm.report.run_state == state
            assert any("cont resumes it" in note for note in vm.report.notes) == (paused is None)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_stream_behind_a_header_is_restored(disk: Path, serial: Path, mode: str) -> None:
    saved = save_guest(disk, *MACHINES["pc"], offset=70001)

    async def run() -> None:
        vm = await restore(
            saved.path, saved.command(serial=serial), mode=mode, offset=70001, paused=True
        )
        try:
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("mode", "ran", "stop"),
    [
        ("instant", True, False),
        ("load", True, False),
        ("load", False, False),
        ("instant", True, True),
    ],
)
def test_image_of_libvirt_goes_on_as_its_header_says_unless_it_is_to_stop(
    disk: Path, serial: Path, mode: str, ran: bool, stop: bool
) -> None:
    """libvirt pauses the guest itself, before it saves."""
    header = LibvirtHeader(
        complete=True,
        version=2,
        format=ImageFormat.SPARSE,
        was_running=ran,
        xml="<domain/>",
        cookie="",
        stream_offset=92 + 4000,
        byte_order="little",
    )
    saved = save_guest(disk, *MACHINES["pc"], offset=header.stream_offset, paused=True)
    with saved.path.open("r+b") as file:
        file.write(encode_header(header))

    async def run() -> None:
        command = [*saved.command(serial=serial), *["-S"] * stop]
        vm = await restore(saved.path, command, mode=mode)
        try:
            assert vm.report.run_state == ("running" if ran and not stop else "paused")
            if ran and not stop:
                await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("channels", [1, 4])
def test_all_of_the_file_is_read_by_any_settings(
    saved_pc: Saved, serial: Path, channels: int, direct_io: str
) -> None:
    async def run() -> None:
        vm = await restore(
            saved_pc.path,
            saved_pc.command(serial=serial),
            mode="load",
            paused=True,
            channels=channels,
            direct_io=direct_io,
        )
        try:
            assert vm.report.settings["multifd-channels"] == channels
            assert vm.report.settings["direct-io"] == (direct_io == "on")
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved_pc.memory)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("mode", "preset"),
    [
        ("load", "postcopy-ram"),
        ("auto", "postcopy-ram"),
        ("instant", "multifd"),
        ("instant", "xbzrle"),
        ("load", "xbzrle"),
    ],
)
def test_capabilities_of_the_command_line_do_not_prevent_a_restore(
    saved_pc: Saved, serial: Path, preset: str, mode: str
) -> None:
    command = [*saved_pc.command(serial=serial), "-global", f"migration.x-{preset}=on"]
    asyncio.run(prove(saved_pc, serial, command, mode))


def test_program_before_qemu_starts_it(saved_pc: Saved, serial: Path) -> None:
    command = ["env", "A=b", "nice", *saved_pc.command(serial=serial)]
    asyncio.run(prove(saved_pc, serial, command, "instant"))


@pytest.mark.parametrize("option", ["mode", "direct_io"])
def test_value_that_is_none_is_wrong_usage(saved_pc: Saved, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} must be one of .*, not 'x'"):
        asyncio.run(restore(saved_pc.path, ["qemu"], **{option: "x"}))  # type: ignore[arg-type]
    if option == "mode":
        with pytest.raises(UsageError, match=r"mode must be one of .*, not 'x'"):
            asyncio.run(clone(saved_pc.path, ["qemu"], 1, mode="x"))


def test_postcopy_is_used_where_qemu_has_it(saved_pc: Saved, serial: Path) -> None:
    """QEMU takes postcopy-ram together with mapped-ram after 11.1; until then it is refused."""

    async def run() -> None:
        refused = (
            contextlib.nullcontext()
            if qemu_version() > (11, 1)
            else pytest.raises(NotSupported, match="does not accept mapped-ram with postcopy-ram")
        )
        with refused:
            vm = await restore(saved_pc.path, saved_pc.command(serial=serial), mode="postcopy")
        if qemu_version() <= (11, 1):
            return
        try:
            await goes_on(saved_pc, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


def test_monitors_of_the_command_line_work_besides_the_added_one(
    saved_pc: Saved, serial: Path, tmp_path: Path
) -> None:
    own, added = tmp_path / "own.qmp", tmp_path / "added.qmp"
    command = [*saved_pc.command(serial=serial), "-qmp", f"unix:{own},server=on,wait=off"]

    async def run() -> None:
        vm = await restore(saved_pc.path, command, qmp=added)
        try:
            for path in (own, added):
                async with await Monitor.connect(path) as monitor:
                    assert (await monitor.execute("query-status"))["running"]
            assert (await vm.monitor.execute("query-fdsets")) == []
        finally:
            await vm.end()

    asyncio.run(run())


def test_guest_goes_on_without_our_session(saved_pc: Saved, serial: Path) -> None:
    async def run() -> None:
        vm = await restore(saved_pc.path, saved_pc.command(serial=serial))
        async with vm:
            pass
        try:
            said = len(serial.read_bytes())
            await asyncio.to_thread(serial_says, serial, said + 2)
            assert vm.process.poll() is None
            vm.process.terminate()
            assert await vm.wait() == 0
        finally:
            vm.process.kill()

    asyncio.run(run())


def test_standard_streams_are_the_guests(saved_pc: Saved, tmp_path: Path) -> None:
    """Its serial port on standard output; standard error arrives after the guest is there."""
    out, errors = tmp_path / "out", tmp_path / "errors"
    command = [*saved_pc.command(serial=tmp_path / "none")[:-1], "stdio"]

    async def run() -> None:
        with out.open("wb") as stdout, errors.open("wb") as stderr:
            vm = await restore(
                saved_pc.path, command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )
        try:
            await asyncio.to_thread(serial_says, out, 2)
            vm.process.terminate()
            await vm.wait()
        finally:
            await vm.end()
        assert b"terminating on signal 15" in await asyncio.to_thread(serial_says, errors, 20)

    asyncio.run(run())


def test_default_monitor_stays_where_it_was(tmp_path: Path) -> None:
    """With -nographic it shares standard input and output with the serial port: Ctrl-A c."""
    command = CommandLine.parse(
        ["qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-m", M, "-nographic", "-S"]
    )

    async def run() -> None:
        out = tmp_path / "out"
        with out.open("wb") as stdout:
            qemu = await launch(command, [], stdin=subprocess.PIPE, stdout=stdout)
        try:
            assert qemu.process.stdin is not None
            with qemu.process.stdin as stdin:
                stdin.write(b"\x01c")
                stdin.flush()
                assert b"monitor - type 'help'" in await asyncio.to_thread(serial_says, out, 40)
        finally:
            await qemu.end()

    asyncio.run(run())


def lock_is_free(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def test_file_is_locked_as_long_as_a_guest_is_mapped_from_it(saved_pc: Saved, serial: Path) -> None:
    async def run() -> None:
        async with await restore(saved_pc.path, saved_pc.command(serial=serial)) as vm:
            assert not lock_is_free(saved_pc.path)
            vm.process.kill()
            await vm.wait()
            assert lock_is_free(saved_pc.path)

    asyncio.run(run())


def test_loaded_guest_holds_nothing(saved_pc: Saved, serial: Path) -> None:
    async def run() -> None:
        vm = await restore(saved_pc.path, saved_pc.command(serial=serial), mode="load")
        try:
            assert lock_is_free(saved_pc.path)
        finally:
            await vm.end()

    asyncio.run(run())


def test_snapshot_may_be_replaced_while_a_guest_runs_from_it(disk: Path, serial: Path) -> None:
    saved = save_guest(disk, *MACHINES["pc"])

    async def run() -> None:
        vm = await restore(saved.path, saved.command(serial=serial), paused=True)
        try:
            new = disk / "new"
            new.write_bytes(b"\xee" * saved.path.stat().st_size)
            new.rename(saved.path)
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
        finally:
            await vm.end()

    asyncio.run(run())


def test_guest_does_not_change_the_snapshot(disk: Path, serial: Path) -> None:
    saved = save_guest(disk, *MACHINES["pc"])
    before = saved.path.read_bytes()
    asyncio.run(prove(saved, serial, saved.command(serial=serial), "instant"))
    assert saved.path.read_bytes() == before


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_guest_of_another_architecture_is_restored(disk: Path, mode: str) -> None:
    """It never ran: what it has in its memory was put there."""
    command = [
        emulator("aarch64"),
        "-accel",
        "tcg",
        "-M",
        "virt",
        "-cpu",
        "cortex-a57",
        "-m",
        M,
        "-nodefaults",
        "-display",
        "none",
        "-S",
    ]
    path = disk / "guest.mapped"

    async def saved() -> dict[str, bytes]:
        async with await launch(CommandLine.parse(command), []) as qemu:
            try:
                await fill(qemu.monitor, qemu.process.pid, "mach-virt.ram")
                await migrate(qemu.monitor, f"file:{path}")
                return await memory_of(qemu.monitor, qemu.process.pid)
            finally:
                await qemu.end()

    async def run() -> None:
        memory = await saved()
        vm = await restore(path, command, mode=mode)
        try:
            assert vm.report.run_state == "prelaunch"
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), memory)
        finally:
            await vm.end()

    asyncio.run(run())
