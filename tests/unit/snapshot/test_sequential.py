"""A sequential stream, opened for reading at random; its index, kept and doubted."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import (
    BlockMismatch,
    Descriptors,
    NotSupported,
    RamBlock,
    SnapshotError,
    TargetError,
    UsageError,
)
from pyqmigrate.enums import Format
from pyqmigrate.export.convert import convert
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.format.stream.writer import encode_part_header
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some
from tests.harness.snapshots import Bytes, known_memory, ram, save_known
from tests.harness.stream_builders import page_records, sequential_stream, words


def save_sequential(path: Path | str, seed: int = 0, page_size: int = 4096) -> Bytes:
    memory = ram(512, seed=seed, page_size=page_size)
    bits = page_size.bit_length() - 1
    start_sequential_save(
        path,
        [RamBlock("ram", memory, page_size)],
        machine="pc-q35-10.0",
        target_page_bits=None if page_size == 4096 else bits,
    ).wait()
    return memory


def header(form: ImageFormat, *, complete: bool = True, offset: int = 4321) -> bytes:
    return encode_header(LibvirtHeader(complete, 2, form, True, "<domain/>", "", offset, "little"))


@pytest.mark.parametrize("page_size", [1 << bits for bits in range(10, 17)])
def test_pages_of_any_size_are_read_at_random(disk: Path, page_size: int) -> None:
    memory = save_sequential(disk / "snap", page_size=page_size).tobytes()
    rng = random.Random(3)
    with open_snapshot(disk / "snap") as snapshot:
        assert snapshot.format is Format.SEQUENTIAL
        block = snapshot.blocks["ram"]
        assert (block.page_size, block.num_pages) == (page_size, 512)
        for _ in range(50):
            at = rng.randrange(len(memory))
            length = rng.randrange(min(3 * page_size, len(memory) - at) + 1)
            assert block.read(at, length) == memory[at : at + length]
        assert block.read(0, block.length) == memory


def test_block_shows_what_it_holds(disk: Path) -> None:
    memory = save_sequential(disk / "snap")
    pages = memory.reshape(-1, 4096).any(axis=1)
    with open_snapshot(disk / "snap") as snapshot:
        assert snapshot.machine == "pc-q35-10.0"
        block = snapshot.blocks["ram"]
        assert (block.data_pages, block.zero_pages) == (pages.sum(), (~pages).sum())
        assert not block.external
        flat = [data for first, end, data in block.runs() for _ in range(first, end)]
        assert flat == pages.tolist()
        assert snapshot.size == (disk / "snap").stat().st_size
        snapshot.verify()


def test_load_takes_the_memory_of_each_block(disk: Path) -> None:
    memory = save_sequential(disk / "snap")
    loaded = np.full(len(memory), 0x77, dtype=np.uint8)
    with open_snapshot(disk / "snap") as snapshot:
        snapshot.load({"ram": loaded})
        with pytest.raises(BlockMismatch):
            snapshot.load({})
        with pytest.raises(BlockMismatch):
            snapshot.load({"ram": loaded, "other": loaded})
    assert (loaded == memory).all()


def test_closed_snapshot_says_so(disk: Path) -> None:
    save_sequential(disk / "snap")
    snapshot = open_snapshot(disk / "snap")
    snapshot.close()
    snapshot.close()
    with pytest.raises(UsageError, match="closed"):
        snapshot.blocks["ram"].read(0, 1)
    with pytest.raises(UsageError, match="closed"):
        snapshot.verify()


@pytest.mark.usefixtures("same_descriptors")
def test_nothing_stays_open(disk: Path) -> None:
    save_sequential(disk / "snap")
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        snapshot.verify()
    (disk / "bad").write_bytes(b"QEVM")
    with pytest.raises(SnapshotError):
        open_snapshot(disk / "bad")


def test_kept_index_is_used_without_reading_the_pages(disk: Path) -> None:
    memory = save_sequential(disk / "snap").tobytes()
    with open_snapshot(disk / "snap", index=disk / "index") as first:
        assert first.blocks["ram"].read(0, len(memory)) == memory
    info = (disk / "snap").stat()
    assert (disk / "index").stat().st_size < info.st_size // 50
    # A page between the ends that are looked at: only a new pass would meet the damage.
    at = info.st_size // 2 // 4096 * 4096
    with (disk / "snap").open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 8200)
    os.utime(disk / "snap", ns=(info.st_atime_ns, info.st_mtime_ns))
    with open_snapshot(disk / "snap", index=disk / "index") as second:
        assert second.blocks["ram"].read(0, 4096) == memory[:4096]
        assert second.stream.complete
    with pytest.raises(SnapshotError), open_snapshot(disk / "snap") as third:
        third.verify()


def test_index_of_another_file_is_made_anew(disk: Path) -> None:
    save_sequential(disk / "snap", seed=1)
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        snapshot.verify()
    kept = (disk / "index").read_bytes()
    memory = save_sequential(disk / "snap", seed=2).tobytes()
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        assert snapshot.blocks["ram"].read(0, len(memory)) == memory
    assert (disk / "index").read_bytes() != kept


@some
@given(st.integers(8, 1 << 20), st.integers(1, 255), st.booleans())
def test_damaged_index_is_made_anew(at: int, flip: int, cut: bool) -> None:
    with directory_on_disk() as disk:
        path, index = disk / "snap", disk / "index"
        memory = save_sequential(path).tobytes()
        with open_snapshot(path, index=index) as snapshot:
            snapshot.verify()
        whole = index.read_bytes()
        data = bytearray(whole)
        at = 8 + at % (len(data) - 8)  # behind the magic
        data[at] ^= flip
        index.write_bytes(data[:at] if cut else data)
        with open_snapshot(path, index=index) as snapshot:
            assert snapshot.blocks["ram"].read(0, len(memory)) == memory
        assert index.read_bytes() == whole


def test_index_with_more_than_was_written_is_made_anew(disk: Path) -> None:
    save_sequential(disk / "snap")
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        snapshot.verify()
    whole = (disk / "index").read_bytes()
    (disk / "index").write_bytes(whole + b"?")
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        snapshot.verify()
    assert (disk / "index").read_bytes() == whole


def test_index_without_a_digest_as_it_once_was_is_made_anew(disk: Path) -> None:
    memory = save_sequential(disk / "snap").tobytes()
    (disk / "index").write_bytes(b"qmindex1" + bytes(100))
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        assert snapshot.blocks["ram"].read(0, len(memory)) == memory
    assert (disk / "index").read_bytes().startswith(b"qmindex2")


def test_index_is_durable_before_it_has_its_name(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sequential(disk / "snap")
    named: list[bool] = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        named.append((disk / "index").exists())
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with open_snapshot(disk / "snap", index=disk / "index") as snapshot:
        snapshot.verify()
    assert named == [False]
    assert (disk / "index").exists()


@some
@given(st.integers(8, 1 << 20), st.integers(1, 255), st.booleans())
def test_forged_index_gives_no_more_than_bytes_of_the_file(at: int, flip: int, cut: bool) -> None:
    with directory_on_disk() as disk:
        path, index = disk / "snap", disk / "index"
        memory = save_sequential(path).tobytes()
        with open_snapshot(path, index=index) as snapshot:
            snapshot.verify()
        data = bytearray(index.read_bytes())
        at = 24 + at % (len(data) - 24)  # behind the digest
        data[at] ^= flip
        del data[at if cut else len(data) :]
        data[8:24] = xxhash.xxh3_128_digest(data[24:])
        index.write_bytes(data)
        with open_snapshot(path, index=index) as snapshot:
            block = snapshot.blocks["ram"]
            assert len(block.read(0, block.length)) == len(memory)
            assert snapshot.stream.complete


@pytest.mark.parametrize("to", ["stream", "mapped-ram", "raw"])
def test_block_that_fits_no_disk_is_refused_at_once(disk: Path, to: str) -> None:
    (disk / "snap").write_bytes(sequential_stream(page_records(), length=1 << 60))
    with pytest.raises((NotSupported, TargetError)):
        convert(disk / "snap", disk / "to", to=to)
    assert not (disk / "to").exists() or not [*(disk / "to").iterdir()]


def test_index_takes_the_place_of_no_other_file(disk: Path) -> None:
    save_sequential(disk / "snap")
    before = (disk / "snap").read_bytes()
    with pytest.raises(UsageError, match="the index would replace"):
        open_snapshot(disk / "snap", index=disk / "snap")
    assert (disk / "snap").read_bytes() == before


@pytest.mark.parametrize("offset", [0, 0x1234])
@pytest.mark.parametrize("kind", [Format.MAPPED_RAM, Format.SEQUENTIAL])
def test_kind_is_found_at_an_offset(disk: Path, kind: Format, offset: int) -> None:
    uri = f"file:{disk}/snap,offset={offset}"
    memory = known_memory()
    if kind is Format.SEQUENTIAL:
        start_sequential_save(uri, [RamBlock("ram", memory)]).wait()
    else:
        pyqmigrate.save(uri, [RamBlock("ram", memory)])
    with open_snapshot(disk / "snap", offset=offset or None) as snapshot:
        assert snapshot.format is kind
        assert snapshot.blocks["ram"].read(0, len(memory)) == memory.tobytes()


@pytest.mark.parametrize("kind", [Format.MAPPED_RAM, Format.SEQUENTIAL])
def test_libvirt_header_is_stepped_over(disk: Path, kind: Format) -> None:
    front = header(ImageFormat.RAW if kind is Format.SEQUENTIAL else ImageFormat.SPARSE)
    path = disk / "snap"
    path.write_bytes(front)
    uri, memory = f"file:{path},offset={len(front)}", known_memory()
    if kind is Format.SEQUENTIAL:
        start_sequential_save(uri, [RamBlock("ram", memory)]).wait()
    else:
        pyqmigrate.save(uri, [RamBlock("ram", memory)])
    fd = os.open(path, os.O_RDONLY)
    for target in (path, Descriptors(fd)):
        with open_snapshot(target) as snapshot:
            assert snapshot.libvirt is not None
            assert snapshot.libvirt.xml == "<domain/>"
            assert (snapshot.format, snapshot.offset) == (kind, len(front))
            assert snapshot.blocks["ram"].read(0, len(memory)) == memory.tobytes()
    os.close(fd)


def test_unfinished_libvirt_image_is_refused(disk: Path) -> None:
    (disk / "snap").write_bytes(header(ImageFormat.SPARSE, complete=False))
    with pytest.raises(SnapshotError, match="did not finish"):
        open_snapshot(disk / "snap")


def test_image_compressed_with_lzop_shows_what_to_do(disk: Path) -> None:
    (disk / "snap").write_bytes(header(ImageFormat.LZOP) + bytes(100))
    with pytest.raises(NotSupported, match=r"lzop.*tail -c \+4322 .*lzop -dc.*convert - OUT"):
        open_snapshot(disk / "snap")


def changed_often(disk: Path) -> Path:
    """A stream whose page 1 changes more often than an index can tell."""
    delta = b"\1" + struct.pack(">H", 3) + b"\0\1\x99"
    changes = (words(4096 | 0x40 | 0x20) + delta) * 1100
    (disk / "snap").write_bytes(sequential_stream(page_records() + changes))
    return disk / "snap"


def test_page_that_changed_too_often_is_refused_to_random_reads_alone(disk: Path) -> None:
    with open_snapshot(changed_often(disk)) as snapshot:
        snapshot.verify()
        block = snapshot.blocks["pc.ram"]
        assert (block.data_pages, block.zero_pages, block.external) == (2, 14, False)
        buffer = bytearray(block.length)
        snapshot.load({"pc.ram": buffer})
        assert buffer[4096] == 0x99
        with pytest.raises(NotSupported, match="1024"):
            block.read(4096, 1)


def test_structure_is_checked_without_an_index(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = save_sequential(disk / "snap")
    monkeypatch.delattr("pyqmigrate.snapshot.sequential.PageIndex")
    with open_snapshot(disk / "snap") as snapshot:
        snapshot.verify()
        assert pyqmigrate.provenance(snapshot).loadable
        full = memory.reshape(-1, 4096).any(axis=1).sum()
        assert snapshot.blocks["ram"].data_pages == full


@pytest.mark.parametrize("index", [False, True])
def test_counts_are_the_same_with_an_index_and_without(disk: Path, index: bool) -> None:
    away = words(0x02 | 0x20) + b"\0" + words(8192 | 0x02 | 0x20) + b"\7"
    (disk / "snap").write_bytes(sequential_stream(page_records() + away))
    with open_snapshot(disk / "snap") as snapshot:
        if index:
            snapshot.prepare_random_reads()
        snapshot.read_through()
        block = snapshot.blocks["pc.ram"]
        assert (block.data_pages, block.zero_pages) == (1, 15)


def test_few_records_at_far_places_cost_no_bitmaps(disk: Path) -> None:
    far = b"".join(words(k << 27 | 0x02 | 0x20) + b"\0" for k in range(1, 20000))
    (disk / "snap").write_bytes(sequential_stream(page_records() + far, length=1 << 43))
    with open_snapshot(disk / "snap") as snapshot, pytest.raises(SnapshotError, match="sparse"):
        snapshot.verify()


def test_cut_stream_is_a_snapshot_error_wherever_it_is_cut(disk: Path) -> None:
    save_sequential(disk / "whole")
    data = (disk / "whole").read_bytes()
    for share in (0.0001, 0.3, 0.7, 0.999):
        (disk / "cut").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SnapshotError), open_snapshot(disk / "cut") as snapshot:
            snapshot.verify()


def test_multifd_without_mapped_ram_is_not_supported(disk: Path) -> None:
    save_sequential(disk / "snap")
    data = (disk / "snap").read_bytes()
    part = data.index(encode_part_header()) + len(encode_part_header())
    (disk / "snap").write_bytes(data[:part] + (0x200).to_bytes(8, "big") + data[part:])
    with open_snapshot(disk / "snap") as snapshot:
        with pytest.raises(NotSupported, match="multifd"):
            snapshot.verify()
        with pytest.raises(NotSupported, match="multifd"):
            snapshot.load({"ram": bytearray(snapshot.blocks["ram"].length)})


def test_interrupted_pass_can_be_made_again(disk: Path) -> None:
    save_sequential(disk / "snap")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with open_snapshot(disk / "snap") as snapshot:
        with pytest.raises(KeyboardInterrupt):
            snapshot.read_through(interrupt)
        snapshot.verify()


@pytest.mark.parametrize("to", ["mapped-ram", "stream"])
@pytest.mark.parametrize("kind", [Format.MAPPED_RAM, Format.SEQUENTIAL])
def test_converted_snapshot_has_the_memory(disk: Path, kind: Format, to: str) -> None:
    save = save_sequential if kind is Format.SEQUENTIAL else save_known
    memory = save(disk / "from")
    convert(disk / "from", disk / "to", to=to)
    with open_snapshot(disk / "to") as snapshot:
        assert str(snapshot.format) == to
        snapshot.verify()
        assert snapshot.blocks["ram"].read(0, len(memory)) == memory.tobytes()


def test_conversion_into_its_own_source_in_place_is_refused(disk: Path) -> None:
    save_sequential(disk / "snap")
    before = (disk / "snap").read_bytes()
    with pytest.raises(UsageError):
        convert(disk / "snap", f"file:{disk}/snap,offset=4096", to="mapped-ram")
    assert (disk / "snap").read_bytes() == before


def test_failed_conversion_leaves_no_file(disk: Path) -> None:
    save_sequential(disk / "snap")
    with open_snapshot(disk / "snap") as snapshot:
        snapshot.verify()
        os.truncate(disk / "snap", 100_000)
        with pytest.raises(SnapshotError):
            convert(snapshot, disk / "to", to="mapped-ram")
    assert list(disk.iterdir()) == [disk / "snap"]
