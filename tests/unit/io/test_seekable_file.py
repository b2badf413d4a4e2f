"""A compact file is read as the plain file in it, and damage of it is never given out."""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import NotSupported, PyqmigrateError, SnapshotError, TargetError
from pyqmigrate.format.compact import FRAME, CompactHead
from pyqmigrate.format.seekable import encode_skippable, encode_table
from pyqmigrate.io import seekable_file
from pyqmigrate.io.seekable_file import SeekableFile, checksum
from tests.harness.examples import few, some

SIZE = 1000  # bytes of a frame


def seekable(
    parts: Sequence[bytes],
    head: CompactHead | None = None,
    *,
    checksums: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    **options: bool,
) -> bytes:
    """A file of these frames."""
    compressor = zstandard.ZstdCompressor(level=1, **options)
    frames = [compressor.compress(part) for part in parts]
    table = [
        (
            len(frame),
            len(part) if lengths is None else lengths[number],
            checksum(part) if checksums is None else checksums[number],
        )
        for number, (frame, part) in enumerate(zip(frames, parts, strict=True))
    ]
    if head is not None:
        frames.append(encode_skippable(FRAME, head.encode()))
        table.append((len(frames[-1]), 0, 0))
    return b"".join(frames) + encode_table(table)


def opened(path: Path, data: bytes) -> contextlib.closing[SeekableFile]:
    path.write_bytes(data)
    return contextlib.closing(SeekableFile(path))


PARTS = st.lists(
    st.one_of(
        st.just(bytes(SIZE)), st.binary(min_size=1, max_size=9).map(lambda b: (b * SIZE)[:SIZE])
    ),
    max_size=12,
)


@some
@given(PARTS, st.binary(max_size=500), st.data())
def test_every_range_is_what_the_plain_file_has_there(
    tmp_path: Path, parts: list[bytes], last: bytes, data: st.DataObject
) -> None:
    parts = [*parts, last]
    plain = b"".join(parts)
    with opened(tmp_path / "file", seekable(parts)) as file:
        assert file.size == len(plain)
        for _ in range(5):
            offset = data.draw(st.integers(0, len(plain) + 10))
            length = data.draw(st.integers(0, len(plain) + 10))
            assert file.read(offset, length) == plain[offset : offset + length]


@some
@given(PARTS, st.binary(max_size=500))
def test_holes_are_the_frames_of_zeros(tmp_path: Path, parts: list[bytes], last: bytes) -> None:
    plain = b"".join([*parts, last])
    with opened(tmp_path / "file", seekable([*parts, last])) as file:
        hole = [not any(part) and len(part) == len((parts or [last])[0]) for part in [*parts, last]]
        # Holes are known only if the first frame has the size of the others.
        expected = bytearray()
        for part, is_hole in zip([*parts, last], hole, strict=True):
            expected += bytes([not is_hole]) * len(part)
        found, offset = bytearray(len(plain)), 0
        while (start := file.next_data(offset)) is not None:
            end = file.next_hole(start)
            assert end > start
            found[start:end] = b"\1" * (end - start)
            offset = end
        assert found == expected


def test_the_bytes_around_a_read_are_whole_pages_of_its_frames(tmp_path: Path) -> None:
    parts = [bytes([n + 1]) * (5 * 4096) for n in range(4)]
    parts.append(b"end")
    whole = b"".join(parts)
    with opened(tmp_path / "c", seekable(parts)) as file:
        assert file.cheap_range(7 * 4096, 4096) == (5 * 4096, 10 * 4096)
        assert file.cheap_range(9 * 4096, 8192) == (5 * 4096, 15 * 4096)
        assert file.cheap_range(20 * 4096, 4096) == (20 * 4096, len(whole))
        assert file.cheap_range(len(whole), 4096) == (len(whole), len(whole))
        assert b"".join(file.views(6 * 4096 + 1, 40000)) == whole[6 * 4096 + 1 :][:40000]


def test_frames_that_are_not_whole_pages_are_left_at_bounds_of_pages(tmp_path: Path) -> None:
    parts = [bytes([n + 1]) * 10000 for n in range(5)]
    with opened(tmp_path / "c", seekable(parts)) as file:
        assert file.cheap_range(3 * 4096, 4096) == (3 * 4096, 4 * 4096)
        assert file.cheap_range(4 * 4096, 8192) == (3 * 4096, 7 * 4096)


def test_a_frame_that_only_claims_to_be_zeros_is_no_hole(tmp_path: Path) -> None:
    zeros, other = bytes(SIZE), b"x" * SIZE
    data = seekable([zeros, other, zeros], checksums=[checksum(zeros)] * 3)
    with opened(tmp_path / "file", data) as file:
        assert file.next_data(0) == SIZE
        assert file.next_hole(SIZE) == 2 * SIZE
        with pytest.raises(TargetError):
            file.read(SIZE, 1)


def test_the_time_and_the_files_beside_it_are_those_of_the_plain_file(tmp_path: Path) -> None:
    files = {".seal": b"a seal", ".workingset": b"a set"}
    head = CompactHead(SIZE, 77, files)
    with opened(tmp_path / "file", seekable([b"x" * SIZE], head)) as file:
        assert file.mtime_ns == 77
        assert file.companions == files


def test_a_file_of_another_program_has_its_own_time_and_nothing_beside_it(tmp_path: Path) -> None:
    with opened(tmp_path / "file", seekable([b"x" * SIZE])) as file:
        assert file.mtime_ns == (tmp_path / "file").stat().st_mtime_ns
        assert file.companions == {}


def test_a_frame_whose_length_is_not_in_it_is_read(tmp_path: Path) -> None:
    data = seekable([b"abc" * 100], write_content_size=False)
    with opened(tmp_path / "file", data) as file:
        assert file.read(0, 300) == b"abc" * 100


def test_frames_that_were_read_are_kept_but_not_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seekable_file, "_CACHED", 3 * SIZE)
    parts = [bytes([n]) * SIZE for n in range(1, 11)]
    with opened(tmp_path / "file", seekable(parts)) as file:
        for _ in range(2):
            assert file.read(0, 10 * SIZE) == b"".join(parts)
        assert [*file._cache] == [7, 8, 9]
        assert file._cached == 3 * SIZE


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"checksums": [1]}, "checksum does not match"),
        ({"lengths": [SIZE - 1]}, "another length"),
        ({"lengths": [SIZE - 1], "write_content_size": False}, "damaged"),
    ],
)
def test_a_frame_that_the_table_does_not_fit_is_an_io_error(
    tmp_path: Path, options: dict[str, object], why: str
) -> None:
    data = seekable([b"y" * SIZE], **options)  # type: ignore[arg-type]
    with opened(tmp_path / "file", data) as file, pytest.raises(TargetError, match=why) as raised:
        file.read(0, 1)
    assert raised.value.errno == errno.EIO
    assert raised.value.position == 0
    assert "frame 0" in str(raised.value)


@some
@given(st.data())
def test_damage_is_an_error_and_never_wrong_bytes(tmp_path: Path, data: st.DataObject) -> None:
    parts = [bytes(SIZE), b"some text " * 100, bytes(range(250)) * 4]
    plain = b"".join(parts)
    whole = bytearray(seekable(parts, CompactHead(len(plain), 5, {".seal": b"x"})))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    try:
        with opened(tmp_path / "file", bytes(whole[:end])) as file:
            offset = 0
            while offset < file.size:  # a table may have other frames, never other bytes
                with contextlib.suppress(TargetError):
                    assert file.read(offset, 10) == plain[offset : offset + 10]
                offset += 10
    except PyqmigrateError:
        pass


def test_a_hole_in_the_table_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        table = encode_table([(1, 1, 1)])
        file.truncate(1 << 30)
        file.seek((1 << 30) - 9)
        entries = ((1 << 30) - 17) // 12
        file.write(entries.to_bytes(4, "little") + table[-5:])
    with pytest.raises(SnapshotError, match="hole"):
        SeekableFile(tmp_path / "file")


def test_the_size_of_the_frames_is_that_of_the_plain_file(tmp_path: Path) -> None:
    head = CompactHead(SIZE + 1, 5, {})
    with pytest.raises(SnapshotError, match="plain file had 1001"):
        opened(tmp_path / "file", seekable([b"x" * SIZE], head))


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(NotSupported, match="pip install zstandard"):
        opened(tmp_path / "file", b"")


def test_a_closed_file_is_not_read(tmp_path: Path) -> None:
    with opened(tmp_path / "file", seekable([b"x" * SIZE])) as file:
        pass
    file.close()
    with pytest.raises(TargetError):
        file.read(0, 1)


@few
@given(st.integers(0, 1000))
def test_several_threads_read_the_same(tmp_path: Path, seed: int) -> None:
    parts = [bytes([n, seed % 256]) * 500 for n in range(40)]
    plain = b"".join(parts)
    wrong: list[int] = []
    with opened(tmp_path / "file", seekable(parts)) as file:

        def read(start: int) -> None:
            for offset in range(start, len(plain), 777):
                if file.read(offset, 2000) != plain[offset : offset + 2000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(n * 31,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as raised:
        SeekableFile(tmp_path / "missing")
    assert raised.value.filename == str(tmp_path / "missing")
