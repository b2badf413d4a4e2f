"""Sealing a finished snapshot, and what a seal is good for afterwards."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate import Algorithm, RamBlock, SnapshotError, TargetError, UsageError, seal
from pyqmigrate.errors import Cancelled
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.integrity import seal as sealing
from pyqmigrate.integrity.digests import Digests
from pyqmigrate.integrity.manifest import read_manifest
from pyqmigrate.integrity.seal import stale_pages, start_seal
from pyqmigrate.integrity.verify import current_seal, start_verify, verify_seal
from pyqmigrate.snapshot.detect import open_snapshot
from tests.harness.sealed import PAGE, Sealed
from tests.harness.snapshots import data_bytes, load, ram, save_known, turn_bitmaps


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_what_is_sealed_is_intact(disk: Path, algorithm: Algorithm, direct_io: str) -> None:
    save_known(disk / "snap")
    report = seal(disk / "snap", algorithm=algorithm, direct_io=direct_io)
    assert (report.snapshot, report.seal) == (str(disk / "snap"), str(disk / "snap.seal"))
    assert (report.algorithm, report.size) == (algorithm, (disk / "snap").stat().st_size)
    assert (report.clear_pages_zero, report.cleared_pages) == (True, 0)
    assert report.direct_io == (direct_io == "on")
    check = verify_seal(disk / "snap", direct_io=direct_io)
    assert check is not None
    assert (check.intact, check.algorithm, check.notes) == (True, algorithm, ())


def test_seal_is_the_same_as_the_one_of_the_save(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    written = made.seal.read_bytes()
    made.seal.unlink()
    seal(made.path)
    assert made.seal.read_bytes() == written


def test_a_file_without_a_seal_has_nothing_to_be_held_against(tmp_path: Path) -> None:
    save_known(tmp_path / "snap")
    assert verify_seal(tmp_path / "snap") is None
    assert start_verify(tmp_path / "snap") is None
    assert current_seal(tmp_path / "snap") is None


def test_clear_pages_with_old_bytes_become_holes(disk: Path) -> None:
    made = Sealed.make(disk / "guest", sparse="exact", seal=None)
    stale = made.stale("big", 20)
    with open_snapshot(made.path) as snapshot:
        assert stale_pages(snapshot) == {"big": 20}
        before = snapshot.blocks["big"].data_pages
    report = seal(made.path)
    assert report.cleared_pages == 20
    _, pages = made.block("big")
    for page in stale:
        at = pages + page * PAGE
        assert data_bytes(made.path, at, at + PAGE) == 0
    with open_snapshot(made.path) as snapshot:
        assert stale_pages(snapshot) == {}
        assert snapshot.blocks["big"].data_pages == before
    assert made.check().intact
    assert (load(made.path)["big"] == made.big).all()
    found = current_seal(made.path)
    assert found is not None
    assert found.clear_pages_zero


S390 = "s390-ccw-virtio-10.0"
Foreign = Callable[..., Sealed]


@pytest.fixture
def foreign(disk: Path) -> Foreign:
    """A file that a big-endian host wrote, with stale pages if any."""

    def make(machine: str = "pc-q35-10.0", stale: int = 0) -> Sealed:
        made = Sealed(disk / "guest", ram(1024), ram(64, seed=1))
        blocks = [RamBlock("big", made.big), RamBlock("small", made.small)]
        pyqmigrate.save(made.path, blocks, sparse="exact", machine=machine)
        if stale:
            made.stale("big", stale)
        turn_bitmaps(made.path)
        return made

    return make


def test_a_file_of_a_big_endian_host_is_not_sealed_before_that_is_said(foreign: Foreign) -> None:
    made = foreign()
    before = made.path.read_bytes()
    with pytest.raises(UsageError, match="--bitmap-order big"):
        seal(made.path)
    assert made.path.read_bytes() == before
    assert not made.seal.exists()


def test_bits_past_the_end_of_a_block_hint_at_the_other_order(disk: Path) -> None:
    made = Sealed.make(disk / "guest", sparse="exact", seal=None)
    turn_bitmaps(made.path)
    with pytest.raises(SnapshotError, match="--bitmap-order"):
        seal(made.path)
    assert seal(made.path, bitmap_order="big").cleared_pages == 0


@pytest.mark.parametrize("stale", [0, 20])
def test_a_file_of_a_big_endian_host_is_sealed_as_such(foreign: Foreign, stale: int) -> None:
    made = foreign(stale=stale)
    report = seal(made.path, bitmap_order="big")
    assert (report.cleared_pages, report.bitmap_order) == (stale, "big")
    with open_snapshot(made.path, bitmap_order="big") as snapshot:
        assert snapshot.blocks["big"].read(0, made.big.nbytes) == made.big.tobytes()
        assert stale_pages(snapshot) == {}
    found = current_seal(made.path)
    assert found is not None
    assert found.head.bitmap_order == "big"


def test_damage_in_a_file_of_a_big_endian_host_is_reported_with_its_pages(foreign: Foreign) -> None:
    made = foreign()
    seal(made.path, bitmap_order="big")
    _, pages = made.block("big")
    made.write(pages + (1 << 20), b"????")
    [damage] = made.check().damages
    assert damage.parts[0].data_pages == made.big.reshape(-1, PAGE)[256:512].any(axis=1).sum()


def test_who_says_the_order_is_believed(foreign: Foreign) -> None:
    made = foreign()
    assert seal(made.path, bitmap_order="little").cleared_pages > 0


def test_file_of_an_s390_guest_shows_which_host_it_had(foreign: Foreign, disk: Path) -> None:
    made = foreign(machine=S390, stale=5)
    report = seal(made.path)
    assert (report.cleared_pages, report.bitmap_order) == (5, "big")
    assert (load(made.path)["big"] == made.big).all()
    emulated = Sealed.make(disk / "emulated", sparse="exact", seal=None, machine=S390)
    emulated.stale("big", 5)
    report = seal(emulated.path)
    assert (report.cleared_pages, report.bitmap_order) == (5, "little")
    assert (load(emulated.path)["big"] == emulated.big).all()


def test_stale_pages_of_any_number_do_not_make_the_order_doubtful(disk: Path) -> None:
    made = Sealed.make(disk / "guest", sparse="exact", seal=None)
    stale = len(made.stale("big", 1100))
    assert stale > 300
    assert seal(made.path).cleared_pages == stale
    assert (load(made.path)["big"] == made.big).all()


def test_an_unknown_order_is_a_usage_error(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest", seal=None)
    with pytest.raises(UsageError):
        seal(made.path, bitmap_order="middle")  # type: ignore[arg-type]


def test_stale_pages_are_counted_by_block(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    made.stale("big", 3)
    made.stale("small", 2)
    with open_snapshot(made.path) as snapshot:
        assert stale_pages(snapshot, channels=1) == {"big": 3, "small": 2}


def lock(path: Path, kind: int) -> int:
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, kind | fcntl.LOCK_NB)
    return fd


def test_a_file_that_a_guest_runs_from_is_sealed_but_not_changed(disk: Path) -> None:
    made = Sealed.make(disk / "guest", seal=None)
    fd = lock(made.path, fcntl.LOCK_SH)
    try:
        seal(made.path)
        made.stale("big", 1)
        content, sealed = made.path.read_bytes(), made.seal.read_bytes()
        with pytest.raises(TargetError, match="a guest runs from it") as caught:
            seal(made.path)
        assert caught.value.errno == errno.EBUSY
        assert (made.path.read_bytes(), made.seal.read_bytes()) == (content, sealed)
    finally:
        os.close(fd)
    assert seal(made.path).cleared_pages == 1


def test_a_file_that_is_written_in_place_is_not_sealed(disk: Path) -> None:
    made = Sealed.make(disk / "guest", seal=None)
    fd = lock(made.path, fcntl.LOCK_EX)
    try:
        with pytest.raises(TargetError, match="another process writes it") as caught:
            seal(made.path)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EBUSY
    assert not made.seal.exists()


def test_what_is_not_a_whole_snapshot_is_not_sealed(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest", seal=None)
    os.truncate(made.path, made.path.stat().st_size - 5)
    with pytest.raises(SnapshotError):
        seal(made.path)
    assert [*tmp_path.iterdir()] == [made.path]


def during(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Has ``act`` called when all has been read, and no seal is written yet."""
    whole = Digests.read_rest

    def read_rest(self: Digests, *arguments: Any, **options: Any) -> None:
        whole(self, *arguments, **options)
        act()

    monkeypatch.setattr(Digests, "read_rest", read_rest)


def test_a_file_that_changes_meanwhile_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed.make(tmp_path / "guest", seal=None)
    during(monkeypatch, lambda: os.truncate(made.path, made.path.stat().st_size + 1))
    with pytest.raises(TargetError, match="changed or replaced"):
        seal(made.path)
    assert not made.seal.exists()


def test_a_file_that_is_replaced_meanwhile_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed.make(tmp_path / "guest", seal=None)
    other = Sealed.make(tmp_path / "other", density=0.1, seal=None)
    during(monkeypatch, lambda: other.path.rename(made.path))
    with pytest.raises(TargetError, match="changed or replaced"):
        seal(made.path)
    assert not made.seal.exists()


def test_a_cancelled_seal_leaves_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed.make(tmp_path / "guest")
    old = made.seal.read_bytes()
    reached, go = threading.Event(), threading.Event()
    whole = Digests.read_rest

    def read_rest(self: Digests, *arguments: Any) -> None:
        reached.set()
        go.wait()
        whole(self, *arguments)

    monkeypatch.setattr(Digests, "read_rest", read_rest)
    job = start_seal(made.path, algorithm="blake3")
    reached.wait()
    job.cancel()
    go.set()
    with pytest.raises(Cancelled):
        job.result()
    assert made.seal.read_bytes() == old


def test_progress_reaches_the_size_of_the_file(disk: Path) -> None:
    made = Sealed.make(disk / "guest")
    size, seen = made.path.stat().st_size, []
    seal(made.path, progress=seen.append)
    verify_seal(made.path, progress=seen.append)
    assert (seen[-1].bytes_done, seen[-1].bytes_total) == (size, size)


def test_the_stream_may_be_behind_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"X" * 5000)
    pyqmigrate.save(f"file:{path},offset=5000", [RamBlock("ram", ram(50))])
    with pytest.raises(SnapshotError):
        seal(path)
    seal(path, offset=5000)
    assert verify_seal(path).intact  # type: ignore[union-attr]
    seal(f"file:{path},offset=5000")
    found = read_manifest(tmp_path / "file.seal")
    assert found is not None
    assert found.head.offset == 5000
    with pytest.raises(UsageError, match="twice"):
        seal(f"file:{path},offset=5000", offset=5000)


def test_a_sequential_stream_is_sealed_without_a_word_on_clear_pages(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest", seal=None)
    with pyqmigrate.open_snapshot(made.path) as snapshot:
        pyqmigrate.convert(snapshot, tmp_path / "stream", to="stream")
    report = seal(tmp_path / "stream")
    assert not report.clear_pages_zero
    check = verify_seal(tmp_path / "stream")
    assert check is not None
    assert check.intact
    with (tmp_path / "stream").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"??")
    check = verify_seal(tmp_path / "stream")
    assert check is not None
    assert not check.intact


def test_seal_is_beside_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    made = Sealed.make(tmp_path / "far/guest", seal=None)
    (tmp_path / "link").symlink_to("far/guest")
    seal(tmp_path / "link")
    assert made.seal.exists()
    assert verify_seal(tmp_path / "link").intact  # type: ignore[union-attr]
    assert current_seal(tmp_path / "link") is not None
    assert not (tmp_path / "link.seal").exists()


def test_descriptors_have_no_seal(tmp_path: Path) -> None:
    save_known(tmp_path / "snap")
    with (tmp_path / "snap").open("rb") as file:
        target = pyqmigrate.Descriptors(file.fileno())
        for work in (seal, verify_seal):
            with pytest.raises(UsageError, match="path"):
                work(target)


@pytest.mark.parametrize("content", [b"", b"wax", b'{"format": "another seal"}\n', None])
def test_a_file_that_is_not_a_seal_is_left_alone_and_nothing_is_changed(
    disk: Path, content: bytes | None
) -> None:
    made = Sealed.make(disk / "guest", seal=None)
    made.stale("big", 5)
    before = made.path.read_bytes()
    if content is None:
        made.seal.mkdir()
    else:
        made.seal.write_bytes(content)
    with pytest.raises(UsageError, match=r"move (it|that file), or choose"):
        seal(made.path)
    assert made.path.read_bytes() == before
    assert content is None or made.seal.read_bytes() == content


def test_a_file_that_a_link_under_the_seals_name_leads_to_is_not_replaced(disk: Path) -> None:
    made = Sealed.make(disk / "guest", seal=None)
    (disk / "letter").write_text("dear")
    made.seal.symlink_to("letter")
    with pytest.raises(UsageError, match=r"move (it|that file), or choose"):
        seal(made.path)
    assert (disk / "letter").read_text() == "dear"


def test_an_old_seal_is_gone_for_good_before_a_page_is_cleared(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed.make(disk / "guest")
    made.stale("big", 1)
    order: list[str] = []
    sync, clear = os.fsync, sealing.clear_stale

    def noted_sync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), disk.stat()):
            order.append("directory, " + ("with" if made.seal.exists() else "without"))
        sync(fd)

    def noted_clear(*arguments: Any) -> None:
        order.append("clear")
        clear(*arguments)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(sealing, "clear_stale", noted_clear)
    seal(made.path)
    assert order == ["directory, without", "clear", "directory, with"]


def test_a_seal_that_another_process_puts_a_file_over_is_not_removed(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed.make(disk / "guest", seal=None)
    made.stale("big", 1)
    find = sealing.find_stale

    def found(*arguments: Any) -> dict[str, int]:
        made.seal.write_text("wax")
        return find(*arguments)

    monkeypatch.setattr(sealing, "find_stale", found)
    with pytest.raises(UsageError, match=r"move (it|that file), or choose"):
        seal(made.path)
    assert made.seal.read_text() == "wax"


def test_an_unknown_algorithm_is_a_usage_error(tmp_path: Path) -> None:
    save_known(tmp_path / "snap")
    with pytest.raises(UsageError):
        seal(tmp_path / "snap", algorithm="md5")


def test_a_seal_is_current_until_the_file_is_touched(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    with made.path.open("rb") as file:
        assert current_seal(made.path, file.fileno()) == current_seal(made.path) is not None
    os.utime(made.path, ns=(0, 0))
    assert current_seal(made.path) is None
    assert made.check().notes, "the other time is not told"
    seal(made.path)
    assert current_seal(made.path) is not None
    os.truncate(made.path, made.path.stat().st_size + 1)
    assert current_seal(made.path) is None


def test_a_damaged_seal_is_not_current_and_an_error_to_verify(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    data = bytearray(made.seal.read_bytes())
    data[-3] ^= 1
    made.seal.write_bytes(data)
    assert current_seal(made.path) is None
    with pytest.raises(SnapshotError) as caught:
        verify_seal(made.path)
    assert caught.value.field == "seal"
    seal(made.path)
    assert made.check().intact


def test_a_seal_that_claims_a_huge_file_costs_no_memory(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    found = read_manifest(made.seal)
    assert found is not None
    head = dataclasses.replace(found.head, size=1 << 42)
    digests = bytes(found.digests).ljust(head.digests_size, b"\1")
    made.seal.write_bytes(head.encode(digests) + digests)
    tracemalloc.start()
    try:
        check = made.check()
        assert current_seal(made.path) is None
        assert tracemalloc.get_traced_memory()[1] < 16 << 20 < len(digests)
    finally:
        tracemalloc.stop()
    size = made.path.stat().st_size
    assert [damage.offset for damage in check.damages][-1] == size
    assert f"the file had {1 << 42} bytes and has {size}" in check.damages[-1].why


def test_a_seal_of_a_copy_vouches_for_the_copy(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    (tmp_path / "copy").write_bytes(made.path.read_bytes())
    (tmp_path / "copy.seal").write_bytes(made.seal.read_bytes())
    check = verify_seal(tmp_path / "copy")
    assert check is not None
    assert check.intact
    assert current_seal(tmp_path / "copy") is None


@pytest.mark.usefixtures("same_descriptors")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    made = Sealed.make(tmp_path / "guest")
    made.stale("big", 2)
    seal(made.path)
    made.check()
    made.write(0, b"????")
    made.check()
    with pytest.raises(SnapshotError):
        seal(made.path)
    made.seal.unlink()
    assert verify_seal(made.path) is None


def test_what_libvirt_saved_is_sealed_with_its_header(tmp_path: Path) -> None:
    made, start = Sealed.make(tmp_path / "guest", seal=None), 8192
    header = LibvirtHeader(
        complete=True,
        version=2,
        format=ImageFormat.SPARSE,
        was_running=True,
        xml="<domain/>",
        cookie="",
        stream_offset=start,
        byte_order="little",
    )
    pyqmigrate.save(
        f"file:{made.path},offset={start}", [RamBlock("pc.ram", made.big)], machine="pc"
    )
    made.write(0, encode_header(header))
    seal(made.path)
    found = read_manifest(made.seal)
    assert found is not None
    assert found.head.offset == start
    assert made.check().intact
    made.write(start - 5, b"?")
    assert made.check().damages[0].parts[0].what == "what is before the stream"


@pytest.mark.parametrize("moment", ["before the lock", "after the lock"])
def test_pages_of_a_snapshot_that_is_written_meanwhile_are_not_cleared(
    disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """QEMU takes no lock. It writes another snapshot into the file when the bitmaps of the one that
    was there have been read."""
    made = Sealed.make(disk / "guest")
    made.stale("big", 5)
    dense = Sealed.make(disk / "new", seal=None)
    new = dense.path.read_bytes()[::-1]
    where, name = (
        (sealing, "find_stale") if moment == "before the lock" else (sealing, "remove_manifest")
    )
    real = getattr(where, name)

    def written(*arguments: Any) -> Any:
        found = real(*arguments)
        made.path.write_bytes(new)
        return found

    monkeypatch.setattr(where, name, written)
    with pytest.raises(TargetError, match="changed or replaced") as caught:
        seal(made.path)
    assert caught.value.errno == errno.EBUSY
    assert made.path.read_bytes() == new
    if moment == "after the lock":
        assert not made.seal.exists()


def test_a_file_that_gets_another_size_while_pages_are_cleared_is_not_sealed(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed.make(disk / "guest")
    made.stale("big", 5)
    clear = sealing.clear_stale

    def shrunk(*arguments: Any) -> None:
        clear(*arguments)
        os.truncate(made.path, 4096)

    monkeypatch.setattr(sealing, "clear_stale", shrunk)
    with pytest.raises(TargetError, match="was written to while pages were cleared"):
        seal(made.path)
    assert not made.seal.exists()
