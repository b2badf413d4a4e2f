"""Where a name leads to: whose links are followed, and which names fit."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, TargetError, UsageError, convert, open_snapshot, seal
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.place import absolute, check_name_fits, partial_name, resolve_symlink, seal_path
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.snapshots import known_memory, load, save_known

OTHERS = 12345  # neither we nor the owner of the directory
OURS = os.geteuid()

root = pytest.mark.skipif(OURS != 0, reason="links of other users are made by root")


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory like /tmp, and a file elsewhere that a link in it leads to."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    (tmp_path / "precious").write_bytes(b"precious")
    yield path


def planted(shared: Path, owner: int = OTHERS, to: str = "../precious") -> Path:
    link = shared / "snap"
    link.symlink_to(to)
    os.chown(link, owner, -1, follow_symlinks=False)
    return link


@root
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("to", ["../precious", "../new"])
def test_a_link_that_another_user_planted_is_not_followed(
    shared: Path, reuse: bool, to: str
) -> None:
    link = planted(shared, to=to)
    with pytest.raises(TargetError, match=f"belongs to another user .uid {OTHERS}.") as caught:
        OutputFile.open(link, DirectIO.OFF, reuse=reuse)
    assert caught.value.errno == errno.EACCES
    assert (shared.parent / "precious").read_bytes() == b"precious"
    assert not (shared.parent / "new").exists()
    assert link.is_symlink()


@root
def test_neither_is_one_further_on(shared: Path) -> None:
    planted(shared)
    mine = shared.parent / "mine"
    mine.symlink_to("shared/snap")
    with pytest.raises(TargetError, match="belongs to another user"):
        resolve_symlink(mine)


@root
@pytest.mark.parametrize("name", ["snap", "snap.seal"])
def test_neither_is_one_under_the_name_of_a_seal_or_an_index(shared: Path, name: str) -> None:
    link = planted(shared)
    link.rename(shared / "link")
    if name == "snap.seal":
        save_known(shared / "snap")
        (shared / "link").rename(shared / "snap.seal")
        with pytest.raises(TargetError, match="belongs to another user"):
            seal(shared / "snap")
    else:
        stream = shared / "stream"
        start_sequential_save(stream, [_block()]).wait()
        with pytest.raises(TargetError, match="belongs to another user"):
            open_snapshot(stream, index=shared / "link")
    assert (shared.parent / "precious").read_bytes() == b"precious"


def _block() -> RamBlock:
    return RamBlock("ram", known_memory())


@root
@pytest.mark.parametrize("change", ["ours", "the directory's owner's", "not sticky", "not shared"])
def test_links_that_no_other_user_can_plant_are_followed(shared: Path, change: str) -> None:
    if change == "ours":
        link = planted(shared, OURS)
    elif change == "the directory's owner's":
        os.chown(shared, OTHERS, -1)
        link = planted(shared)
    else:
        shared.chmod(0o777 if change == "not sticky" else 0o1775)
        link = planted(shared)
    assert resolve_symlink(link).resolve() == (shared.parent / "precious").resolve()
    memory = save_known(link)
    assert link.is_symlink()
    assert (load(shared.parent / "precious")["ram"] == memory).all()


def test_a_ring_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(TargetError) as caught:
        resolve_symlink(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP


def test_a_path_is_absolute_and_keeps_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/deep")
    monkeypatch.chdir(tmp_path)
    assert absolute("link/../snap") == tmp_path / "link/../snap"
    assert seal_path("link/../snap").parent.resolve() == tmp_path / "far"


def test_a_link_that_leads_elsewhere_than_it_says_is_not_replaced(tmp_path: Path) -> None:
    """Its text is a name, and another file has that name by now."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    (tmp_path / "file").unlink()
    (tmp_path / "file (deleted)").write_bytes(b"another file")
    with pytest.raises(TargetError, match="another file"):
        save_known(Path(f"/proc/self/fd/{fd}"))
    os.close(fd)
    assert (tmp_path / "file (deleted)").read_bytes() == b"another file"


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["n", "ä", "\udcff"])
def test_hidden_names_fit_whatever_the_name(tmp_path: Path, letter: str) -> None:
    name = letter * (255 // len(os.fsencode(letter)))
    name += "n" * (255 - len(os.fsencode(name)))
    hidden = partial_name(name, "f" * 16, tmp_path)
    assert len(os.fsencode(hidden)) <= 255
    (tmp_path / hidden).touch()
    check_name_fits(tmp_path / name)
    with pytest.raises(UsageError, match="255 is the limit"):
        check_name_fits(tmp_path / f"{name}n")


@pytest.mark.parametrize("reuse", [False, True])
def test_the_longest_name_is_saved_and_converted_without_a_seal(
    disk: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    name = "ü" * 127 + "n"
    memory = save_known(disk / name, reuse=reuse)
    assert (load(disk / name)["ram"] == memory).all()
    convert(disk / name, disk / ("ö" * 127), to="stream")
    with pytest.raises(UsageError, match="255 is the limit"):
        seal(disk / name)


@pytest.mark.parametrize("length", [251, 255])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_name_without_room_for_its_seal_is_refused_before_work_begins(
    disk: Path, length: int, reuse: bool
) -> None:
    with pytest.raises(UsageError, match="255 is the limit"):
        save_known(disk / ("n" * length), reuse=reuse, seal="xxh3-128")
    assert list(disk.iterdir()) == []


def test_an_index_may_have_the_longest_name(disk: Path) -> None:
    start_sequential_save(disk / "stream", [_block()]).wait()
    with open_snapshot(disk / "stream", index=disk / ("ü" * 127)) as snapshot:
        snapshot.verify()
    assert (disk / ("ü" * 127)).exists()
    with pytest.raises(UsageError, match="255 is the limit"):
        open_snapshot(disk / "stream", index=disk / ("ü" * 128))


def test_a_name_that_is_too_long_is_refused_before_work_begins(disk: Path) -> None:
    for reuse in (False, True):
        with pytest.raises((UsageError, TargetError)):
            save_known(disk / ("n" * 256), reuse=reuse)
    assert list(disk.iterdir()) == []
