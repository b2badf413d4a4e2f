"""A save refuses to replace a file that the guest it saves needs, before anything is touched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.guest.files import files_of
from pyqmigrate.vm.guest.inspect import GuestInfo, inspect
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu

pytestmark = pytest.mark.qemu

MIB = 1 << 20
_USED = {
    "ram": "the memory of block 'mem'",
    "disk": "disk d0",
    "top": "disk d1",
    "middle": "a backing file of disk d1",
    "bottom": "a backing file of disk d1",
    "flash": "pflash0",
    "config": "-fw_cfg",
    "serial": "has open",
    "link": "disk d0",
    "other-name": "disk d0",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for name, size in {"ram": 32, "disk": 16, "flash": 1, "bottom": 16}.items():
        with (directory / name).open("wb") as file:
            file.write(name.encode() * 1000)
            file.truncate(size * MIB)
    (directory / "config").write_bytes(b"words for the guest")
    (directory / "link").symlink_to("disk")
    os.link(directory / "disk", directory / "other-name")
    return directory


@pytest.fixture(scope="module")
def qemu(images: Path) -> Iterator[BareQemu]:
    """A guest whose files are named in several ways, as its QEMU sees them."""
    with BareQemu(
        "-object",
        "memory-backend-file,id=mem,size=32M,share=on,mem-path=ram",
        "-M",
        "pc,memory-backend=mem",
        "-m",
        "32",
        "-drive",
        "if=pflash,format=raw,file=flash",
        "-drive",
        f"if=none,id=d0,format=raw,file={images}/disk",
        "-device",
        "virtio-blk-pci,drive=d0",
        "-drive",
        "if=none,id=d1,format=raw,file=bottom",
        "-device",
        "virtio-blk-pci,drive=d1",
        "-fw_cfg",
        "name=opt/words,file=config",
        "-serial",
        "file:serial",
        cwd=images,
    ) as qemu:
        for overlay in ("middle", "top"):
            qemu.run(
                lambda monitor, overlay=overlay: monitor.execute(  # type: ignore[misc]
                    "blockdev-snapshot-sync",
                    {"device": "d1", "snapshot-file": overlay, "format": "qcow2"},
                )
            )
        yield qemu


def identities(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What a file that was written to, or replaced, does not keep."""
    found = {path.name: path.stat() for path in directory.iterdir()}
    return {name: (info.st_ino, info.st_size, info.st_mtime_ns) for name, info in found.items()}


async def _nothing(monitor: object) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "engine"), [*((name, "auto") for name in _USED), ("disk", "qemu"), ("ram", "qemu")]
)
def test_file_of_the_guest_is_not_replaced(
    qemu: BareQemu, images: Path, name: str, engine: str
) -> None:
    before = identities(images)
    with pytest.raises(UsageError) as caught:
        asyncio.run(save(qemu.socket, images / name, engine=engine))
    assert _USED[name] in str(caught.value) and "in use" in str(caught.value)
    assert identities(images) == before


@pytest.mark.parametrize("beside", ["new.seal", "new.vm.json"])
def test_file_beside_the_snapshot_is_not_replaced_either(
    qemu: BareQemu, images: Path, beside: str
) -> None:
    (images / beside).symlink_to("disk")
    try:
        with pytest.raises(UsageError, match=r"disk d0|the record would replace"):
            asyncio.run(save(qemu.socket, images / "new", engine="direct"))
        assert not (images / "new").exists()
    finally:
        (images / beside).unlink()


def test_files_are_known_by_the_names_that_qemu_gives_them_too(
    qemu: BareQemu, images: Path
) -> None:
    """Where its process is out of sight only QEMU's answers are left."""

    async def by_name() -> set[str]:
        async with await Monitor.connect(qemu.socket) as monitor:
            with await inspect(monitor) as guest:
                facts = {name: getattr(guest, name) for name in GuestInfo.__dataclass_fields__}
                hidden = GuestInfo(**facts | {"process": None, "blocks": ()})
                return set(files_of(hidden).values())

    assert "disk d0 of the guest" in asyncio.run(by_name())


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_snapshot_that_a_guest_was_restored_from_may_be_replaced(mode: str, tmp_path: Path) -> None:
    """Its pages stay mapped from the old file, which has lost its name."""
    path = tmp_path / "snapshot"
    command = ["qemu-system-x86_64", "-M", "pc", "-m", "32", "-nodefaults", "-display", "none"]
    with BareQemu(*command[1:5]) as qemu:
        qemu.run(_nothing)
        asyncio.run(save(qemu.socket, path))
    monitor = tmp_path / "qmp"

    async def again() -> None:
        vm = await restore(path, command, qmp=monitor, mode=mode)
        try:
            assert vm.report.mode == mode
            old = path.stat().st_ino
            await save(monitor, path)
            assert path.stat().st_ino != old
        finally:
            await vm.end()

    asyncio.run(again())
