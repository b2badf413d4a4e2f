"""Snapshots that are added are shown byte for byte; only what is new is read and stored."""

from __future__ import annotations

import gzip
import os
import random
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import RamBlock, open_snapshot, save, seal, verify_seal
from pyqmigrate.errors import NotSupported, PyqmigrateError, SnapshotError, TargetError, UsageError
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.store.keys import pack_key, snapshot_key
from pyqmigrate.format.store.zstd import compress
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.working_set import TouchedRun, WorkingSet
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.working_set_file import working_set_path, write_working_set
from pyqmigrate.store import AddReport, Store, add, gc, get, known_packs, verify
from pyqmigrate.store import adding as module
from pyqmigrate.store.pack_writer import PackWriter
from tests.harness.examples import few
from tests.harness.increment_files import save_increment
from tests.harness.kernel import PAGE_SIZES, guest
from tests.harness.snapshots import Bytes, data_bytes, ram, save_known

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as opened:
        yield opened


def text_memory(npages: int, seed: int = 0) -> Bytes:
    """Pages that zstd makes smaller: zero, filled with one word, and with numbers as text."""
    rng = np.random.default_rng(seed)
    memory = np.zeros((npages, PAGE), np.uint8)
    for page in range(npages):
        kind = rng.integers(0, 8)
        if kind == 0:
            continue
        if kind == 1:
            memory[page] = 0xCC
            continue
        words = b" ".join(b"%d" % number for number in rng.integers(0, 1 << 30, 400))
        memory[page] = np.frombuffer(words[:PAGE].ljust(PAGE), np.uint8)
    return memory.reshape(-1)


def write(path: Path, memory: Bytes, *, sealed: bool = False, page_size: int = PAGE) -> Path:
    save(path, [RamBlock("ram", memory, page_size)], seal="xxh3-128" if sealed else None)
    return path


def shown(store: Store, name: str) -> bytes:
    with store.open_file(name) as file:
        return bytes(file.read(0, file.size))


def seal_of(store: Store, name: str) -> bytes:
    return store.read_snapshot(name).seal


def packs(store: Store) -> set[str]:
    assert store.place.directory is not None
    return {path.name for path in (store.place.directory / "packs").glob("*")}


def expected_image(path: Path) -> bytes:
    """The file, with zeros in the pages whose bits are clear."""
    data = bytearray(path.read_bytes())
    with open_snapshot(path) as snapshot:
        for block in snapshot.blocks.values():
            assert block.layout is not None
            for first, end, has_data in block.runs():
                if not has_data:
                    start = block.layout.pages_offset + first * block.page_size
                    length = (end - first) * block.page_size
                    data[start : start + length] = bytes(length)
    return bytes(data)


@settings(few, max_examples=6)
@given(st.data(), st.sampled_from(PAGE_SIZES), st.sampled_from(["auto", "exact", "dense"]))
def test_any_memory_is_shown_byte_for_byte_and_its_seal_is_right(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, page_size: int, sparse: str
) -> None:
    directory = tmp_path_factory.mktemp("add")
    blocks = []
    for name in ("pc.ram", "vga", "rom")[: data.draw(st.integers(1, 3))]:
        npages = data.draw(st.integers(1, 3 * MIB // page_size))
        density = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        memory = ram(npages, density=density, page_size=page_size, seed=npages)
        blocks.append(RamBlock(name, memory, page_size))
    path = directory / "guest"
    save(path, blocks, sparse=sparse)  # type: ignore[arg-type]
    stale = data.draw(st.booleans())
    if stale:  # old bytes in the slots of pages whose bits are clear, as QEMU may leave them
        with open_snapshot(path) as snapshot, path.open("r+b") as file:
            for block in snapshot.blocks.values():
                assert block.layout is not None
                for first, _, has_data in block.runs():
                    if not has_data:
                        file.seek(block.layout.pages_offset + first * page_size)
                        file.write(b"old bytes")
    with Store.create(directory / "store") as store:
        report = add(store, path)
        assert shown(store, "guest") == expected_image(path)
        get(store, "guest", directory / "back")
        assert verify_seal(directory / "back").intact
        assert os.stat(directory / "back").st_mtime_ns == os.stat(path).st_mtime_ns
        with open_snapshot(path) as snapshot:
            assert report.data_bytes == sum(
                block.data_pages * page_size for block in snapshot.blocks.values()
            )
        if not stale:
            seal(path)
            assert seal_of(store, "guest") == Path(f"{path}.seal").read_bytes()


def test_the_same_guest_again_needs_no_pack(store: Store, tmp_path: Path) -> None:
    memory = text_memory(600)
    first = add(store, write(tmp_path / "a", memory))
    assert first.new_pages == first.pages > 300
    assert first.same_pages > 0
    assert first.new_bytes < first.pages * PAGE
    before = packs(store)
    second = add(store, write(tmp_path / "b", memory), "second", parent=None)
    assert (second.pages, second.new_pages, second.new_bytes) == (first.pages, 0, 0)
    assert packs(store) == before
    assert shown(store, "second") == (tmp_path / "b").read_bytes()


def prototype_size(memory: Bytes) -> int:
    """Bytes of a store of this memory as the reference prototype makes it: pages that are not zero, each
    once, in order, 64 to a frame of zstd at level 1."""
    pages = (memory[at : at + PAGE].tobytes() for at in range(0, len(memory), PAGE))
    unique = [page for page in dict.fromkeys(pages) if any(page)]
    frames = (b"".join(unique[first : first + 64]) for first in range(0, len(unique), 64))
    return sum(len(compress(frame, 1)) for frame in frames)


def test_what_is_stored_is_not_larger_than_by_the_prototype(store: Store, tmp_path: Path) -> None:
    memory = text_memory(1500, seed=7)
    report = add(store, write(tmp_path / "a", memory))
    assert report.new_bytes + report.snapshot_bytes <= 1.05 * prototype_size(memory)


def test_equal_pages_of_one_snapshot_are_stored_once(store: Store, tmp_path: Path) -> None:
    memory = np.tile(text_memory(8, seed=3)[4 * PAGE :], 50)
    report = add(store, write(tmp_path / "a", memory))
    assert report.new_pages <= 4 < report.pages
    assert shown(store, "a") == (tmp_path / "a").read_bytes()


def changed(memory: Bytes, pages: list[int]) -> Bytes:
    """The memory with a few bytes changed in each of these pages."""
    after = memory.copy()
    for page in pages:
        after[page * PAGE + 100 : page * PAGE + 108] ^= 0x11
    return after


def test_with_both_seals_only_the_pieces_that_differ_are_read(store: Store, tmp_path: Path) -> None:
    memory = text_memory(12 * 256)
    add(store, write(tmp_path / "a", memory, sealed=True))
    touched = [0, 255, 256 * 5 + 7, 256 * 11]
    path = write(tmp_path / "b", changed(memory, touched), sealed=True)
    report = add(store, path)
    assert report.parent == "a"
    assert report.sealed
    assert report.bytes_read <= 5 * MIB  # of three pieces of RAM, and one before them
    assert report.new_pages <= len(touched)
    assert shown(store, "b") == path.read_bytes()
    assert seal_of(store, "b") == Path(f"{path}.seal").read_bytes()


@settings(few, max_examples=3)
@given(st.sets(st.integers(0, 5 * 256 - 1), max_size=30), st.integers(0, 9))
def test_any_change_of_a_sealed_guest_is_shown(
    tmp_path_factory: pytest.TempPathFactory, pages: set[int], seed: int
) -> None:
    directory = tmp_path_factory.mktemp("sealed")
    memory = ram(5 * 256, seed=seed)
    after = changed(memory, sorted(pages))
    with Store.create(directory / "store") as store:
        for name, content in (("a", memory), ("b", after), ("c", memory), ("d", after)):
            path = write(directory / name, content, sealed=True)
            report = add(store, path)
            assert shown(store, name) == path.read_bytes()
            if name in "cd":
                assert report.new_pages == 0


def test_pages_are_xored_with_those_of_the_parent_and_never_twice(
    store: Store, tmp_path: Path
) -> None:
    memory = np.random.default_rng(1).integers(0, 256, 300 * PAGE, np.uint8)
    add(store, write(tmp_path / "a", memory))
    for name, step in (("b", 1), ("c", 2)):
        content = changed(memory, list(range(0, 300, step)))
        content[step::PAGE] ^= 0x3C
        path = write(tmp_path / name, content)
        report = add(store, path)
        assert report.new_bytes < 0.1 * report.new_pages * PAGE
        assert shown(store, name) == path.read_bytes()
    first = store.read_snapshot("a").packs
    for name in ("b", "c"):
        snapshot = store.read_snapshot(name)
        own = [pack for pack in snapshot.packs if pack not in first]
        assert set(first) & set(snapshot.packs)  # the bases are needed
        for pack in own:
            footer = store.packs.footer(pack)
            assert sum(footer.kinds) > 0
            assert set(footer.base_packs) <= set(first)
    gc(store)
    assert shown(store, "c") == (tmp_path / "c").read_bytes()


def test_pages_that_xor_makes_no_smaller_are_stored_as_they_are(
    store: Store, tmp_path: Path
) -> None:
    add(store, write(tmp_path / "a", text_memory(300, seed=1)))
    report = add(store, write(tmp_path / "b", text_memory(300, seed=2)), parent="a")
    assert report.new_pages > 100
    new = set(store.read_snapshot("b").packs) - set(store.read_snapshot("a").packs)
    assert all(sum(store.packs.footer(pack).kinds) == 0 for pack in new)
    assert shown(store, "b") == (tmp_path / "b").read_bytes()


def test_more_than_one_pack_is_filled(store: Store, tmp_path: Path) -> None:
    memory = np.random.default_rng(5).integers(0, 256, 20 * MIB, np.uint8)
    report = add(store, write(tmp_path / "a", memory))
    assert report.new_packs == 3
    assert shown(store, "a") == (tmp_path / "a").read_bytes()
    again = add(store, write(tmp_path / "b", memory), parent=None)  # runs pass from pack to pack
    assert again.new_packs == 0
    assert shown(store, "b") == (tmp_path / "b").read_bytes()


def convert_to(path: Path, target: Path) -> bytes:
    pyqmigrate.convert(path, target, to="mapped-ram")
    return target.read_bytes()


def test_a_sequential_stream_is_stored_as_convert_makes_it(store: Store, tmp_path: Path) -> None:
    save_known(tmp_path / "mapped")
    pyqmigrate.convert(tmp_path / "mapped", tmp_path / "stream", to="stream")
    compressed = tmp_path / "stream.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "stream").read_bytes(), 1))
    for name in ("stream", "stream.gz"):
        report = add(store, tmp_path / name)
        assert report.source == "sequential"
        assert not report.sealed
        assert shown(store, name) == convert_to(tmp_path / name, tmp_path / f"{name}.mapped")
    get(store, "stream", tmp_path / "back")
    assert verify_seal(tmp_path / "back").intact


@pytest.mark.parametrize("damage", ["missing", "short", "its base is missing"])
def test_pages_of_a_pack_that_is_not_there_are_stored_again(
    store: Store, tmp_path: Path, damage: str
) -> None:
    memory = text_memory(600)
    first = add(store, write(tmp_path / "a", memory), "a")
    assert store.place.directory is not None
    folder = store.place.directory / "packs"
    pack = next(folder.iterdir())
    if damage == "its base is missing":
        after = memory.copy()
        after[::PAGE] ^= 1  # so that all pages are new, and XORed with the parent's
        first = add(store, write(tmp_path / "b", after), "b")
        assert pack.stem in {name.hex() for name in store.read_snapshot("b").packs}
        memory = after
        add(store, tmp_path / "b", "whole", parent=None)  # whose footers are known now
    if damage == "short":
        pack.write_bytes(pack.read_bytes()[:-1])
    else:
        pack.unlink()
    report = add(store, write(tmp_path / "again", memory), "again")
    assert report.new_pages == first.new_pages > 400
    assert verify(store, ["again"]).intact


def test_an_increment_is_stored_whole_and_its_base_is_the_parent(
    store: Store, tmp_path: Path
) -> None:
    memory = text_memory(800)
    base = tmp_path / "base"
    save(base, [RamBlock("ram", memory)], machine="pc-q35-10.0")
    for name in ("other", "base", "newest"):
        other = tmp_path / f"{name}.mapped"
        save(other, [RamBlock("ram", text_memory(800, seed=len(name)))], machine="pc-q35-10.0")
        add(store, base if name == "base" else other, name)
    pages = np.zeros(800, dtype=bool)
    pages[[3, 200, 700]] = True
    after = changed(memory, [3, 200, 700])
    save_increment(tmp_path / "increment", base, {"ram": after}, {"ram": pages})
    report = add(store, tmp_path / "increment")
    assert (report.source, report.parent) == ("increment", "base")
    assert report.new_pages <= 3
    assert shown(store, "increment") == convert_to(tmp_path / "increment", tmp_path / "whole")


def test_an_image_of_libvirt_is_shown_with_its_header(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "image"
    header = LibvirtHeader(True, 2, ImageFormat.SPARSE, True, "<xml/>", "", 5000, "little")
    path.write_bytes(encode_header(header))
    save(f"file:{path},offset=5000", [RamBlock("ram", ram(300))])
    assert path.read_bytes()[:5000] == encode_header(header)
    report = add(store, path)
    assert report.source == "libvirt"
    assert shown(store, "image") == path.read_bytes()
    get(store, "image", tmp_path / "back")
    with open_snapshot(tmp_path / "back") as back:
        assert back.libvirt == header
    assert verify_seal(tmp_path / "back").intact


def test_an_open_snapshot_stays_open(store: Store, tmp_path: Path) -> None:
    save_known(tmp_path / "a")
    with open_snapshot(tmp_path / "a") as snapshot:
        add(store, snapshot, "copy", labels={"host": "h1"})
        assert snapshot.blocks["ram"].read(0, 10)
    assert store.head("copy").labels == {"host": "h1"}


def test_an_old_seal_is_not_used(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(300), sealed=True)
    before = Path(f"{path}.seal").read_bytes()
    os.utime(path, ns=(1, 10**18))
    report = add(store, path)
    assert not report.sealed
    assert seal_of(store, "a") != before
    assert store.head("a").mtime_ns == 10**18


def test_a_file_that_differs_from_its_seal_is_not_added(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(600, density=1.0), sealed=True)
    times = os.stat(path)
    with path.open("r+b") as file:
        file.seek(2 * MIB + 77)
        file.write(b"flipped")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(SnapshotError, match=r"differs from its seal.*0x200000"):
        add(store, path)
    assert store.names() == []


def test_a_damaged_seal_is_left_alone(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(300), sealed=True)
    Path(f"{path}.seal").write_bytes(b"junk\n")
    assert not add(store, path).sealed
    assert shown(store, "a") == path.read_bytes()


def test_a_file_that_is_cut_off_is_not_added(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(300))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SnapshotError):
        add(store, path)
    (tmp_path / "text").write_text("not a snapshot")
    with pytest.raises((SnapshotError, NotSupported)):
        add(store, tmp_path / "text")
    assert store.names() == []


def test_a_file_that_changes_meanwhile_is_not_added(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a", ram(300))
    finish = PackWriter.finish

    def touch(self: PackWriter) -> None:
        os.utime(path)
        finish(self)

    monkeypatch.setattr(PackWriter, "finish", touch)
    with pytest.raises(TargetError, match="was changed while it was being added"):
        add(store, path)
    assert store.names() == []


def test_a_stream_that_changes_while_it_is_converted_is_not_added(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_known(tmp_path / "mapped")
    path = tmp_path / "stream"
    pyqmigrate.convert(tmp_path / "mapped", path, to="stream")
    convert = pyqmigrate.convert

    def touch(*arguments: object, **options: object) -> None:
        convert(*arguments, **options)  # type: ignore[call-overload]
        os.utime(path)

    monkeypatch.setattr("pyqmigrate.store.plain_snapshot.convert", touch)
    with pytest.raises(TargetError, match="was changed while it was being added"):
        add(store, path)
    assert store.names() == []


def test_a_record_that_cannot_be_one_is_refused_or_left_alone(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(300))
    record = Path(f"{path}.vm.json")
    record.touch()
    os.truncate(record, 17 * MIB)
    with pytest.raises(SnapshotError, match="record"):
        add(store, path)
    assert not packs(store)
    record.unlink()
    os.mkfifo(record)
    add(store, path)
    with store.open_file("a") as file:
        assert set(file.companions) == {".seal"}


def test_bad_arguments_are_refused_before_anything_is_written(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(300))
    add(store, path, "taken")
    before = packs(store)
    other = write(tmp_path / "b", ram(300, seed=9))
    for arguments, message in (
        ({"name": "taken"}, "'taken' already"),
        ({"name": "../x"}, "cannot be the name"),
        ({"name": "b", "parent": "missing"}, "no snapshot 'missing'"),
        ({"name": "b", "labels": {"a": "x" * 20000}}, "labels"),
        ({"name": "b", "progress": 5}, "progress"),
    ):
        with pytest.raises(UsageError, match=message):
            add(store, other, **arguments)  # type: ignore[arg-type]
    save(tmp_path / "c", [RamBlock("other", ram(300))])
    with pytest.raises(UsageError, match="other RAM blocks"):
        add(store, tmp_path / "c", parent="taken")
    assert packs(store) == before
    assert store.names() == ["taken"]


def test_the_parent_is_of_the_same_guest_or_none(store: Store, tmp_path: Path) -> None:
    memory = text_memory(600)
    for name, content, machine in (
        ("strange", memory, "pc-i440fx-10.0"),
        ("near", changed(memory, [5]), "q35"),
        ("far", text_memory(600, seed=8), "q35"),
    ):
        save(tmp_path / name, [RamBlock("ram", content)], machine=machine, seal="xxh3-128")
        add(store, tmp_path / name)
    save(tmp_path / "now", [RamBlock("ram", memory)], machine="q35", seal="xxh3-128")
    report = add(store, tmp_path / "now")
    assert report.parent == "near"
    assert report.new_pages == 0
    save(tmp_path / "x", [RamBlock("ram", memory)], machine="isapc", seal="xxh3-128")
    assert add(store, tmp_path / "x").parent is None


def test_the_packs_of_an_adder_that_failed_are_used_by_the_next(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a", text_memory(900))

    def fail(*_: object) -> AddReport:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Addition, "_publish", fail)
        with pytest.raises(KeyboardInterrupt):
            add(store, path)
    assert store.names() == []
    left = packs(store)
    assert left
    report = add(store, path)
    assert report.new_pages == 0
    assert packs(store) == left
    assert shown(store, "a") == path.read_bytes()


def test_a_damaged_pack_is_not_relied_on_and_is_written_again(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", text_memory(600))
    add(store, path)
    (pack,) = store.read_snapshot("a").packs
    assert store.place.directory is not None
    file = store.place.directory / pack_key(pack)
    good = file.read_bytes()
    os.chmod(file, 0o600)
    file.write_bytes(good[:-3] + b"xxx")
    with Store.open(store.place.directory) as again:
        report = add(again, path, "b")
        assert report.new_pages == report.pages
        assert file.read_bytes() == good
        assert shown(again, "b") == path.read_bytes()


def test_the_record_and_the_working_set_are_kept(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a", ram(300), sealed=True)
    Path(f"{path}.vm.json").write_text('{"machine": 1}')
    with open_snapshot(path) as snapshot, path.open("rb") as file:
        blocks = snapshot.blocks.values()
        specs = [BlockSpec("ram", b.length) for b in blocks]
        identity = identify_snapshot(path, file.fileno())
    touched = WorkingSet([TouchedRun(0, 5, 20)])
    write_working_set(working_set_path(path), identity, specs, touched, seconds=2.5)
    add(store, path)
    with store.open_file("a") as shown_file:
        assert shown_file.companions[".vm.json"] == b'{"machine": 1}'
        expected = working_set_path(path).read_bytes()
        assert shown_file.companions[".workingset"] == expected
    old = SnapshotId(identity.size, 5)
    write_working_set(working_set_path(path), old, specs, touched, seconds=2.5)
    add(store, path, "b")
    assert store.working_set("b") is None


def test_progress_reaches_the_end_of_the_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyqmigrate.store.reporting._EVERY", 0.0)
    path, seen = write(tmp_path / "a", ram(3000)), []
    add(store, path, progress=seen.append)
    size = path.stat().st_size
    assert [state.bytes_total for state in seen] == [size] * len(seen)
    assert seen[-1].bytes_done == size


def test_holes_of_a_large_file_are_not_read(store: Store, tmp_path: Path) -> None:
    memory = np.zeros(64 * MIB, np.uint8)
    memory[40 * MIB : 41 * MIB] = guest(np.ones(256, dtype=bool), PAGE, 4)
    path = write(tmp_path / "a", memory)
    report = add(store, path)
    assert report.bytes_read <= data_bytes(path, 0, path.stat().st_size) + 8 * MIB
    assert shown(store, "a") == path.read_bytes()


def test_a_parent_with_pages_past_the_end_of_its_pack_is_not_copied(
    store: Store, tmp_path: Path
) -> None:
    """A .snap whose digest is right, but which names pages that its pack does not have."""
    memory = ram(900, density=1.0)
    add(store, write(tmp_path / "a", memory, sealed=True))
    document = store.read_snapshot("a")
    runs = document.runs
    pages = array("I", (page + 50_000 for page in runs.pages))
    evil = replace(document, runs=replace(runs, pages=pages))
    assert store.place.directory is not None
    path = store.place.directory / snapshot_key("a")
    os.chmod(path, 0o600)
    path.write_bytes(evil.encode(store.config.key))
    report = add(store, write(tmp_path / "b", memory, sealed=True))
    assert report.parent == "a"
    assert report.bytes_read >= 900 * PAGE  # nothing is taken from it
    assert shown(store, "b") == (tmp_path / "b").read_bytes()


def test_only_the_newest_packs_are_compared_with(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        add(store, write(tmp_path / name, text_memory(300, seed=ord(name))), parent=None)
    path = write(tmp_path / "c", text_memory(300, seed=ord("a")))
    monkeypatch.setattr(known_packs, "PACKS_MAX", 1)
    monkeypatch.setattr(known_packs, "KNOWN_MAX", 10)
    assert add(store, path, parent="a").new_pages == 0  # the parent's are known all the same
    again = add(store, path, "again", parent=None)
    assert again.new_pages == again.pages
    assert shown(store, "again") == path.read_bytes()


def test_no_damage_of_the_store_makes_a_wrong_snapshot(tmp_path: Path) -> None:
    """Any bytes of any file are changed, then a guest that shares pages is added."""
    rng = random.Random(11)
    memory = ram(700, density=1.0)
    first = write(tmp_path / "a", memory, sealed=True)
    second = write(tmp_path / "b", changed(memory, [5, 300, 301, 699]), sealed=True)
    with Store.create(tmp_path / "store") as store:
        add(store, first)
    added = 0
    for number in range(40):
        directory = tmp_path / f"damaged{number}"
        shutil.copytree(tmp_path / "store", directory)
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        for path in rng.sample([path for path in files if path.stat().st_size], 1):
            os.chmod(path, 0o600)
            path.write_bytes(damaged(path.read_bytes(), rng))
        try:
            with Store.open(directory) as store:
                add(store, second)
                content = shown(store, "b")
        except (PyqmigrateError, OSError):
            continue
        finally:
            shutil.rmtree(directory)
        assert content == second.read_bytes()
        added += 1
    assert added > 5  # what was damaged is often not needed


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed_bytes = bytearray(data)
    kind = rng.randrange(3)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    for _ in range(rng.randint(1, 4)):
        at = rng.choice(
            [rng.randrange(len(data)), rng.randrange(max(len(data) - 600, 0), len(data))]
        )
        changed_bytes[at] ^= 1 << rng.randrange(8)
    return bytes(changed_bytes)
