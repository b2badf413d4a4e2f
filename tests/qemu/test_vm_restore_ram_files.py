"""A file that guest RAM is loaded into: never another guest's, and never with old content in it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.report import RestoreReport
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.pattern_guest import build
from tests.harness.saved import RAM, Saved, memory_of, migrate, save_guest, serial_says

pytestmark = pytest.mark.qemu


def on_file(path: Path, more: str = "share=on") -> list[str]:
    return [
        "-M",
        "pc,memory-backend=pc.ram",
        "-m",
        str(RAM >> 20),
        "-object",
        f"memory-backend-file,id=pc.ram,size={RAM},mem-path={path},{more}",
    ]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, ["-M", "pc", "-m", str(RAM >> 20)], paused=True)


def restored(saved: Saved, serial: Path, *arguments: str, mode: str = "load") -> RestoreReport:
    """The report of a restore into this memory, which then is what was saved."""

    async def run() -> RestoreReport:
        command = saved.command(*arguments, serial=serial)
        vm = await restore(saved.path, command, mode=mode, paused=True)
        try:
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
            return vm.report
        finally:
            await vm.end()

    return asyncio.run(run())


@pytest.mark.parametrize("mode", ["load", "auto"])
def test_memory_of_a_guest_that_lives_is_never_loaded_into(
    disk: Path, shm: Path, tmp_path: Path, mode: str
) -> None:
    """As after a save that leaves the source running, its command line given again."""
    ram, path, serial = shm / "ram", disk / "guest.mapped", tmp_path / "serial"
    image = build(disk, RAM)
    words = [*on_file(ram), "-bios", str(image)]
    # What keeps auto from mapping memory, and is nothing to a load.
    hindrance = ["-readconfig", str(disk / "cfg")] if mode == "auto" else []
    (disk / "cfg").write_text("# [memory]\n")
    with BareQemu(*words, "-serial", f"file:{serial}", run=True) as source:
        serial_says(serial, 2)

        async def run(monitor: Monitor) -> None:
            await monitor.execute("stop")
            await migrate(monitor, f"file:{path}")
            await monitor.execute("cont")
            await asyncio.to_thread(serial_says, serial, len(serial.read_bytes()) + 1)
            await monitor.execute("stop")
            before = await memory_of(monitor, source.process.pid)
            command = [
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-nodefaults",
                "-display",
                "none",
                *words,
                "-serial",
                f"file:{tmp_path / 'other'}",
                *hindrance,
            ]
            with pytest.raises(UsageError) as caught:
                await restore(path, command, mode=mode)
            assert f"process {source.process.pid} (qemu-system" in str(caught.value)
            assert_same_blocks(await memory_of(monitor, source.process.pid), before)

        source.run(run)


def test_what_a_file_held_does_not_reach_the_guest(saved: Saved, shm: Path, tmp_path: Path) -> None:
    (shm / "ram").write_bytes(b"\xee" * RAM)
    report = restored(saved, tmp_path / "serial", *on_file(shm / "ram"))
    assert any("ram' is replaced" in note for note in report.notes)


def test_file_that_is_not_there_or_empty_is_harmless(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    report = restored(saved, tmp_path / "serial", *on_file(shm / "ram"))
    assert not any("ram'" in note for note in report.notes)
    os.truncate(shm / "ram", 0)
    restored(saved, tmp_path / "serial", *on_file(shm / "ram"))


def test_private_file_that_holds_something_is_refused(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    (shm / "ram").write_bytes(b"\xee" * RAM)
    with pytest.raises(UsageError, match="contains data"):
        restored(saved, tmp_path / "serial", *on_file(shm / "ram", "share=off"))
    assert (shm / "ram").read_bytes() == b"\xee" * RAM


def test_qemu_that_does_not_start_leaves_the_file_as_it_was(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    (shm / "ram").write_bytes(b"\xee" * RAM)
    with pytest.raises(RuntimeError, match="no-such-device"):
        restored(saved, tmp_path / "s", *on_file(shm / "ram"), "-device", "no-such-device")
    assert (shm / "ram").read_bytes() == b"\xee" * RAM


def test_memory_path_that_holds_something_is_left_out(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    (shm / "ram").write_bytes(b"\xee" * RAM)
    words = ["-M", "pc", "-m", str(RAM >> 20), "-mem-path", str(shm / "ram")]
    report = restored(saved, tmp_path / "serial", *words)
    assert any("-mem-path" in note for note in report.notes)
    assert (shm / "ram").read_bytes() == b"\xee" * RAM


def test_memory_path_to_make_files_in_is_kept(saved: Saved, shm: Path, tmp_path: Path) -> None:
    words = ["-M", "pc", "-m", str(RAM >> 20), "-mem-path", str(shm)]
    report = restored(saved, tmp_path / "serial", *words)
    assert not any("-mem-path" in note for note in report.notes)


def test_nothing_is_written_into_memory_before_the_snapshot(
    saved: Saved, shm: Path, tmp_path: Path
) -> None:
    report = restored(
        saved, tmp_path / "serial", *on_file(shm / "ram", "share=on,prealloc=on"), "-mem-prealloc"
    )
    assert {"-mem-prealloc", "prealloc=on"} <= {note.split(" ")[0] for note in report.notes}
