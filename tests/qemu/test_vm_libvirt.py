"""Images that libvirt saved: what their header says, and that their guest goes on without it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pyqmigrate import convert, open_snapshot
from pyqmigrate.format.libvirt import ImageFormat, encode_header, read_header
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.load.sequential import start_sequential_load
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.libvirt import RAM, Image, Libvirt, save
from tests.harness.pattern_guest import check_pattern
from tests.harness.saved import Saved, goes_on, serial_says

pytestmark = pytest.mark.qemu

# Machine, and how virsh is asked to save.
SPARSE = {
    "pc": ("pc", ()),
    "q35, parallel": ("q35", ("--parallel-channels", "2")),
    "q35, parallel and direct": ("q35", ("--parallel-channels", "2", "--bypass-cache")),
}


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    # Socket paths are short, so this is not pytest's directory.
    with tempfile.TemporaryDirectory(prefix="lv-") as name, Libvirt(Path(name)) as libvirt:
        yield libvirt


@pytest.fixture(scope="module", params=SPARSE)
def image(request: pytest.FixtureRequest, libvirt: Libvirt, module_disk: Path) -> Image:
    machine, options = SPARSE[request.param]
    directory = module_disk / re.sub(r"\W+", "-", request.param)
    directory.mkdir()
    return save(libvirt, directory, machine, "--image-format", "sparse", *options)


def test_header_of_a_sparse_image_is_understood(image: Image) -> None:
    header = image.header
    assert header.complete
    assert header.was_running
    assert (header.version, header.format) == (2, ImageFormat.SPARSE)
    assert ElementTree.fromstring(header.xml).tag == "domain"
    assert ElementTree.fromstring(header.cookie).tag == "cookie"


def test_header_is_encoded_as_libvirt_did(image: Image) -> None:
    with image.path.open("rb") as file:
        assert encode_header(image.header) == file.read(image.header.stream_offset)


def test_snapshot_in_a_sparse_image_is_one_instant_of_the_guest(image: Image) -> None:
    with open_snapshot(image.path, offset=image.header.stream_offset) as snapshot:
        memory = snapshot.blocks["pc.ram"].read(0, RAM)
        assert snapshot.machine in image.header.xml
    assert check_pattern(memory).generation - len(image.reports) in (0, 1)


@pytest.mark.parametrize("mode", ["instant", "load", "lazy"])
def test_guest_goes_on_without_libvirt(image: Image, tmp_path: Path, mode: str) -> None:
    serial = tmp_path / "serial"
    command = [*image.domain.machine(), "-serial", f"file:{serial}"]
    saved = Saved(image.path, image.bios, (), ("pc.ram",), {}, image.reports)

    async def run() -> None:
        # libvirt stops a guest before it saves it: that it ran is told by the header alone.
        vm = await restore(image.path, command, mode=mode)
        try:
            assert (vm.report.mode, vm.report.run_state) == (mode, "running")
            if vm.lazy is not None:
                await vm.lazy.completed()
            await goes_on(saved, vm, serial)
        finally:
            await vm.end()

    asyncio.run(run())


@pytest.fixture(scope="module")
def raw(libvirt: Libvirt, module_disk: Path) -> Image:
    directory = module_disk / "raw"
    directory.mkdir()
    return save(libvirt, directory, "pc", "--image-format", "raw", paused=True)


def test_raw_image_of_a_paused_guest_says_so(raw: Image) -> None:
    assert raw.header.format is ImageFormat.RAW
    assert not raw.header.was_running


def test_sequential_stream_in_a_raw_image_is_one_instant_of_the_guest(raw: Image) -> None:
    memory = bytearray(RAM)
    uri = f"file:{raw.path},offset={raw.header.stream_offset}"
    with contextlib.closing(StreamFile.open(uri)) as source:
        start_sequential_load(source, {"pc.ram": memory}, skip_unknown_blocks=True).wait()
    assert check_pattern(bytes(memory)).generation - len(raw.reports) in (0, 1)


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("sparse", "raw"),
        ("raw", "sparse"),
        pytest.param("raw", "raw", marks=pytest.mark.long),
        pytest.param("sparse", "sparse", marks=pytest.mark.long),
    ],
)
def test_virsh_restores_what_was_converted(
    source: str, form: str, libvirt: Libvirt, disk: Path
) -> None:
    """A guest saved by libvirt becomes a snapshot of this package, and an image of libvirt again."""
    image = save(libvirt, disk, "pc", "--image-format", source)
    convert(image.path, disk / "ours", to="mapped-ram" if form == "raw" else "stream")
    new = disk / "new.save"
    convert(disk / "ours", new, to="libvirt", like=image.path, image_format=form)
    with contextlib.closing(InputFile(new)) as opened:
        header = read_header(opened)
    assert header.format is ImageFormat[form.upper()]
    assert (header.complete, header.xml, header.cookie) == (
        True,
        image.header.xml,
        image.header.cookie,
    )
    serial = disk / "serial"
    serial.unlink()
    libvirt.virsh("restore", new, "--running")
    try:
        first = len(image.reports) + 1
        said = serial_says(serial, 2)
        assert said == bytes(g & 0x7F for g in range(first, first + len(said)))
        assert libvirt.virsh("domstate", disk.name).strip() == "running"
    finally:
        libvirt.virsh("destroy", disk.name)
