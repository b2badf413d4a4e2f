"""Lazy restores over kinds of memory, machines, devices and forms of the snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate.store.store import Store
from pyqmigrate.vm.incoming.clone import clone
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.covering import covering
from tests.harness.huge_pages import huge_pages
from tests.harness.increments import save_twice, write_increment
from tests.harness.lazy_guest import blocks_of
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.saved import RAM, Saved, goes_on, memory_of, save_guest
from tests.harness.stored_guests import store_file
from tests.harness.writing_guest import GuestSetup

__all__ = ["object_store"]

pytestmark = pytest.mark.qemu

MIB = 1 << 20
M = str(RAM // MIB)
PATIENCE = 120.0  # seconds

# Options of the memory backend, and whether it needs huge pages of hugetlbfs. {shm} is a directory.
MEMORY = {
    "default": None,
    "private": "ram",
    "shared": "ram,share=on",
    "prealloc": "ram,prealloc=on",
    "memfd, shared": "memfd,share=on",
    "memfd, private": "memfd,share=off",
    "tmpfs, shared": "file,share=on,mem-path={shm}/ram",
    "tmpfs, private": "file,share=off,mem-path={shm}/ram",
    "hugetlb, shared": "memfd,share=on,hugetlb=on,hugetlbsize=2M",
    "hugetlb, private": "memfd,share=off,hugetlb=on,hugetlbsize=2M",
}
MACHINES = {
    "pc": ("pc.ram", ("-M", "pc")),
    "q35": ("pc.ram", ("-M", "q35")),
    "microvm": ("microvm.ram", ("-M", "microvm")),
    "isapc": ("pc.ram", ("-M", "isapc", "-cpu", "486")),
}
DEVICES = {
    "virtio": (
        *("-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
        *("-device", "virtio-serial-pci", "-chardev", "null,id=port"),
        *("-device", "virtserialport,chardev=port"),
        *("-blockdev", "null-co,node-name=disk,size=1048576,read-zeroes=on"),
        *("-device", "virtio-blk-pci,drive=disk"),
    ),
    "VGA and USB": ("-device", "VGA", "-device", "qemu-xhci", "-device", "usb-tablet"),
    "two processors": ("-smp", "2"),
    "virtio-mem": (
        *("-object", "memory-backend-ram,id=more,size=64M"),
        *("-device", "virtio-mem-pci,memdev=more,requested-size=16M"),
    ),
}


def machine(name: str, kind: str, directory: Path, *, maximum: str = "") -> list[str]:
    """The options of a machine with memory of a kind."""
    block, words = MACHINES[name]
    size = ["-m", M + maximum]
    backend = MEMORY[kind]
    if backend is None:
        return [*words, *size]
    kind_, _, more = backend.partition(",")
    more = more.format(shm=directory)
    return [
        *(words[0], f"{words[1]},memory-backend={block}", *words[2:], *size),
        *("-object", f"memory-backend-{kind_},id={block},size={M}M,{more}".removesuffix(",")),
    ]


@pytest.fixture(scope="module")
def guests(module_disk: Path) -> Callable[[str, str | None], Saved]:
    """Saves the guest of a machine with devices, once."""
    known: dict[tuple[str, str | None], Saved] = {}

    def saved(name: str, devices: str | None = None) -> Saved:
        if (name, devices) not in known:
            directory = Path(tempfile.mkdtemp(dir=module_disk))
            words = [*machine(name, "default", directory, maximum=maximum_of(devices))]
            words += DEVICES[devices] if devices else ()
            known[name, devices] = save_guest(directory, words, (MACHINES[name][0],))
        return known[name, devices]

    return saved


def maximum_of(devices: str | None) -> str:
    return ",maxmem=256M" if devices == "virtio-mem" else ""


@contextlib.asynccontextmanager
async def restored(
    snapshot: Path | str, command: list[str], mode: str, **options: Any
) -> AsyncIterator[RestoredVm]:
    """A guest that was restored paused, as soon as it has all of its memory."""
    vm = await restore(snapshot, command, mode=mode, paused=True, **options)
    try:
        assert vm.report.mode is Mode.LAZY, vm.report.why
        assert vm.lazy is not None
        state = await asyncio.wait_for(vm.lazy.completed(), PATIENCE)
        assert (state.pages_left, state.damages, state.restarts) == (0, (), 0)
        assert (await vm.monitor.execute("query-migrate"))["status"] == "completed"
        yield vm
    finally:
        await vm.end()


async def assert_restored(saved: Saved, words: list[str], serial: Path, shm: Path) -> None:
    """Restore lazily; every block is as it was saved, and then the guest goes on with its pattern.

    ``shm`` is where a memory file is; QEMU leaves it behind.
    """
    command = saved.command(*words, serial=serial)
    async with restored(saved.path, command, "lazy") as vm:
        assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
        await vm.monitor.execute("cont")
        await goes_on(saved, vm, serial)
    # Pages arrive while the guest runs.
    serial.unlink()
    (shm / "ram").unlink(missing_ok=True)
    vm = await restore(saved.path, command, mode="lazy")
    try:
        assert vm.lazy is not None
        await asyncio.wait_for(vm.lazy.completed(), PATIENCE)
        await goes_on(saved, vm, serial)
    finally:
        await vm.end()


SHORT = [("q35", "tmpfs, private"), ("isapc", "prealloc"), ("microvm", "hugetlb, private")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in SHORT else pytest.mark.long)
        for name in MACHINES
        for kind in MEMORY
    ],
)
def test_memory_of_every_kind_arrives_in_every_machine(
    guests: Callable[..., Saved], name: str, kind: str, shm: Path, tmp_path: Path
) -> None:
    saved = guests(name)
    with huge_pages(RAM) if "hugetlb" in kind else contextlib.nullcontext():
        asyncio.run(assert_restored(saved, machine(name, kind, shm), tmp_path / "serial", shm))


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        pytest.param(name, kind, devices, marks=[] if short else pytest.mark.long)
        for devices in DEVICES
        for name, kind, short in [
            ("pc", "default", devices == "virtio-mem"),
            ("q35", "memfd, shared", devices == "virtio"),
            ("q35", "tmpfs, shared", False),
        ]
    ],
)
def test_memory_and_devices_of_every_kind_go_on(
    guests: Callable[..., Saved], name: str, kind: str, devices: str, shm: Path, tmp_path: Path
) -> None:
    saved = guests(name, devices)
    words = [*machine(name, kind, shm, maximum=maximum_of(devices)), *DEVICES[devices]]
    asyncio.run(assert_restored(saved, words, tmp_path / "serial", shm))


# Forms of a snapshot: what a function makes of a saved guest in an empty directory.


def _sealed(saved: Saved, directory: Path) -> str:
    shutil.copyfile(saved.path, directory / "sealed")
    pyqmigrate.seal(directory / "sealed")
    return str(directory / "sealed")


def _sequential(saved: Saved, directory: Path) -> str:
    pyqmigrate.convert(saved.path, directory / "stream", to="stream")
    return str(directory / "stream")


def _compressed(saved: Saved, directory: Path) -> str:
    stream = Path(_sequential(saved, directory))
    with gzip.open(directory / "stream.gz", "wb", compresslevel=1) as file:
        file.write(stream.read_bytes())
    stream.unlink()
    return str(directory / "stream.gz")


def _compact(saved: Saved, directory: Path) -> str:
    pyqmigrate.compact(saved.path, directory / "compact")
    return str(directory / "compact")


def _stored(saved: Saved, directory: Path) -> str:
    with Store.create(directory / "store") as store:
        return store_file(store, Path(_sealed(saved, directory)), "monday")


def _remote(saved: Saved, directory: Path) -> str:
    with Store.create(f"s3://bucket/{directory.name}") as store:
        return store_file(store, Path(_sealed(saved, directory)), "monday", pack_pages=300)


FORMS: dict[str, Callable[[Saved, Path], str]] = {
    "mapped-ram": lambda saved, _: str(saved.path),
    "sealed": _sealed,
    "sequential": _sequential,
    "compressed": _compressed,
    "compact": _compact,
    "store": _stored,
    "object store": _remote,
}


@pytest.fixture
def snapshot(
    request: pytest.FixtureRequest,
    form: str,
    guests: Callable[..., Saved],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    if form == "object store":
        far: ObjectStore = request.getfixturevalue("object_store")
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "caches"))
        yield FORMS[form](guests("pc"), disk)
        assert far.requests
    else:
        yield FORMS[form](guests("pc"), disk)


@pytest.mark.parametrize("mode", ["lazy", "auto"])
@pytest.mark.parametrize("form", covering(FORMS, short=["compressed"]))
def test_every_form_of_a_snapshot_arrives(
    guests: Callable[..., Saved], snapshot: str, mode: str, tmp_path: Path, shm: Path
) -> None:
    """Mode auto is lazy if memory must be shared, and for forms that cannot be mapped."""
    saved = guests("pc")
    command = saved.command(*machine("pc", "memfd, shared", shm), serial=tmp_path / "serial")
    if mode == "auto":
        command += ["-chardev", "null,id=vhost-user"]  # a word that keeps memory from being mapped

    async def run() -> None:
        async with restored(snapshot, command, mode) as vm:
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
            await vm.monitor.execute("cont")
            await goes_on(saved, vm, tmp_path / "serial")

    asyncio.run(run())


@pytest.mark.parametrize("form", covering(FORMS, short=["store"]))
def test_clones_of_every_form_arrive(
    guests: Callable[..., Saved], snapshot: str, tmp_path: Path
) -> None:
    saved = guests("pc")
    command = saved.command(serial=tmp_path / "serial{n}")

    async def run() -> None:
        clones = await clone(snapshot, command, 2, directory=tmp_path, mode="lazy", paused=True)
        try:
            for made in clones:
                assert made.vm is not None, made.error
                assert made.vm.lazy is not None
                await asyncio.wait_for(made.vm.lazy.completed(), PATIENCE)
                memory = await memory_of(made.vm.monitor, made.vm.process.pid)
                assert_same_blocks(memory, saved.memory)
                await made.vm.monitor.execute("cont")
                await goes_on(saved, made.vm, tmp_path / f"serial{made.number}")
        finally:
            for made in clones:
                if made.vm is not None:
                    await made.vm.end()

    asyncio.run(run())


def test_memory_of_an_increment_comes_from_its_base_too(disk: Path) -> None:
    setup = GuestSetup("pc", working_set=8 * MIB, filled=8 * MIB)
    base, later = save_twice(setup, disk)
    write_increment(base, later, disk / "increment", [setup.block])
    expected = blocks_of(later)
    later.unlink()

    async def run() -> None:
        async with restored(disk / "increment", setup.command(disk), "lazy") as vm:
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), expected)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["default", pytest.param("shared", marks=pytest.mark.long)])
def test_huge_pages_and_a_working_set_do_not_change_memory(
    guests: Callable[..., Saved], kind: str, shm: Path, tmp_path: Path
) -> None:
    """Record what a guest asks for; push that first, and make huge pages of the memory."""
    if os.geteuid():
        pytest.skip("only root may ask for huge pages of another process")
    saved = guests("q35")
    path = tmp_path / "recorded"
    command = saved.command(*machine("q35", kind, shm), serial=tmp_path / "serial")

    async def run() -> None:
        vm = await restore(saved.path, command, mode="lazy", record=0.3, working_set=path)
        try:
            assert vm.recording is not None
            assert (await asyncio.wait_for(vm.recording, PATIENCE)).pages > 0
            await goes_on(saved, vm, tmp_path / "serial")
        finally:
            await vm.end()
        (tmp_path / "serial").unlink()
        async with restored(saved.path, command, "lazy", working_set=path, huge_pages=True) as vm:
            assert vm.report.recorded_pages or not vm.report.notes
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), saved.memory)
            await vm.monitor.execute("cont")
            await goes_on(saved, vm, tmp_path / "serial")

    asyncio.run(run())
