"""What two snapshots differ in, for every pair of kinds."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import (
    BlockDiff,
    Cancelled,
    DeviceDiff,
    DiffReport,
    NotSupported,
    RamBlock,
    SnapshotError,
    UsageError,
    diff,
    open_snapshot,
)
from pyqmigrate.cli import main as command
from pyqmigrate.format.device.sections import DeviceSection, encode_devices
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.seekable_file import SeekableFile
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.sequential import SequentialWriter
from pyqmigrate.snapshot.save.writer import SaveOptions
from tests.harness.device_example import BODY, RTC
from tests.harness.examples import few
from tests.harness.increment_files import MACHINE, save_base, save_increment
from tests.harness.json_page import assert_as_documented
from tests.harness.snapshots import Bytes, ram

PAGE = 4096
NPAGES = 700


def changed(memory: Bytes, pages: Mapping[int, int | None]) -> Bytes:
    """A copy with other pages: a byte of each is turned by so much, None makes it zero."""
    copy = memory.copy()
    for page, turn in pages.items():
        if turn is None:
            copy[page * PAGE : (page + 1) * PAGE] = 0
        else:
            copy[page * PAGE + 4095] ^= turn
    return copy


def mapped(path: Path, memories: Mapping[str, Bytes], **options: Any) -> Path:
    save_base(path, memories)
    return path


def sealed(path: Path, memories: Mapping[str, Bytes], **options: Any) -> Path:
    pyqmigrate.seal(mapped(path, memories))
    return path


def sequential(path: Path, memories: Mapping[str, Bytes], **options: Any) -> Path:
    blocks = [RamBlock(name, memory) for name, memory in memories.items()]
    SequentialWriter(str(path), blocks, SaveOptions(machine=MACHINE)).run(b"", None)
    return path


def increment(path: Path, memories: Mapping[str, Bytes], *, base: Path, **options: Any) -> Path:
    """An increment of exactly the pages that are not those of the base."""
    old = {}
    with open_snapshot(base) as snapshot:
        for name, block in snapshot.blocks.items():
            old[name] = np.frombuffer(block.read(0, block.length), dtype=np.uint8)
    bits = {
        name: (memory.reshape(-1, PAGE) != old[name].reshape(-1, PAGE)).any(axis=1)
        for name, memory in memories.items()
    }
    save_increment(path, base, memories, bits, direct_io=DirectIO.OFF, channels=1)
    return path


KINDS: dict[str, Callable[..., Path]] = {
    "mapped": mapped,
    "sealed": sealed,
    "sequential": sequential,
    "increment": increment,
}


def pages_of(report: pyqmigrate.DiffReport, block: str = "ram") -> list[int]:
    found = next(each for each in report.blocks if each.name == block)
    return [page for r in found.ranges or () for page in range(r.first, r.end)]


@pytest.fixture
def memory() -> Bytes:
    return ram(NPAGES, seed=3)


@pytest.mark.parametrize("kind_b", KINDS)
@pytest.mark.parametrize("kind_a", KINDS)
def test_every_pair_of_kinds_has_the_same_differences(
    tmp_path: Path, memory: Bytes, kind_a: str, kind_b: str
) -> None:
    data = [page for page in range(NPAGES) if memory[page * PAGE : (page + 1) * PAGE].any()]
    zero = [page for page in range(NPAGES) if page not in data]
    base = sealed(tmp_path / "base", {"ram": memory})
    in_a = {data[0]: 1, data[5]: None, zero[3]: 9, NPAGES - 1: 1}
    in_b = {data[0]: 1, data[9]: 7, zero[4]: 2}
    a = KINDS[kind_a](tmp_path / "a", {"ram": changed(memory, in_a)}, base=base)
    b = KINDS[kind_b](tmp_path / "b", {"ram": changed(memory, in_b)}, base=base)
    report = diff(a, b, pages=True)
    assert pages_of(report) == sorted([data[5], zero[3], NPAGES - 1, data[9], zero[4]])
    assert report.differing_pages == 5
    assert report.blocks[0].zero_in == (2, 1)
    assert not report.equal


@pytest.mark.parametrize("kind_b", KINDS)
@pytest.mark.parametrize("kind_a", KINDS)
def test_every_pair_of_kinds_of_one_guest_is_equal(
    tmp_path: Path, memory: Bytes, kind_a: str, kind_b: str
) -> None:
    base = sealed(tmp_path / "base", {"ram": memory})
    guest = {"ram": changed(memory, {3: 1, 4: None})}
    a = KINDS[kind_a](tmp_path / "a", guest, base=base)
    b = KINDS[kind_b](tmp_path / "b", guest, base=base)
    report = diff(a, b)
    assert report.equal
    assert report.blocks[0].ranges is None


def test_with_seals_only_the_mib_that_differs_is_read(tmp_path: Path) -> None:
    memory = ram(5 * 256, density=1.0)
    a = sealed(tmp_path / "a", {"ram": memory})
    b = sealed(tmp_path / "b", {"ram": changed(memory, {3 * 256 + 7: 1})})
    report = diff(a, b, pages=True)
    assert pages_of(report) == [3 * 256 + 7]
    assert report.seals
    assert report.blocks[0].compared_pages == 256
    assert report.bytes_read == 1 << 20


def test_an_increment_and_its_base_are_compared_by_the_changed_pages(tmp_path: Path) -> None:
    memory = ram(600, density=1.0)
    base = mapped(tmp_path / "base", {"ram": memory})
    newer = increment(tmp_path / "i", {"ram": changed(memory, {5: 1, 500: None})}, base=base)
    report = diff(base, newer, pages=True)
    assert pages_of(report) == [5, 500]
    assert report.blocks[0].compared_pages == 2
    assert report.bytes_read == 2 * PAGE
    assert not report.seals


def test_two_increments_of_one_base_are_compared_by_the_pages_of_both(tmp_path: Path) -> None:
    memory = ram(600, density=1.0)
    base = mapped(tmp_path / "base", {"ram": memory})
    first = increment(tmp_path / "i", {"ram": changed(memory, {5: 1, 6: 1})}, base=base)
    second = increment(tmp_path / "j", {"ram": changed(memory, {5: 1, 7: 2})}, base=base)
    report = diff(first, second, pages=True)
    assert pages_of(report) == [6, 7]
    assert report.blocks[0].compared_pages == 3


def test_a_stale_seal_is_not_believed(tmp_path: Path) -> None:
    memory = ram(300, density=1.0)
    a = sealed(tmp_path / "a", {"ram": memory})
    b = sealed(tmp_path / "b", {"ram": memory})
    with open_snapshot(b) as snapshot, b.open("r+b") as file:
        file.seek(snapshot.layouts[0].pages_offset + 9 * PAGE)
        file.write(b"other")
    os.utime(b, ns=(5, 5))
    report = diff(a, b, pages=True)
    assert pages_of(report) == [9]
    assert not report.seals


def test_seals_are_believed_unless_told_otherwise(tmp_path: Path) -> None:
    memory = ram(300, density=1.0)
    a = sealed(tmp_path / "a", {"ram": memory})
    b = sealed(tmp_path / "b", {"ram": memory})
    times = b.stat().st_mtime_ns
    with open_snapshot(b) as snapshot, b.open("r+b") as file:
        file.seek(snapshot.layouts[0].pages_offset + 9 * PAGE)
        file.write(b"other")
    os.utime(b, ns=(times, times))
    assert diff(a, b).equal
    assert pages_of(diff(a, b, pages=True, seals=False)) == [9]


def test_seals_of_different_algorithms_are_not_compared(tmp_path: Path, memory: Bytes) -> None:
    a = sealed(tmp_path / "a", {"ram": memory})
    b = mapped(tmp_path / "b", {"ram": changed(memory, {0: 3})})
    pyqmigrate.seal(b, algorithm="sha256")
    report = diff(a, b, pages=True)
    assert pages_of(report) == [0]
    assert not report.seals


def test_old_bytes_under_a_clear_bit_are_not_a_difference(tmp_path: Path, memory: Bytes) -> None:
    a, b = mapped(tmp_path / "a", {"ram": memory}), mapped(tmp_path / "b", {"ram": memory})
    clear = next(p for p in range(NPAGES) if not memory[p * PAGE : (p + 1) * PAGE].any())
    with open_snapshot(b) as snapshot, b.open("r+b") as file:
        file.seek(snapshot.layouts[0].pages_offset + clear * PAGE)
        file.write(b"old")
    assert diff(a, b, seals=False).equal


def test_blocks_of_one_only_and_of_other_lengths_are_differences(tmp_path: Path) -> None:
    memory = ram(300)
    a = mapped(tmp_path / "a", {"ram": memory, "mine": ram(3), "size": ram(20, seed=9)})
    b = mapped(tmp_path / "b", {"size": ram(10, seed=9), "ram": memory, "theirs": ram(3)})
    report = diff(a, b)
    assert (report.only_in_a, report.only_in_b) == (("mine",), ("theirs",))
    size = next(block for block in report.blocks if block.name == "size")
    assert size.lengths == (20 * PAGE, 10 * PAGE)
    assert size.pages == 10
    assert not size.equal
    assert not report.equal


def test_ranges_have_the_guest_addresses_of_a_pc(tmp_path: Path) -> None:
    memory = ram(600)
    a = mapped(tmp_path / "a", {"pc.ram": memory})
    b = mapped(tmp_path / "b", {"pc.ram": changed(memory, {2: 1, 3: 1, 500: 1})})
    ranges = diff(a, b, pages=True).blocks[0].ranges
    assert ranges == (
        pyqmigrate.PageRange(2, 4, 2 * PAGE),
        pyqmigrate.PageRange(500, 501, 500 * PAGE),
    )


def test_unknown_guest_addresses_are_noted(tmp_path: Path) -> None:
    memory = ram(40)
    for name, pages in (("a", {}), ("b", {2: 1})):
        blocks = [RamBlock("ram", changed(memory, pages))]
        pyqmigrate.save(tmp_path / name, blocks, machine="strange")
    report = diff(tmp_path / "a", tmp_path / "b", pages=True)
    assert report.blocks[0].ranges == (pyqmigrate.PageRange(2, 3, None),)
    assert any("guest addresses" in note for note in report.notes)


def with_devices(path: Path, body: bytes, *, described: bool = True, names: str = "rtc") -> Path:
    sections = [
        DeviceSection(name, body, 0, 3, RTC if described else None) for name in names.split()
    ]
    data, description = encode_devices(sections, PAGE)
    blocks = [RamBlock("ram", ram(20))]
    Writer(str(path), blocks, SaveOptions(direct_io=DirectIO.OFF, machine=MACHINE)).run(
        data, description
    )
    return path


def test_fields_that_differ_are_named(tmp_path: Path) -> None:
    a = with_devices(tmp_path / "a", BODY)
    with open_snapshot(a) as snapshot:
        device = pyqmigrate.devices(snapshot).devices[0]
    field = next(f for f in device.state.fields if isinstance(f.value, int) and f.length > 1)
    other = bytearray(BODY)
    other[field.offset + field.length - 1] ^= 1
    b = with_devices(tmp_path / "b", bytes(other))
    report = diff(a, b, fields=True)
    assert not report.equal
    (found,) = report.devices
    assert (found.name, found.only_in) == ("rtc", None)
    assert found.fields is not None
    assert [each.path for each in found.fields] == [field.label]
    assert found.fields[0].a == field.value
    assert found.fields[0].b == field.value ^ 1


def test_without_fields_the_devices_are_named(tmp_path: Path) -> None:
    a = with_devices(tmp_path / "a", BODY, names="rtc cpu")
    b = with_devices(tmp_path / "b", BODY[:-1] + bytes([BODY[-1] ^ 1]), names="rtc cpu")
    report = diff(a, b)
    assert [(device.name, device.fields) for device in report.devices] == [
        ("rtc", None),
        ("cpu", None),
    ]


def test_a_device_of_one_snapshot_only_is_a_difference(tmp_path: Path) -> None:
    a = with_devices(tmp_path / "a", BODY, names="rtc extra")
    b = with_devices(tmp_path / "b", BODY, names="rtc other")
    report = diff(a, b, fields=True)
    assert [(device.name, device.only_in) for device in report.devices] == [
        ("extra", "a"),
        ("other", "b"),
    ]


def test_device_state_that_cannot_be_separated_is_compared_as_a_whole(tmp_path: Path) -> None:
    def save(path: Path, body: bytes) -> Path:
        data, _ = encode_devices([DeviceSection("rtc", body, 0, 3, RTC)], PAGE)
        options = SaveOptions(direct_io=DirectIO.OFF, machine=MACHINE)
        Writer(str(path), [RamBlock("ram", ram(20))], options).run(data, None)
        return path

    a, b = save(tmp_path / "a", BODY), save(tmp_path / "b", BODY[:-1] + b"\xee")
    assert diff(a, save(tmp_path / "c", BODY)).equal
    report = diff(a, b)
    assert report.tail_differs or report.devices
    assert not report.equal


def test_a_seal_of_a_file_with_old_bytes_is_not_believed(tmp_path: Path) -> None:
    memory = ram(300, density=1.0)
    a, b = sealed(tmp_path / "a", {"ram": memory}), mapped(tmp_path / "b", {"ram": memory})
    with open_snapshot(b) as snapshot, b.open("r+b") as file:
        file.seek(snapshot.layouts[0].bitmap_offset + 2)
        file.write(b"\xfe")  # page 16 is zero now, and its bytes are still in the file
    # Such a seal is in a compact file.
    pyqmigrate.compact(b, tmp_path / "compact")
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as compacted:
        (tmp_path / "b.seal").write_bytes(compacted.companions[".seal"])
    report = diff(a, b, pages=True)
    assert not report.seals
    assert pages_of(report) == [16]


def test_sealed_blocks_of_other_lengths_are_compared_as_far_as_both_go(tmp_path: Path) -> None:
    memory = ram(600)
    a = sealed(tmp_path / "a", {"ram": memory})
    b = sealed(tmp_path / "b", {"ram": changed(memory, {7: 1})[: 500 * PAGE]})
    report = diff(a, b, pages=True)
    assert pages_of(report) == [7]
    assert report.blocks[0].compared_pages == 500


@pytest.mark.parametrize("larger", ["a", "b"])
def test_pages_of_two_sizes_are_compared_as_the_larger(tmp_path: Path, larger: str) -> None:
    memory = ram(64, density=1.0)
    other = changed(memory, {9: 1})
    for name, content in (("a", memory), ("b", other)):
        save_base(tmp_path / name, {"ram": content}, page_size=16384 if name == larger else 4096)
    report = diff(tmp_path / "a", tmp_path / "b", pages=True)
    assert report.blocks[0].page_size == 16384
    assert pages_of(report) == [2]


def test_a_snapshot_without_its_end_is_refused(tmp_path: Path) -> None:
    a = with_devices(tmp_path / "a", BODY)
    (tmp_path / "b").write_bytes(a.read_bytes()[:-200])
    with pytest.raises(SnapshotError) as raised:
        diff(a, tmp_path / "b")
    assert any(str(tmp_path / "b") in note for note in raised.value.__notes__)


def test_anything_that_differs_makes_the_guests_unequal() -> None:
    block = BlockDiff("ram", (4096, 4096), 4096, 1, 1)
    equal = DiffReport("a", "b", ("pc", "pc"), (), (), (block,), (), False, False, 0, 0.0)
    assert equal.equal
    for change in (
        {"machines": ("pc", "q35")},
        {"only_in_a": ("x",)},
        {"only_in_b": ("x",)},
        {"blocks": (replace(block, differing_pages=1),)},
        {"blocks": (replace(block, lengths=(4096, 8192)),)},
        {"devices": (DeviceDiff("cpu", 0, (1, 1)),)},
        {"tail_differs": True},
    ):
        assert not replace(equal, **change).equal


def test_another_machine_type_is_a_difference(tmp_path: Path) -> None:
    for machine in ("pc-q35-10.0", "pc-q35-9.2"):
        pyqmigrate.save(tmp_path / machine, [RamBlock("ram", ram(9))], machine=machine)
    report = diff(tmp_path / "pc-q35-10.0", tmp_path / "pc-q35-9.2")
    assert report.machines == ("pc-q35-10.0", "pc-q35-9.2")
    assert not report.equal


def test_open_snapshots_stay_open(tmp_path: Path, memory: Bytes) -> None:
    path = mapped(tmp_path / "a", {"ram": memory})
    with open_snapshot(path) as a, open_snapshot(path) as b:
        assert diff(a, b).equal
        assert a.blocks["ram"].read(0, 8) == memory[:8].tobytes()


def test_the_base_can_be_elsewhere(tmp_path: Path, memory: Bytes) -> None:
    base = mapped(tmp_path / "base", {"ram": memory})
    newer = increment(tmp_path / "i", {"ram": changed(memory, {5: 1})}, base=base)
    moved = base.rename(tmp_path / "moved")
    assert pages_of(diff(moved, newer, base=moved, pages=True)) == [5]


def test_a_damaged_file_is_named(tmp_path: Path, memory: Bytes) -> None:
    a = mapped(tmp_path / "a", {"ram": memory})
    (tmp_path / "b").write_bytes(a.read_bytes()[:400])
    with pytest.raises(SnapshotError) as raised:
        diff(a, tmp_path / "b")
    assert any(str(tmp_path / "b") in note for note in raised.value.__notes__)


def test_a_compressed_stream_is_refused_with_advice(tmp_path: Path, memory: Bytes) -> None:
    a = mapped(tmp_path / "a", {"ram": memory})
    stream = sequential(tmp_path / "s", {"ram": memory})
    (tmp_path / "s.gz").write_bytes(gzip.compress(stream.read_bytes(), 1))
    with pytest.raises(NotSupported, match="convert it"):
        diff(a, tmp_path / "s.gz")


def test_a_callback_that_raises_ends_the_work(tmp_path: Path) -> None:
    a = mapped(tmp_path / "a", {"ram": ram(256)})

    def stop(_: object) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        diff(a, a, progress=stop)


@pytest.mark.parametrize("wrong", [{"pages": 1}, {"channels": 0}, {"base": 7}, {"page_size": "4k"}])
def test_bad_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        diff(tmp_path / "a", tmp_path / "b", **wrong)


@few
@given(st.data())
def test_what_is_found_is_what_was_changed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("diff")
    memory = ram(530, density=data.draw(st.sampled_from([0.0, 0.5, 1.0])), seed=1)
    turned = data.draw(
        st.dictionaries(st.integers(0, 529), st.one_of(st.none(), st.integers(1, 255)), max_size=9)
    )
    other = changed(memory, turned)
    base = sealed(directory / "base", {"ram": memory})
    make = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    path = make(directory / "b", {"ram": other}, base=base)
    twin = (memory.reshape(-1, PAGE) != other.reshape(-1, PAGE)).any(axis=1)
    assert pages_of(diff(base, path, pages=True)) == twin.nonzero()[0].tolist()


def test_json_has_the_documented_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = with_devices(tmp_path / "a", BODY, names="rtc extra")
    b = with_devices(tmp_path / "b", BODY[:-1] + bytes([BODY[-1] ^ 1]))
    with open_snapshot(b) as snapshot, b.open("r+b") as file:
        file.seek(snapshot.layouts[0].pages_offset + 4096 * ram(20)[::4096].argmax())
        file.write(b"other")
    assert command(["diff", str(a), str(b), "--pages", "--fields", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert_as_documented("diff", data)
    assert data["differing_pages"] == len(data["blocks"][0]["ranges"]) == 1
    assert {device["name"]: device["only_in"] for device in data["devices"]} == {
        "rtc": None,
        "extra": "a",
    }
    rtc = next(device for device in data["devices"] if device["name"] == "rtc")
    assert [set(field) for field in rtc["fields"]] == [{"path", "value_a", "value_b", "only_in"}]


def test_the_command_says_1_for_a_difference_and_0_for_none(
    tmp_path: Path, memory: Bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    a = mapped(tmp_path / "a", {"ram": memory})
    b = mapped(tmp_path / "b", {"ram": changed(memory, {5: 1})})
    assert command(["diff", str(a), str(a)]) == 0
    assert "are equal" in capsys.readouterr().out
    assert command(["diff", str(a), str(b), "--pages", "--fields"]) == 1
    out = capsys.readouterr().out
    assert "1 page in 1 block" in out
    assert command(["diff", str(a), str(tmp_path / "missing")]) == 3
    assert "missing" in capsys.readouterr().err
