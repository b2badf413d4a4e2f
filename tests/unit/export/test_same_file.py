"""Nothing is written over the snapshot that it is made from, under whatever name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyqmigrate import Descriptors, RamBlock, UsageError, convert, open_snapshot
from pyqmigrate.enums import Format
from pyqmigrate.export.elf import write_elf
from pyqmigrate.export.lime import write_lime
from pyqmigrate.export.raw import unpack
from pyqmigrate.format.address_space.physical_map import parse_placement
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.command import Command
from tests.harness.snapshots import known_memory, save_known

MACHINE = "pc-q35-10.0"
PLACED = [parse_placement("ram@0")]


def same(path: Path) -> Path:
    return path


def by_symlink(path: Path) -> Path:
    link = path.with_name("symlink")
    link.symlink_to(path.name)
    return link


def by_hard_link(path: Path) -> Path:
    os.link(path, path.with_name("hard"))
    return path.with_name("hard")


def by_other_spelling(path: Path) -> str:
    return f"file:{path.parent}/./{path.name}"


def in_place(path: Path) -> str:
    return f"file:{path},offset=4096"


# A directory, for raw files, has no URI.
NAMES = [same, by_symlink, by_hard_link, by_other_spelling, in_place]


@pytest.fixture(params=["mapped-ram", "stream"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "snapshot"
    if request.param == "mapped-ram":
        save_known(path, machine=MACHINE)
    else:
        start_sequential_save(path, [RamBlock("ram", known_memory())], machine=MACHINE).wait()
    return path


TARGETS = [form for form in Format if form is not Format.INCREMENT]


@pytest.mark.parametrize(
    ("to", "name"),
    [(to, name) for to in TARGETS for name in NAMES if to is not Format.RAW or name in NAMES[:3]],
)
def test_a_conversion_onto_its_source_is_refused(
    snapshot: Path, to: Format, name: Callable[[Path], Path | str]
) -> None:
    before, target = snapshot.read_bytes(), name(snapshot)
    placements = PLACED if to in (Format.ELF, Format.LIME) else None
    with pytest.raises(UsageError, match="is the snapshot that is read"):
        convert(snapshot, target, to=to, placements=placements)
    assert snapshot.read_bytes() == before


@pytest.mark.parametrize("to", [form for form in TARGETS if form is not Format.RAW])
def test_a_conversion_into_a_descriptor_of_its_source_is_refused(
    snapshot: Path, to: Format
) -> None:
    before = snapshot.read_bytes()
    placements = PLACED if to in (Format.ELF, Format.LIME) else None
    with snapshot.open("r+b") as file:
        target = Descriptors(file.fileno())
        with pytest.raises(UsageError, match="is the snapshot that is read"):
            convert(snapshot, target, to=to, placements=placements)
    assert snapshot.read_bytes() == before


@pytest.mark.parametrize("write", [write_elf, write_lime])
def test_an_export_onto_its_source_is_refused(snapshot: Path, write: Callable[..., object]) -> None:
    before = snapshot.read_bytes()
    with open_snapshot(snapshot) as opened, pytest.raises(UsageError):
        write(opened, snapshot, placements=PLACED)
    assert snapshot.read_bytes() == before


@pytest.mark.parametrize("name", ["ram.raw", "blocks.json"])
@pytest.mark.parametrize("link", [same, by_symlink, by_hard_link])
def test_raw_files_do_not_replace_their_snapshot(
    snapshot: Path, name: str, link: Callable[[Path], Path]
) -> None:
    directory = snapshot.parent / "out"
    directory.mkdir()
    link(snapshot).rename(directory / name)
    if link is by_symlink:
        (directory / name).unlink()
        (directory / name).symlink_to(snapshot)
    before = (directory / name).read_bytes()
    with open_snapshot(directory / name) as opened:
        with pytest.raises(UsageError, match="is the snapshot that is read"):
            unpack(opened, directory)
        with pytest.raises(UsageError, match="is the snapshot that is read"):
            convert(opened, directory, to="raw")
    assert (directory / name).read_bytes() == before
    assert [entry.name for entry in directory.iterdir()] == [name]


def test_a_file_of_the_same_content_is_not_a_source(snapshot: Path) -> None:
    copy = snapshot.with_name("copy")
    copy.write_bytes(snapshot.read_bytes())
    convert(snapshot, copy, to="mapped-ram")
    with open_snapshot(copy) as opened:
        assert opened.blocks["ram"].read(0, opened.blocks["ram"].length) == known_memory().tobytes()


@pytest.mark.parametrize("to", TARGETS)
def test_the_command_refuses_it_as_wrong_use(
    snapshot: Path, capsys: pytest.CaptureFixture[str], to: Format
) -> None:
    before = snapshot.read_bytes()
    where = ["--map", "ram@0"] if to in (Format.ELF, Format.LIME) else []
    ran = Command(capsys)("convert", snapshot, snapshot, "--to", to, *where)
    assert ran.code == 2
    assert snapshot.read_bytes() == before
