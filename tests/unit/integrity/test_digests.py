"""Digests of a file's pieces: by reading, and what is known without."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import Cancelled, SnapshotError, TargetError
from pyqmigrate.format.digest import Algorithm, digester
from pyqmigrate.format.seal import PIECE
from pyqmigrate.integrity.digests import Digests, open_direct
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.page_cache import drop_cached
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some

few_channels = st.integers(1, 4)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with directory_on_disk() as found:
        yield found


def plain(data: bytes, algorithm: Algorithm = Algorithm.XXH3_128) -> bytes:
    """What the digests of these bytes are."""
    digest = digester(algorithm)
    return b"".join(digest(data[at : at + PIECE]) for at in range(0, len(data), PIECE))


def make(path: Path, size: int, pieces: dict[int, bytes]) -> bytes:
    """A file of holes, but for ``pieces`` at their positions; its content."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        for at, data in pieces.items():
            file.seek(at)
            file.write(data)
        file.truncate(size)
    return path.read_bytes()


def read_all(path: Path, digests: Digests, direct_io: str = "off", channels: int = 3) -> bytes:
    """Read what is not known; all digests."""
    source = InputFile(path)
    direct, _ = open_direct(source, DirectIO(direct_io))
    try:
        digests.read_rest(source.fd, source.name, Channels(channels, "test"), direct)
    finally:
        source.close_direct(direct)
        source.close()
    return digests.seal(0, 0, (), clear_pages_zero=True).digests


def fresh(size: int, algorithm: Algorithm = Algorithm.XXH3_128) -> Digests:
    digests = Digests(algorithm)
    digests.resize(size)
    return digests


@some
@given(st.data())
def test_digests_are_those_of_the_files_bytes(directory: Path, data: st.DataObject) -> None:
    size = data.draw(st.one_of(st.integers(0, 7 * PIECE), st.sampled_from([PIECE, 6 * PIECE])))
    starts = st.integers(0, max(size - 1, 0))
    pieces = data.draw(st.dictionaries(starts, st.integers(1, 2 * PIECE), max_size=4))
    rng = random.Random(size)
    content = make(
        directory / "file", size, {at: rng.randbytes(length) for at, length in pieces.items()}
    )[:size]
    algorithm = data.draw(st.sampled_from(Algorithm))
    direct_io, channels = data.draw(st.sampled_from(["on", "off", "auto"])), data.draw(few_channels)
    found = read_all(directory / "file", fresh(size, algorithm), direct_io, channels)
    assert found == plain(content, algorithm)


@pytest.mark.parametrize("position", [0, 100, PIECE - 2, 2 * PIECE])
def test_what_is_laid_over_is_digested(directory: Path, position: int) -> None:
    content = make(directory / "file", 3 * PIECE, {0: random.Random(0).randbytes(3 * PIECE)})
    digests = Digests(Algorithm.XXH3_128, overlay=[(position, b"QEVM")])
    digests.resize(3 * PIECE)
    patched = content[:position] + b"QEVM" + content[position + 4 :]
    assert read_all(directory / "file", digests) == plain(patched)
    assert (directory / "file").read_bytes() == content


def test_holes_are_not_read(directory: Path) -> None:
    make(directory / "file", 6 * PIECE, {5 * PIECE: b"x" * 10})
    os.truncate(directory / "file", 1 << 40)
    digests = fresh(1 << 40)
    read_all(directory / "file", digests)
    assert digests.bytes_read == PIECE


def test_only_what_is_not_known_is_read(directory: Path) -> None:
    make(directory / "file", 8 * PIECE, {0: random.Random(0).randbytes(8 * PIECE)})
    digests = fresh(8 * PIECE)
    read_all(directory / "file", digests)
    assert digests.bytes_read == 8 * PIECE
    content = bytearray((directory / "file").read_bytes())
    content[3 * PIECE - 1 : 3 * PIECE + 1] = b"??"
    content[7 * PIECE] ^= 1
    (directory / "file").write_bytes(content)
    digests.forget(3 * PIECE - 1, 2)
    digests.forget(7 * PIECE, 1)
    assert read_all(directory / "file", digests) == plain(bytes(content))
    assert digests.bytes_read == 11 * PIECE


RESIZES: dict[str, Callable[[int], int]] = {
    "shorter": lambda size: size - PIECE - 5,
    "longer": lambda size: size + PIECE + 5,
    "a byte": lambda size: size + 1,
    "less a byte": lambda size: size - 1,
}


@pytest.mark.parametrize("change", RESIZES.values(), ids=RESIZES.keys())
@pytest.mark.parametrize("size", [4 * PIECE, 4 * PIECE + 100])
def test_a_file_that_gets_another_size_is_digested_anew_at_its_end(
    directory: Path, size: int, change: Callable[[int], int]
) -> None:
    content = make(directory / "file", size, {0: random.Random(0).randbytes(size)})
    digests = fresh(size)
    read_all(directory / "file", digests)
    size = change(size)
    os.truncate(directory / "file", size)
    digests.resize(size)
    content = (directory / "file").read_bytes()
    assert read_all(directory / "file", digests) == plain(content)


def test_a_seal_is_refused_while_something_is_not_known() -> None:
    with pytest.raises(ValueError, match="not known"):
        fresh(PIECE).seal(0, 0, (), clear_pages_zero=True)


def test_a_file_that_became_shorter_is_a_snapshot_error(directory: Path) -> None:
    make(directory / "file", 2 * PIECE, {0: b"x" * PIECE * 2})
    digests = fresh(9 * PIECE)
    os.truncate(directory / "file", PIECE + 10)
    with pytest.raises(SnapshotError, match="shorter") as caught:
        # Holes past the end are found as such; what was data is not there any more.
        make_known(digests)
        read_all(directory / "file", digests)
    assert caught.value.offset == PIECE + 10


def make_known(digests: Digests) -> None:
    digests._known[2:] = b"\1" * (len(digests._known) - 2)


def test_what_cannot_be_read_is_a_target_error(directory: Path) -> None:
    make(directory / "file", PIECE, {0: b"x"})
    fd = os.open(directory / "file", os.O_WRONLY)
    try:
        with pytest.raises(TargetError) as caught:
            fresh(PIECE).read_rest(fd, "file", Channels(2, "test"))
    finally:
        os.close(fd)
    assert caught.value.position == 0


def test_reading_can_be_cancelled(directory: Path) -> None:
    make(directory / "file", 8 * PIECE, {0: b"x" * 8 * PIECE})
    channels = Channels(2, "test")
    channels.cancel()
    fd = os.open(directory / "file", os.O_RDONLY)
    try:
        with pytest.raises(Cancelled):
            fresh(8 * PIECE).read_rest(fd, "file", channels)
    finally:
        os.close(fd)


def test_a_cold_file_is_read_past_the_page_cache_and_a_cached_one_from_it(directory: Path) -> None:
    make(directory / "file", 8 * PIECE, {0: b"x" * 8 * PIECE})
    source = InputFile(directory / "file")
    try:
        drop_cached(source.fd)
        cold, _ = open_direct(source, DirectIO.AUTO)
        assert cold is not None
        source.close_direct(cold)
        (directory / "file").read_bytes()
        cached, reason = open_direct(source, DirectIO.AUTO)
        assert cached is None
        assert "page cache" in reason
    finally:
        source.close()


@some
@given(st.lists(st.integers(0, 70_000), max_size=8, unique=True))
def test_every_digest_that_differs_is_found(numbers: list[int]) -> None:
    digests = fresh(70_001 * PIECE)
    digests._set_zero(0, 70_001)
    table = bytearray(digests.seal(0, 0, (), clear_pages_zero=True).digests)
    for number in numbers:
        table[number * 16 + number % 16] ^= 1
    assert [*digests.differing(bytes(table))] == sorted(numbers)
