"""A snapshot as a save image of libvirt's, with the header of an older one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pyqmigrate import (
    Descriptors,
    RamBlock,
    SnapshotError,
    UsageError,
    convert,
    open_snapshot,
    save,
)
from pyqmigrate.enums import Format
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header, read_header
from pyqmigrate.io.input import InputFile
from tests.harness.command import Command
from tests.harness.snapshots import known_memory

MACHINE = "pc-q35-10.0"
XML = f"<domain type='kvm'><os><type arch='x86_64' machine='{MACHINE}'>hvm</type></os></domain>"
HEADER = LibvirtHeader(True, 2, ImageFormat.RAW, True, XML, "<cookie/>", 70001, "little")


def image(path: Path, **changes: object) -> Path:
    path.write_bytes(encode_header(HEADER._replace(**changes)) + b"a stream that nobody reads")
    return path


@pytest.fixture
def snapshot(disk: Path) -> Path:
    save(disk / "snapshot", [RamBlock("ram", known_memory())], machine=MACHINE)
    return disk / "snapshot"


def header_of(path: Path) -> LibvirtHeader:
    with contextlib.closing(InputFile(path)) as source:
        return read_header(source)


@pytest.mark.usefixtures("same_descriptors")
@pytest.mark.parametrize("source", ["mapped-ram", "stream"])
@pytest.mark.parametrize("form", ["raw", "sparse"])
def test_image_has_the_header_and_the_memory(
    source: str, form: str, snapshot: Path, disk: Path
) -> None:
    convert(snapshot, disk / "from", to=source)
    like = image(disk / "old.save")
    convert(disk / "from", disk / "new.save", to="libvirt", like=like, image_format=form)
    assert header_of(disk / "new.save") == HEADER._replace(format=ImageFormat[form.upper()])
    with open_snapshot(disk / "new.save") as new:
        new.verify()
        assert new.format is (Format.SEQUENTIAL if form == "raw" else Format.MAPPED_RAM)
        assert new.machine == MACHINE
        memory = known_memory()
        assert new.blocks["ram"].read(0, len(memory)) == bytes(memory)
    assert {path.name for path in disk.iterdir()} == {"snapshot", "from", "old.save", "new.save"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (ImageFormat.RAW, ImageFormat.RAW),
        (ImageFormat.SPARSE, ImageFormat.SPARSE),
        (ImageFormat.ZSTD, ImageFormat.RAW),
    ],
)
def test_format_is_that_of_the_old_image(
    old: ImageFormat, new: ImageFormat, snapshot: Path, disk: Path
) -> None:
    convert(snapshot, disk / "new.save", to="libvirt", like=image(disk / "old.save", format=old))
    assert header_of(disk / "new.save").format is new


def test_old_image_that_was_not_finished_gives_a_finished_one(snapshot: Path, disk: Path) -> None:
    like = image(disk / "old.save", complete=False)
    convert(snapshot, disk / "new.save", to="libvirt", like=like)
    assert header_of(disk / "new.save").complete


@pytest.mark.parametrize("running", [True, False])
def test_image_of_libvirt_keeps_whether_its_guest_ran(
    running: bool, snapshot: Path, disk: Path
) -> None:
    like = image(disk / "old.save", was_running=running)
    convert(snapshot, disk / "one.save", to="libvirt", like=like)
    other = image(disk / "other.save", was_running=not running)
    convert(disk / "one.save", disk / "two.save", to="libvirt", like=other)
    assert header_of(disk / "two.save").was_running is running


def test_old_image_may_be_replaced(snapshot: Path, disk: Path) -> None:
    like = image(disk / "old.save")
    convert(snapshot, like, to="libvirt", like=like)
    with open_snapshot(like) as new:
        new.verify()
        assert new.libvirt == HEADER


def test_wrong_use_is_refused_and_writes_nothing(snapshot: Path, disk: Path) -> None:
    like, new = image(disk / "old.save"), disk / "new.save"
    other = image(disk / "other", xml=XML.replace("q35", "i440fx"))
    with pytest.raises(UsageError, match="like"):
        convert(snapshot, new, to="libvirt")
    with pytest.raises(UsageError, match="like"):
        convert(snapshot, new, to="stream", like=like)
    with pytest.raises(UsageError, match="image_format"):
        convert(snapshot, new, to="stream", image_format="raw")
    with pytest.raises(UsageError, match="'raw' or 'sparse'"):
        convert(snapshot, new, to="libvirt", like=like, image_format="gzip")
    with pytest.raises(UsageError, match="not a save image"):
        convert(snapshot, new, to="libvirt", like=snapshot)
    with pytest.raises(UsageError, match=r"'pc-q35-10\.0'.*'pc-i440fx-10\.0'"):
        convert(snapshot, new, to="libvirt", like=other)
    with pytest.raises(UsageError, match="path"):
        convert(snapshot, f"file:{new},offset=4096", to="libvirt", like=like)
    with (disk / "given").open("w+b") as file, pytest.raises(UsageError, match="path"):
        convert(snapshot, Descriptors(file.fileno()), to="libvirt", like=like)
    like.write_bytes(like.read_bytes()[:500])
    with pytest.raises(SnapshotError):
        convert(snapshot, new, to="libvirt", like=like)
    assert not new.exists()


def test_command_makes_an_image(
    snapshot: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like, new = image(disk / "old.save"), disk / "new.save"
    words = ("convert", snapshot, new, "--to", "libvirt", "--like", like, "--json")
    ran = Command(capsys)(*words, "--image-format", "sparse")
    assert (ran.code, ran.json["file_size"]) == (0, new.stat().st_size)
    assert header_of(new).format is ImageFormat.SPARSE
