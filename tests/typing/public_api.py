"""A program that uses the whole public interface, checked by mypy and pyright and never run.

``make types`` checks it against the installed wheel, in an environment of its own.
"""

import asyncio
import contextlib
import mmap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_type

import pyqmigrate
from pyqmigrate import (
    Algorithm,
    Block,
    BlockDiff,
    Capabilities,
    Clear,
    CompactReport,
    CpuRegisters,
    Descriptors,
    Device,
    DeviceDiff,
    Devices,
    DeviceSection,
    DiffReport,
    DirectIO,
    FdSets,
    FieldDiff,
    FileMemory,
    Format,
    Guest,
    ImageReport,
    IncrementBlock,
    IncrementSnapshot,
    Job,
    LoadReport,
    MappedRamSnapshot,
    Migration,
    PageRange,
    Parameters,
    Placement,
    Policy,
    ProcessMemory,
    Progress,
    Provenance,
    RamBlock,
    SaveReport,
    SealCheck,
    SealReport,
    SequentialSnapshot,
    Snapshot,
    Sparse,
    errors,
    vm,
)
from pyqmigrate.qmp import Event, MigrationBackend, QmpServer, Version
from pyqmigrate.vm import sync


def show(progress: Progress) -> None:
    assert_type(progress.bytes_done, int)
    assert_type(progress.rate, float)


def saves(path: Path, memory: mmap.mmap, fd: int) -> None:
    blocks = [
        RamBlock("pc.ram", memory),
        RamBlock("vga.vram", bytearray(1 << 20)),
        RamBlock("pc.rom", FileMemory(fd, 0, 4096)),
        RamBlock("dimm0", ProcessMemory(fd, 0x7F0000000000, 4096)),
    ]
    report = pyqmigrate.save(
        path,
        blocks,
        channels=4,
        direct_io="auto",
        sparse=Sparse.EXACT,
        machine="pc-q35-10.0",
        target_page_bits=12,
        reuse=False,
        max_bandwidth=0,
        seal=Algorithm.BLAKE3,
        progress=show,
    )
    assert_type(report, SaveReport)
    assert_type(report.direct_io_reason, str)
    assert_type(report.unaligned_blocks, tuple[str, ...])
    pyqmigrate.save(Descriptors(fd, fd, 4096), tuple(blocks), direct_io=DirectIO.ON)
    job = pyqmigrate.start_save(str(path), blocks, seal="sha256")
    assert_type(job, Job[SaveReport])
    assert_type(job.progress, Progress)
    job.set_max_bandwidth(100 << 20)
    job.cancel()
    assert_type(job.result(60), SaveReport)
    assert_type(job.wait(show), SaveReport)
    assert_type(job.done(), bool)


async def awaits(path: Path, blocks: Sequence[RamBlock]) -> SaveReport:
    async with asyncio.timeout(60):
        return await pyqmigrate.start_save(path, blocks)


def reads(path: Path, memories: Mapping[str, FileMemory]) -> None:
    with pyqmigrate.open_snapshot(path, bitmap_order="big", page_size=4096, index="x") as snapshot:
        assert_type(snapshot, Snapshot)
        assert_type(snapshot.machine, str)
        for name, block in snapshot.blocks.items():
            assert_type(name, str)
            assert_type(block, Block)
            assert_type(block.read(0, 16), bytes)
            for first, end, has_data in block.runs():
                assert_type((first, end, has_data), tuple[int, int, bool])
        snapshot.verify()
        assert_type(snapshot.load(memories, clear=Clear.LEAVE, progress=show), LoadReport)
        assert_type(pyqmigrate.provenance(snapshot), Provenance)
        if isinstance(snapshot, MappedRamSnapshot):
            assert_type(snapshot.blocks["pc.ram"].pages_offset, int)
    assert_type(pyqmigrate.start_load(path, memories, channels=2), Job[LoadReport])
    with pyqmigrate.open_snapshot(path) as snapshot:
        if isinstance(snapshot, SequentialSnapshot):
            snapshot.read_through(show)
    with pyqmigrate.open_snapshot(path, base="/snap/golden") as snapshot:
        if isinstance(snapshot, IncrementSnapshot):
            assert_type(snapshot.base.machine, str)
            assert_type(snapshot.changed_pages, int)
            assert_type(snapshot.blocks["pc.ram"], IncrementBlock)
    found = pyqmigrate.devices(path, name="cpu")
    assert_type(found, Devices)
    assert_type(found.devices, tuple[Device, ...])
    assert_type(pyqmigrate.cpu_registers(found.devices), tuple[CpuRegisters, ...])


def seals(path: Path) -> None:
    assert_type(pyqmigrate.seal(path, algorithm="xxh3-128", progress=show), SealReport)
    check = pyqmigrate.verify_seal(path)
    assert_type(check, SealCheck | None)
    for damage in check.damages if check else ():
        assert_type(damage.offset, int)
        assert_type(damage.parts[0].first_page, int | None)


def converts(path: Path, snapshot: Snapshot) -> None:
    """What is returned depends on ``to``."""
    assert_type(pyqmigrate.convert(path, "a", to="mapped-ram"), SaveReport)
    assert_type(pyqmigrate.convert(snapshot, "b", to="stream"), SaveReport)
    assert_type(pyqmigrate.convert(snapshot, "c", to=Format.SEQUENTIAL), SaveReport)
    assert_type(
        pyqmigrate.convert(path, "d", to="libvirt", like="old", image_format="raw"), SaveReport
    )
    placements = [pyqmigrate.parse_placement("pc.ram@0x0")]
    elf = pyqmigrate.convert(path, "e", to="elf", placements=placements, byte_order="little")
    assert_type(elf, ImageReport)
    assert_type(elf.ranges, tuple[Placement, ...])
    lime = pyqmigrate.convert(path, "f", to=Format.LIME, max_ram_below_4g=1 << 31)
    assert_type(lime.unplaced, tuple[str, ...])
    raw = pyqmigrate.convert(path, "g", to="raw")
    assert_type(raw.blocks[0].name, str)


def compares(path: Path, snapshot: Snapshot) -> None:
    report = pyqmigrate.diff(path, snapshot, pages=True, fields=True, progress=show)
    assert_type(report, DiffReport)
    assert_type(report.blocks[0], BlockDiff)
    assert_type(report.blocks[0].ranges, tuple[PageRange, ...] | None)
    assert_type(report.devices[0], DeviceDiff)
    assert_type(report.devices[0].fields, tuple[FieldDiff, ...] | None)
    assert_type(report.to_json(), dict[str, Any])
    compacted = pyqmigrate.compact(snapshot, "h", level=3, channels=1)
    assert_type(compacted, CompactReport)
    assert_type(compacted.compact_size, int)


async def running(snapshot: Path) -> None:
    guest = vm.connect("/run/guest.qmp")
    assert_type(guest, vm.Vm)
    saved = await guest.save(
        snapshot,
        engine="direct",
        live=vm.LiveMethod.CONVERGE,
        max_pause=0.02,
        base=None,
        full=False,
        keep_digests=False,
        then=vm.Then.QUIT,
        channels=4,
        direct_io="on",
        sparse="auto",
        with_disks=True,
        seal="xxh3-128",
        describe=True,
        set_time=False,
        guest_agent=None,
        progress=show,
    )
    assert_type(saved, vm.VmSaveReport)
    assert_type(saved.downtime, float | None)
    assert_type(saved.method, vm.LiveMethod | None)
    assert_type(saved.instant, vm.Instant)
    increment = await guest.save(snapshot, base="auto")
    assert_type(increment.base, str | None)
    assert_type(increment.changed_pages, int | None)
    check = await guest.check("/snap", engine="auto", live=True, sparse=Sparse.DENSE)
    assert_type(check, vm.CheckReport)
    command = ["qemu-system-x86_64", "-m", "4G"]
    restored = await vm.restore(snapshot, command, mode=vm.Mode.INSTANT, paused=True, qmp="a.qmp")
    assert_type(restored, vm.RestoredVm)
    assert_type(restored.report, vm.RestoreReport)
    assert_type(restored.report.load_seconds, float)
    assert_type(await restored.wait(), int)
    recorded = await vm.restore(snapshot, base="/snap/golden", record=10)
    if recorded.recording is not None:
        assert_type(await recorded.recording, vm.WorkingSetReport)
    await restored.close()
    clones = await vm.clone(snapshot, command, 3, directory="/run", at_once=2, base="/snap/golden")
    assert_type(clones, list[vm.Clone])
    async with vm.Pool(snapshot, command, ready=2, directory="/run", limit=8) as pool:
        pooled = await pool.take(paused=True)
        assert_type(pooled, vm.PooledGuest)
        assert_type(await pool.reset(pooled), vm.PooledGuest)
        async with vm.PoolServer(pool, "/run/pool", keep=True) as server:
            assert_type(server.path, Path)
    async with await vm.Monitor.connect("/run/guest.qmp") as monitor:
        answer: Any = await monitor.execute("query-status")
        print(answer["status"])


def running_without_asyncio(snapshot: Path) -> None:
    """The types of the options are those of ``vm``: a wrong one is found."""
    guest = sync.connect("/run/guest.qmp")
    assert_type(guest, sync.Vm)
    assert_type(guest.save(snapshot, then="quit", channels=4, progress=show), vm.VmSaveReport)
    guest.save(snapshot, channels="4")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    guest.save(snapshot, chanels=4)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    assert_type(guest.check("/snap", live=True), vm.CheckReport)
    guest.save(snapshot, live="converge", max_pause=0.02)
    guest.save(snapshot, base=snapshot, full=True)
    restored = sync.restore(snapshot, ["qemu-system-x86_64"], mode="load", paused=False)
    assert_type(restored, sync.RestoredVm)
    assert_type(restored.report, vm.RestoreReport)
    restored.process.wait()
    recording = sync.restore(snapshot, base="/snap/golden", record=2.5).recording
    assert_type(recording, vm.WorkingSetReport | pyqmigrate.PyqmigrateError | None)
    assert_type(sync.clone(snapshot, None, 2, directory="/run"), list[sync.Clone])


class Vmm(Guest):
    def dirty(self) -> Mapping[str, bytes]:
        return {"toy.ram": bytes(8)}

    def save_devices(self) -> Sequence[DeviceSection]:
        return [DeviceSection("toy-timer", bytes(8))]

    def load_devices(self, devices: Sequence[DeviceSection]) -> None:
        for device in devices:
            print(device.name, device.data)


async def embeds(memory: mmap.mmap) -> None:
    sets = FdSets()
    migration = Migration(
        [RamBlock("toy.ram", memory)],
        guest=Vmm(),
        fdsets=sets,
        policy=Policy.COMPAT_10_0,
        capabilities=Capabilities(),
        parameters=Parameters(),
    )
    backend: MigrationBackend = migration
    migration.set_capabilities({"mapped-ram": True})
    async with QmpServer(backend, migration.fdsets, version=Version(10, 0, 2)) as server:
        await server.listen("/run/toy.qmp")
        server.send_event(Event("STOP", None, time.time()))
        await asyncio.to_thread(migration.migrate, "file:/snap/toy")
        status = await asyncio.to_thread(migration.wait)
        print(status.status)
    migration.close()


def fails(path: Path) -> None:
    try:
        pyqmigrate.save(path, [])
    except pyqmigrate.NoSpace as error:
        assert_type(error.errno, int | None)
    except errors.TargetError as error:
        print(error.filename)
    except pyqmigrate.LiveSaveAbandoned as error:
        print(error)
    except pyqmigrate.SnapshotError as error:
        assert_type(error.block, str | None)
        assert_type(error.offset, int | None)
    with contextlib.suppress(pyqmigrate.PyqmigrateError):
        pyqmigrate.open_snapshot(path)
