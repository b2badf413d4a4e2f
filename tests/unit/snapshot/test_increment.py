"""An increment and its base are read as one snapshot; a wrong base is an error that names it."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqmigrate import (
    Format,
    MappedRamSnapshot,
    NotSupported,
    RamBlock,
    SnapshotError,
    TargetError,
    UsageError,
    convert,
    open_snapshot,
    save,
    seal,
    start_load,
    verify_seal,
)
from pyqmigrate.export.raw import unpack
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.increment import MAGIC, IncrementHeader
from pyqmigrate.integrity.save_seal import SaveSeal
from pyqmigrate.integrity.seal import stale_pages
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.devices import devices
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.save.increment import Base, IncrementWriter, increment_offset
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from pyqmigrate.snapshot.save.writer import SaveOptions, Sparse
from tests.harness.increment_files import MACHINE, base_of, bitmap_of, save_base, save_increment
from tests.harness.snapshots import Bytes, load, ram

PAGE = 4096


def changed_memory(seed: int = 0, npages: int = 700) -> tuple[Bytes, Bytes, np.ndarray]:
    """Return memory, what became of it, and which pages changed: some became zero."""
    random = np.random.default_rng(seed)
    old = ram(npages, seed=seed + 10)
    new = old.copy().reshape(npages, PAGE)
    changed = random.random(npages) < 0.2
    new[changed] = ram(npages, density=0.7, seed=seed + 20).reshape(npages, PAGE)[changed]
    return old, new.reshape(-1), changed


@pytest.fixture
def saved(shm: Path) -> Path:
    """``base`` and ``step``, an increment of it; and in ``shm`` nothing else."""
    old, new, changed = changed_memory()
    video = ram(40, seed=3)
    save_base(shm / "base", {"ram": old, "video": video})
    save_increment(
        shm / "step", shm / "base", {"ram": new, "video": video[::-1].copy()}, {"ram": changed}
    )
    return shm


def opened(path: Path, **options: object) -> IncrementSnapshot:
    snapshot = open_snapshot(path, **options)  # type: ignore[arg-type]
    assert isinstance(snapshot, IncrementSnapshot)
    return snapshot


def contents(path: Path, **options: object) -> dict[str, bytes]:
    with opened(path, **options) as snapshot:
        return {name: block.read(0, block.length) for name, block in snapshot.blocks.items()}


@given(data=st.data(), page_size=st.sampled_from([1024, 4096, 65536]), npages=st.integers(1, 150))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_increment_reads_as_its_pages_over_those_of_the_base(
    shm: Path, data: st.DataObject, page_size: int, npages: int
) -> None:
    seed = data.draw(st.integers(0, 1 << 30))
    random = np.random.default_rng(seed)
    shares = [data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])) for _ in range(3)]
    lower = random.integers(1, 256, (npages, page_size), dtype=np.uint8)
    upper = random.integers(1, 256, (npages, page_size), dtype=np.uint8)
    lower[random.random(npages) < shares[0]] = 0
    upper[random.random(npages) < shares[1]] = 0
    changed = random.random(npages) < shares[2]
    for name in ("base", "step"):
        (shm / name).unlink(missing_ok=True)
    save_base(shm / "base", {"ram": lower.reshape(-1)}, page_size=page_size)
    save_increment(
        shm / "step",
        shm / "base",
        {"ram": upper.reshape(-1)},
        {"ram": changed},
        page_size=page_size,
    )
    expected = np.where(changed[:, None], upper, lower)
    with opened(shm / "step") as snapshot:
        snapshot.verify()
        block = snapshot.blocks["ram"]
        assert block.changed_pages == changed.sum()
        assert block.read(0, block.length) == expected.tobytes()
        runs = [has for first, end, has in block.runs() for _ in range(first, end)]
        assert runs == [bool(bit) for bit in changed | lower.any(axis=1)]
        assert block.data_pages == sum(runs)
        first = data.draw(st.integers(0, block.length - 1))
        length = data.draw(st.integers(0, block.length - first))
        assert block.read(first, length) == expected.tobytes()[first : first + length]
    [(_, loaded)] = load(shm / "step").items()
    assert loaded.tobytes() == expected.tobytes()


def test_every_form_of_an_increment_is_the_whole_guest(saved: Path) -> None:
    expected = contents(saved / "step")
    for form in (Format.MAPPED_RAM, Format.SEQUENTIAL):
        convert(saved / "step", saved / "whole", to=form)
        with open_snapshot(saved / "whole") as snapshot:
            assert snapshot.format is form
            snapshot.prepare_random_reads()
            assert snapshot.machine == MACHINE
            for name, block in snapshot.blocks.items():
                assert block.read(0, block.length) == expected[name]
    with opened(saved / "step") as step:
        report = unpack(step, saved / "raw")
    for block in report.blocks:
        assert block.file is not None
        assert (saved / "raw" / block.file).read_bytes() == expected[block.name]
    with pytest.raises(UsageError, match="no snapshot is converted to an increment"):
        convert(saved / "step", saved / "more", to="increment")


def test_pages_that_are_not_cleared_stay_as_they_are(saved: Path) -> None:
    expected = contents(saved / "step")
    memories = {name: np.full(len(data), 0x77, np.uint8) for name, data in expected.items()}
    with opened(saved / "step") as snapshot:
        report = snapshot.load(memories, clear="leave")
        assert report.data_pages == sum(b.data_pages for b in snapshot.blocks.values())
        assert report.zero_pages == sum(b.zero_pages for b in snapshot.blocks.values())
        zero = [
            page
            for first, end, has in snapshot.blocks["ram"].runs()
            if not has
            for page in range(first, end)
        ]
    pages = memories["ram"].reshape(-1, PAGE)
    assert (pages[zero] == 0x77).all()
    pages[zero] = 0
    assert pages.tobytes() == expected["ram"]


def test_start_load_takes_an_increment(saved: Path) -> None:
    expected = contents(saved / "step")
    memories = {name: bytearray(len(data)) for name, data in expected.items()}
    start_load(saved / "step", memories).wait()
    assert {name: bytes(memory) for name, memory in memories.items()} == expected


def test_only_the_changed_pages_are_in_the_file(saved: Path) -> None:
    with opened(saved / "step") as snapshot:
        data = snapshot.changed_pages * PAGE
        assert snapshot.header.changed_bytes == data
        assert snapshot.allocated <= data * 1.05 + (2 << 20)


def test_a_base_beside_the_increment_may_move_with_it(saved: Path) -> None:
    expected = contents(saved / "step")
    (saved / "to").mkdir()
    for name in ("base", "step"):
        (saved / name).rename(saved / "to" / name)
    assert contents(saved / "to" / "step") == expected
    (saved / "link").symlink_to("to/step")
    assert contents(saved / "link") == expected


def test_a_base_elsewhere_is_named_by_its_whole_path(saved: Path) -> None:
    (saved / "to").mkdir()
    _old, new, changed = changed_memory()
    memories = {"ram": new, "video": ram(40, seed=3)}
    save_increment(saved / "to" / "step", saved / "base", memories, {"ram": changed})
    with opened(saved / "to" / "step") as snapshot:
        assert snapshot.header.base_path == str(saved / "base")


def test_a_missing_base_is_named_and_may_be_elsewhere(saved: Path) -> None:
    expected = contents(saved / "step")
    (saved / "base").rename(saved / "moved")
    with pytest.raises(TargetError, match=r"base .*/base.*--base PATH") as failed:
        open_snapshot(saved / "step")
    assert failed.value.errno == errno.ENOENT
    assert contents(saved / "step", base=saved / "moved") == expected
    # A copy has another time of modification; without a seal that makes it another file.
    shutil.copyfile(saved / "moved", saved / "copy")
    with pytest.raises(SnapshotError, match="it was modified since"):
        open_snapshot(saved / "step", base=saved / "copy")


def test_a_sealed_base_may_be_copied_with_its_seal(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    seal(shm / "base")
    save_increment(shm / "step", shm / "base", {"ram": new}, {"ram": changed})
    expected = contents(shm / "step")
    (shm / "copy").write_bytes((shm / "base").read_bytes())
    info = (shm / "base").stat()
    os.utime(shm / "copy", ns=(info.st_atime_ns, info.st_mtime_ns))
    shutil.copyfile(shm / "base.seal", shm / "copy.seal")
    (shm / "base").unlink()
    assert contents(shm / "step", base=shm / "copy") == expected


def test_a_changed_base_is_refused(saved: Path) -> None:
    with (saved / "base").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"x")
    with pytest.raises(SnapshotError, match=r"/base.* is not the file .* modified since.*--base"):
        open_snapshot(saved / "step")
    with (saved / "base").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SnapshotError, match=r"it has \d+ bytes, and had"):
        open_snapshot(saved / "step")


def test_a_base_of_another_kind_is_refused(saved: Path) -> None:
    with pytest.raises(SnapshotError, match="is an increment itself"):
        open_snapshot(saved / "step", base=saved / "step")
    start_sequential_save(saved / "stream", [RamBlock("ram", ram(10))]).wait()
    with pytest.raises(SnapshotError, match="is not a mapped-ram file"):
        open_snapshot(saved / "step", base=saved / "stream")
    (saved / "text").write_text("no snapshot at all")
    with pytest.raises(SnapshotError, match=r"/text"):
        open_snapshot(saved / "step", base=saved / "text")
    (saved / "disk").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(1 << 16))
    with pytest.raises(NotSupported, match=r"the base '.*/disk' of the increment"):
        open_snapshot(saved / "step", base=saved / "disk")


def test_base_that_is_not_a_regular_file_is_not_opened(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(saved / "fifo")
    open_file, opened_files = StreamFile.open.__func__, []  # type: ignore[attr-defined]

    def note(cls: type[StreamFile], target: object, **options: object) -> StreamFile:
        opened_files.append(target)
        return open_file(cls, target, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(StreamFile, "open", classmethod(note))
    for base in (saved / "fifo", Path("/dev/null"), saved):
        with pytest.raises(SnapshotError, match="is not a regular file"):
            open_snapshot(saved / "step", base=base)
    assert opened_files == [saved / "step"] * 3


def test_an_increment_cannot_be_a_base(saved: Path) -> None:
    with opened(saved / "step") as snapshot, pytest.raises(UsageError, match="increment itself"):
        Base.of(snapshot)  # type: ignore[arg-type]


def test_a_base_with_other_blocks_is_refused(saved: Path) -> None:
    base = base_of(saved / "base")
    save_base(saved / "other", {"ram": ram(20)})
    header = IncrementHeader.read(InputFile(saved / "step"))
    fake = dataclasses.replace(header, base=base_of(saved / "other").identity)
    with (saved / "step").open("r+b") as file:
        file.write(fake.encode(magic=True))
    with pytest.raises(SnapshotError, match="has other RAM blocks"):
        open_snapshot(saved / "step", base=saved / "other")
    fake = dataclasses.replace(header, blocks=base.blocks[:1])
    with (saved / "step").open("r+b") as file:
        file.write(fake.encode(magic=True))
    with pytest.raises(SnapshotError, match="not those of its header"):
        open_snapshot(saved / "step")


def test_the_stream_by_itself_is_not_a_snapshot(saved: Path) -> None:
    """Its clear pages would be zeros."""
    with pytest.raises(UsageError, match="is an increment"):
        open_snapshot(saved / "step", offset=1 << 20)
    with pytest.raises(UsageError, match="is an increment"):
        open_snapshot(f"file:{saved / 'step'},offset={1 << 20}")
    stream_file = StreamFile.open(saved / "step")
    with pytest.raises(UsageError, match="open it with open_snapshot"):
        MappedRamSnapshot(stream_file)
    with MappedRamSnapshot(StreamFile.open(saved / "step").without_header()) as alone:
        assert alone.offset == 1 << 20


def test_device_state_needs_no_base(saved: Path) -> None:
    (saved / "base").unlink()
    assert devices(saved / "step").machine == MACHINE


def test_neither_file_is_written_over_while_it_is_read(saved: Path) -> None:
    with opened(saved / "step") as snapshot:
        for name in ("base", "step", "base.seal"):
            (saved / name).touch()
            with pytest.raises(UsageError, match="in use"):
                convert(snapshot, saved / name, to="mapped-ram")
        with pytest.raises(TargetError) as failed:  # by the lock, and in another process too
            save(saved / "base", [RamBlock("ram", ram(4))], reuse=True)
        assert failed.value.errno == errno.EBUSY
        memory = snapshot.blocks["ram"].memory()
        with pytest.raises(UsageError, match="in use"):
            save(saved / "base", [RamBlock("ram", memory)])


def test_descriptors_are_closed(saved: Path, same_descriptors: None) -> None:
    contents(saved / "step")
    (saved / "base").rename(saved / "away")
    for _ in range(3):
        with pytest.raises(TargetError):
            open_snapshot(saved / "step")
    with pytest.raises(SnapshotError):
        open_snapshot(saved / "step", base=saved / "step")


# ---- seals ----


def test_an_increment_is_sealed_as_it_is_written(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    offset = increment_offset(base_of(shm / "base"))
    observer = SaveSeal(Algorithm.XXH3_128, offset, seal_path(shm / "step"))
    save_increment(shm / "step", shm / "base", {"ram": new}, {"ram": changed}, observer=observer)
    check = verify_seal(shm / "step")
    assert check is not None and check.intact
    with (shm / "step").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    check = verify_seal(shm / "step")
    assert check is not None and not check.intact


def test_an_increment_is_sealed_without_its_base(saved: Path) -> None:
    (saved / "base").unlink()
    report = seal(saved / "step")
    assert report.clear_pages_zero
    check = verify_seal(saved / "step")
    assert check is not None and check.intact


def test_old_bytes_under_clear_bits_are_never_seen(saved: Path) -> None:
    """Clear bits mean the page of the base. Sealing makes such bytes holes, as in every file."""
    expected = contents(saved / "step")
    with opened(saved / "step") as snapshot:
        block = snapshot.blocks["ram"]
        page = next(p for p in range(block.num_pages) if not block.bitmap[p])
        place = block.layout.pages_offset + page * PAGE
    with (saved / "step").open("r+b") as file:
        file.seek(place)
        file.write(b"old" * 100)
    assert contents(saved / "step") == expected
    assert seal(saved / "step").cleared_pages == 1
    assert contents(saved / "step") == expected


# ---- bases are protected ----


def test_a_base_is_not_replaced_under_its_increments(saved: Path) -> None:
    before = (saved / "base").read_bytes()
    for reuse in (False, True):
        with pytest.raises(UsageError, match=r"is the base of 'step', which contain only"):
            save(saved / "base", [RamBlock("ram", ram(4))], reuse=reuse)
    assert (saved / "base").read_bytes() == before
    (saved / "step").unlink()
    save(saved / "base", [RamBlock("ram", ram(4))])


def test_a_base_gets_no_other_seal_under_its_increments(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    seal(shm / "base")
    save_increment(shm / "step", shm / "base", {"ram": new}, {"ram": changed})
    seal(shm / "base")  # the same
    with pytest.raises(UsageError, match=r"is the base of 'step', which knows it by its seal"):
        seal(shm / "base", algorithm="sha256")
    contents(shm / "step")


def test_pages_of_a_base_are_not_cleared_under_its_increments(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    with open_snapshot(shm / "base") as snapshot:
        block = snapshot.blocks["ram"]
        assert block.layout is not None and block.bitmap is not None
        page = next(p for p in range(block.num_pages) if not block.bitmap[p])
        place = block.layout.pages_offset + page * PAGE
    with (shm / "base").open("r+b") as file:
        file.seek(place)
        file.write(b"old")
    save_increment(shm / "step", shm / "base", {"ram": new}, {"ram": changed})
    with pytest.raises(UsageError, match=r"would be changed, .* is the base of 'step'"):
        seal(shm / "base")
    contents(shm / "step")


# ---- writing ----


def test_the_magic_comes_last_into_descriptors(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    (shm / "step").write_bytes(b"old bytes" * 1000)
    fd = os.open(shm / "step", os.O_RDWR)
    try:
        writer = IncrementWriter(
            Descriptors(fd),
            [RamBlock("ram", new)],
            SaveOptions(machine=MACHINE),
            base_of(shm / "base"),
        )
        writer.begin()
        writer.write_pages([bitmap_of(changed)])
        assert os.pread(fd, 8, 0) == bytes(8)
        assert os.pread(fd, 4, 1 << 20) == bytes(4)
        writer.finish()
        assert os.pread(fd, 8, 0) == MAGIC
        writer.close()
    finally:
        os.close(fd)
    with opened(shm / "step") as snapshot:
        assert snapshot.header.base_path == str(shm / "base")  # descriptors have no directory
        snapshot.verify()


def test_a_page_that_becomes_zero_in_a_later_pass_is_a_hole(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    memory = new.copy()
    writer = IncrementWriter(
        shm / "step", [RamBlock("ram", memory)], SaveOptions(machine=MACHINE), base_of(shm / "base")
    )
    writer.begin()
    writer.write_pages([bitmap_of(changed)])
    page = int(np.flatnonzero(changed)[3])
    memory[page * PAGE : (page + 1) * PAGE] = 0
    again = np.zeros(len(changed), bool)
    again[page] = True
    writer.write_pages([bitmap_of(again)])
    writer.finish()
    writer.close()
    expected = np.where(changed[:, None], memory.reshape(-1, PAGE), old.reshape(-1, PAGE))
    with opened(shm / "step") as snapshot:
        snapshot.verify()
    assert contents(shm / "step") == {"ram": expected.tobytes()}


def test_an_abandoned_increment_leaves_nothing(shm: Path) -> None:
    old, new, changed = changed_memory()
    save_base(shm / "base", {"ram": old})
    before = sorted(shm.iterdir())
    writer = IncrementWriter(
        shm / "step", [RamBlock("ram", new)], SaveOptions(machine=MACHINE), base_of(shm / "base")
    )
    writer.begin()
    writer.write_pages([bitmap_of(changed)])
    writer.close()
    assert sorted(shm.iterdir()) == before


@pytest.mark.parametrize(
    ("blocks", "options", "says"),
    [
        ([RamBlock("ram", bytes(PAGE))], {}, "with 4096 bytes"),
        ([RamBlock("rom", bytes(700 * PAGE))], {}, "'rom'"),
        ([RamBlock("ram", bytes(700 * PAGE)), RamBlock("b", bytes(PAGE))], {}, "2 blocks"),
        ([RamBlock("ram", bytes(700 * PAGE))], {"reuse": True}, "new file"),
        ([RamBlock("ram", bytes(700 * PAGE))], {"left_out": ["ram"]}, "all blocks"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_before_a_file_changes(
    shm: Path, blocks: list[RamBlock], options: dict[str, object], says: str
) -> None:
    save_base(shm / "base", {"ram": ram(700)})
    (shm / "step").write_bytes(b"before")
    with (shm / "step").open("r+b") as file:
        for target in (shm / "step", Descriptors(file.fileno())):
            with pytest.raises(UsageError, match=says):
                IncrementWriter(target, blocks, SaveOptions(**options), base_of(shm / "base"))  # type: ignore[arg-type]
    assert (shm / "step").read_bytes() == b"before"


def test_a_base_is_not_written_over_by_its_increment(shm: Path) -> None:
    save_base(shm / "base", {"ram": ram(700)})
    with pytest.raises(UsageError, match="the base of this increment"):
        save_increment(shm / "base", shm / "base", {"ram": ram(700)}, {})


@pytest.mark.parametrize("page_size", [1024, 4096])
@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
def test_pages_that_were_not_selected_are_holes(disk: Path, page_size: int, sparse: str) -> None:
    """A seal says so, and the file is no larger than what changed."""
    npages = 999
    old = ram(npages, density=1, page_size=page_size, seed=1)
    new = ram(npages, density=1, page_size=page_size, seed=2)
    changed = np.zeros(npages, bool)
    changed[::3] = True
    save_base(disk / "base", {"ram": old}, page_size=page_size)
    save_increment(
        disk / "step",
        disk / "base",
        {"ram": new},
        {"ram": changed},
        page_size=page_size,
        sparse=Sparse(sparse),
    )
    with opened(disk / "step") as snapshot:
        assert stale_pages(snapshot) == {}
        assert snapshot.blocks["ram"].changed_pages == changed.sum()
    expected = np.where(changed[:, None], new.reshape(npages, -1), old.reshape(npages, -1))
    assert contents(disk / "step") == {"ram": expected.tobytes()}


def test_a_compressed_increment_says_what_to_do(saved: Path) -> None:
    (saved / "step.gz").write_bytes(gzip.compress((saved / "step").read_bytes(), 1))
    with pytest.raises(NotSupported, match="put it into a file, decompressed"):
        open_snapshot(saved / "step.gz")


def test_a_base_is_for_an_increment(saved: Path, same_descriptors: None) -> None:
    with pytest.raises(UsageError, match="is not an increment, and has no base"):
        open_snapshot(saved / "base", base=saved / "base")


def test_an_increment_given_by_a_descriptor_needs_its_base_named(saved: Path) -> None:
    expected = contents(saved / "step")
    with (saved / "step").open("rb") as file:
        with pytest.raises(UsageError, match="whose path is not known: give base"):
            open_snapshot(Descriptors(file.fileno()))
        found = contents(Descriptors(file.fileno()), base=saved / "base")  # type: ignore[arg-type]
    assert found == expected
