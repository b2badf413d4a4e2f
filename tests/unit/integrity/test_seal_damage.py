"""Whatever happens to a sealed file is found, and said where it is."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate import RamBlock
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.sealed import MIB, PAGE, Sealed, damage, flip, replaced
from tests.harness.stream_builders import sequential_stream


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    return Sealed.make(tmp_path / "guest.mapped")


def test_a_whole_file_has_no_damage(sealed: Sealed) -> None:
    check = sealed.check()
    assert (check.intact, check.damages, check.notes) == (True, (), ())
    check.raise_if_damaged()


def test_a_flipped_bit_in_a_page_is_reported_with_mib_block_and_pages(sealed: Sealed) -> None:
    _, pages = sealed.block("big")
    at = pages + 2 * MIB + 12345
    sealed.write(at, bytes([sealed.read(at, 1)[0] ^ 4]))
    (found,) = sealed.check().damages
    assert (found.offset, found.length, found.block) == (pages + 2 * MIB, MIB, "big")
    (part,) = found.parts
    assert (part.what, part.first_page, part.end_page) == ("pages", 512, 768)
    assert part.data_pages == sealed.big.reshape(-1, PAGE)[512:768].any(axis=1).sum()
    assert f"MiB {found.offset // MIB}, file offset {found.offset:#x}" in str(found)
    assert "block 'big', pages 512 to 767" in str(found)


def test_every_bit_of_some_bytes_is_watched(sealed: Sealed) -> None:
    size = sealed.path.stat().st_size
    for at in (0, 5, 200, MIB, size // 2, size - 1):
        old = sealed.read(at, 1)
        for bit in range(8):
            sealed.write(at, bytes([old[0] ^ 1 << bit]))
            (found,) = sealed.check().damages
            assert found.offset <= at < found.offset + found.length
        sealed.write(at, old)
    assert sealed.check().intact


def test_a_cleared_and_a_set_bitmap_bit_are_reported_with_the_pages_of_the_bitmap(
    sealed: Sealed,
) -> None:
    at, _ = sealed.block("big")
    for bit in (True, False):
        page = int(np.flatnonzero(sealed.big.reshape(-1, PAGE).any(axis=1) == bit)[5])
        old = sealed.read(at + page // 8, 1)
        assert bool(old[0] >> page % 8 & 1) == bit
        sealed.write(at + page // 8, bytes([old[0] ^ 1 << page % 8]))
        (found,) = sealed.check().damages
        part = next(part for part in found.parts if part.what == "bitmap")
        assert (part.block, part.first_page, part.end_page) == ("big", 0, 1100)
        sealed.write(at + page // 8, old)


def test_a_swapped_pair_of_pages_is_found_at_both_places(sealed: Sealed) -> None:
    _, pages = sealed.block("big")
    data = np.flatnonzero(sealed.big.reshape(-1, PAGE).any(axis=1))
    one, other = (pages + int(page) * PAGE for page in (data[0], data[-1]))
    first, second = sealed.read(one, PAGE), sealed.read(other, PAGE)
    assert first != second
    sealed.write(one, second)
    sealed.write(other, first)
    found = sealed.check().damages
    assert [damage.offset // MIB for damage in found] == [one // MIB, other // MIB]


def test_two_swapped_mib_are_found(sealed: Sealed) -> None:
    _, pages = sealed.block("big")
    one, other = sealed.read(pages, MIB), sealed.read(pages + MIB, MIB)
    sealed.write(pages, other + one)
    (found,) = sealed.check().damages
    assert (found.offset, found.length) == (pages, 2 * MIB)


def test_a_cut_of_any_length_is_found_and_reported(sealed: Sealed) -> None:
    size, rng = sealed.path.stat().st_size, random.Random(0)
    cuts = {1, 2, 100, 5000, MIB, size - 1, size, *(rng.randrange(1, size) for _ in range(10))}
    whole = sealed.path.read_bytes()
    for cut in cuts:
        sealed.path.write_bytes(whole[: size - cut])
        found = sealed.check().damages[-1]
        assert (found.offset, found.length) == (size - cut, cut)
        assert f"had {size} bytes and has {size - cut}" in found.why


def test_what_a_cut_took_from_the_guest_is_named(sealed: Sealed) -> None:
    _, pages = sealed.block("big")
    os.truncate(sealed.path, pages + 1000 * PAGE)
    found = sealed.check().damages[-1]
    assert [str(part) for part in found.parts] == [
        f"block 'big', pages 1000 to 1099 "
        f"({int(sealed.big.reshape(-1, PAGE)[1000:].any(axis=1).sum())} with data)",
        "header of block 'small'",
        "bitmap of block 'small', of its pages 0 to 19",
        "block 'small', pages 0 to 19",
        "what follows the blocks: the device state",
    ]


@pytest.mark.parametrize("more", [1, 4096, 3 * MIB])
def test_bytes_that_were_added_are_found(sealed: Sealed, more: int) -> None:
    size = sealed.path.stat().st_size
    os.truncate(sealed.path, size + more)
    (found,) = sealed.check().damages
    assert (found.offset, found.length) == (size, more)
    assert "added" in found.why


def test_a_hole_that_is_filled_with_zeros_is_not_damage(sealed: Sealed) -> None:
    sealed.path.write_bytes(sealed.path.read_bytes())
    check = sealed.check()
    assert check.intact
    assert "another time of modification" in check.notes[0]


def test_damage_in_a_clear_page_is_found(sealed: Sealed) -> None:
    sealed.stale("big", 1)
    assert not sealed.check().intact


def test_damage_is_named_where_the_head_is_gone(sealed: Sealed) -> None:
    _, pages = sealed.block("big")
    sealed.write(0, bytes(MIB))
    sealed.write(pages + MIB, b"?" * 100)
    head, part = sealed.check().damages
    assert (head.offset, head.length) == (0, MIB)
    assert "head of the stream; bitmap of block 'big'" in str(head)
    assert (part.offset, part.block) == (pages + MIB, "big")
    assert part.parts[0].data_pages is None, "the bitmap is damaged too"


def test_what_follows_and_precedes_the_stream_is_watched_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"X" * 5000)
    made = Sealed.make(path)  # replaces it
    memory = made.big
    path.write_bytes(b"X" * 5000)
    pyqmigrate.save(
        f"file:{path},offset=5000", [pyqmigrate.RamBlock("ram", memory)], seal="xxh3-128"
    )
    assert made.check().intact
    made.write(4000, b"?")
    (found,) = made.check().damages
    assert found.parts[0].what == "what is before the stream"


def test_another_snapshot_under_the_name_is_reported_as_such(sealed: Sealed) -> None:
    other = sealed.path.with_name("other")
    Sealed.make(other, density=0.1)
    other.rename(sealed.path)
    check = sealed.check()
    assert not check.intact
    assert "another snapshot has its name" in check.notes[0]


def test_the_first_damage_is_raised_with_its_place(sealed: Sealed) -> None:
    _, pages = sealed.block("big")
    sealed.write(pages, b"????")
    sealed.write(pages + 3 * MIB, b"????")
    with pytest.raises(pyqmigrate.SnapshotError, match="and 1 more") as caught:
        sealed.check().raise_if_damaged()
    assert (caught.value.offset, caught.value.block) == (pages, "big")


@pytest.fixture
def stream(tmp_path: Path) -> Sealed:
    """A sealed sequential stream, no two of whose pages are alike; every fifth is zero."""
    noise = np.random.default_rng(0)
    memories = [noise.integers(1, 256, n * PAGE, np.uint8) for n in (1100, 20)]
    for memory in memories:
        memory.reshape(-1, PAGE)[::5] = 0
    blocks = [RamBlock(n, m) for n, m in zip(("big", "small"), memories, strict=True)]
    start_sequential_save(tmp_path / "stream", blocks, machine="pc-q35-10.0").wait()
    pyqmigrate.seal(tmp_path / "stream")
    return Sealed(tmp_path / "stream", *memories)


def pages_in(made: Sealed, block: str, start: int, end: int) -> set[int]:
    """The pages of a block whose bytes are at those places of a stream, by looking for them."""
    data, found = made.path.read_bytes(), set()
    memory = {"big": made.big, "small": made.small}[block].reshape(-1, PAGE)
    for page in np.flatnonzero(memory.any(axis=1)):
        at = data.index(memory[page].tobytes())
        if at < end and start < at + PAGE:
            found.add(int(page))
    return found


def test_pages_that_are_hit_in_a_sequential_stream_are_named(stream: Sealed) -> None:
    hit = pages_in(stream, "big", MIB, 2 * MIB)
    assert len(hit) > 200
    page = sorted(hit)[40]
    at = stream.read(0, 2 * MIB).index(stream.big.reshape(-1, PAGE)[page].tobytes())
    stream.write(at + 7, b"????")
    check = stream.check()
    [found] = check.damages
    assert (found.offset, found.length, found.block) == (MIB, MIB, "big")
    [part] = found.parts
    assert (part.what, part.first_page, part.end_page) == ("pages", min(hit), max(hit) + 1)
    assert part.data_pages == len(hit)
    assert "records of the stream as they are now" in check.notes[0]
    assert f"block 'big', pages {min(hit)} to {max(hit)}" in str(found)


def test_head_and_device_state_of_a_sequential_stream_are_named(stream: Sealed) -> None:
    at = stream.path.read_bytes().rindex(b'": ') + 2
    stream.write(at, b"\t")  # still the same JSON
    [found] = stream.check().damages
    assert found.parts[-1].what == "what follows RAM: the device state"
    assert any(part.block == "small" for part in found.parts)
    stream.write(at, b" ")
    at = stream.read(0, MIB).index(b"pc-q35-10.0")
    stream.write(at + 9, b"1")
    [found] = stream.check().damages
    assert found.parts[0].what == "head of the stream"


@pytest.mark.parametrize("how", ["cut", "framing"])
def test_sequential_stream_that_does_not_parse_is_reported_as_such(
    stream: Sealed, how: str
) -> None:
    if how == "cut":
        os.truncate(stream.path, 2 * MIB + 5)
    else:
        stream.write(9, b"\xff" * 100)
    check = stream.check()
    assert check.damages
    assert {part.what for damage in check.damages for part in damage.parts} == {"the stream"}
    assert "are not known" in check.notes[0]


def test_pages_that_came_again_are_not_affected_by_what_they_were(tmp_path: Path) -> None:
    old, new = b"\1" * PAGE, b"\2" * PAGE
    words = [page * PAGE | 0x28 for page in range(300)]
    first = (8).to_bytes(8, "big") + b"\6pc.ram" + old
    first += b"".join(word.to_bytes(8, "big") + old for word in words[1:])
    again = b"".join(word.to_bytes(8, "big") + new for word in words)
    path = tmp_path / "stream"
    path.write_bytes(sequential_stream(first + again, length=300 * PAGE))
    pyqmigrate.seal(path)
    with path.open("r+b") as file:
        file.seek(500_000)
        file.write(b"?")
    check = pyqmigrate.verify_seal(path)
    assert check is not None
    [damage] = check.damages
    told = [part for part in damage.parts if part.what == "pages"]
    assert not told, "the first MiB holds only pages that come again"


def mutate(sealed: Sealed, count: int, seed: int) -> None:
    """Damages the file ``count`` times, each on its own; every one has to be found."""
    whole, info = sealed.path.read_bytes(), sealed.path.stat()
    rng = random.Random(seed)
    for n in range(count):
        data = bytearray(whole)
        how = [damage(data, rng) for _ in range(rng.choice((1, 1, 2)))]
        replaced(sealed.path, data, (info.st_atime_ns, info.st_mtime_ns))
        check = pyqmigrate.verify_seal(sealed.path, channels=1 + n % 3)
        assert check is not None
        assert check.intact == (data == whole), (seed, n, how)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_mutation_is_found(tmp_path: Path, algorithm: Algorithm) -> None:
    mutate(Sealed.make(tmp_path / "guest", seal=algorithm), 40, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_every_one_of_ten_thousand_mutations_is_found(tmp_path: Path, seed: int) -> None:
    mutate(Sealed.make(tmp_path / "guest"), 1000, seed)


def test_every_flipped_bit_of_head_and_end_is_found(sealed: Sealed) -> None:
    whole = bytearray(sealed.path.read_bytes())
    end = whole.index(b"small", MIB)
    size = len(whole)
    rng = random.Random(3)
    places = [*range(300), *range(end, end + 40), *range(size - 60, size)]
    for at in places:
        bit = at * 8 + rng.randrange(8)
        flip(whole, bit)
        sealed.write(at, whole[at : at + 1])
        assert not sealed.check().intact, f"bit {bit}"
        flip(whole, bit)
        sealed.write(at, whole[at : at + 1])
    assert sealed.check().intact
