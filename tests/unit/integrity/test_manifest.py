"""The file of a seal: written whole, and read with checks."""

from __future__ import annotations

import os
import random
import socket
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import HEAD_MAX, PIECE, SealHead
from pyqmigrate.integrity.manifest import Manifest, read_manifest, seal_path, write_manifest


def manifest(pieces: int = 100, algorithm: Algorithm = Algorithm.XXH3_128) -> Manifest:
    digests = random.Random(pieces).randbytes(16 * pieces)
    return Manifest(SealHead(algorithm, pieces * PIECE, 5, True), digests)


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("pieces", [0, 1, 100, 70_000])
def test_what_is_written_is_read(tmp_path: Path, algorithm: Algorithm, pieces: int) -> None:
    made = manifest(pieces, algorithm)
    write_manifest(tmp_path / "a.seal", made)
    assert read_manifest(tmp_path / "a.seal") == made
    assert [*tmp_path.iterdir()] == [tmp_path / "a.seal"]
    assert (tmp_path / "a.seal").stat().st_mode & 0o777 == 0o600


def test_one_that_is_there_is_replaced(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.seal", manifest(5))
    write_manifest(tmp_path / "a.seal", manifest(6))
    assert read_manifest(tmp_path / "a.seal") == manifest(6)


def test_manifest_of_a_missing_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("a", "none/a", "file/a", "a" * 300):
        assert read_manifest(tmp_path / path) is None


def test_only_so_many_digests_are_kept_and_all_are_checked(tmp_path: Path) -> None:
    made = manifest(70_000)
    write_manifest(tmp_path / "a.seal", made)
    kept = read_manifest(tmp_path / "a.seal", 160)
    assert kept == replace(made, digests=made.digests[:160])
    with (tmp_path / "a.seal").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(SnapshotError):
        read_manifest(tmp_path / "a.seal", 160)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_damage_to_a_seal_is_found(tmp_path: Path, algorithm: Algorithm) -> None:
    path = tmp_path / "a.seal"
    write_manifest(path, manifest(20, algorithm))
    whole, rng = path.read_bytes(), random.Random(7)
    for _ in range(300):
        data, at = bytearray(whole), rng.randrange(len(whole))
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 3:
                del data[at : at + rng.randrange(1, 40)]
        if data == whole:
            continue
        path.write_bytes(data)
        with pytest.raises(SnapshotError) as caught:
            read_manifest(path)
        assert caught.value.field == "seal"


def test_a_seal_that_claims_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.seal"
    head = SealHead(Algorithm.XXH3_128, 1 << 46, 0, True)
    path.write_bytes(head.encode(b""))
    with pytest.raises(SnapshotError, match="its head requires"):
        read_manifest(path)


def claims_much(path: Path, size: int, algorithm: Algorithm = Algorithm.SHA256) -> SealHead:
    """A seal of a file of that size, whose digests are a hole, with the digest of so many zeros."""
    head = SealHead(algorithm, size, 0, True)
    line = head.encode(bytes(head.digests_size))
    path.write_bytes(line)
    os.truncate(path, len(line) + head.digests_size)
    return head


def test_a_seal_whose_digests_are_a_hole_is_refused_without_reading_them(disk: Path) -> None:
    claims_much(disk / "a.seal", 1 << 40)
    with pytest.raises(SnapshotError, match="hole"):
        read_manifest(disk / "a.seal")


def test_a_seal_takes_no_more_memory_than_its_file_can_need(tmp_path: Path) -> None:
    path, head = tmp_path / "a.seal", SealHead(Algorithm.XXH3_128, 1 << 42, 0, True)
    digests = b"\1" * head.digests_size
    path.write_bytes(head.encode(digests) + digests)
    tracemalloc.start()
    try:
        kept = read_manifest(path, 32)
        assert kept is not None
        assert (kept.head, kept.digests) == (head, digests[:32])
        assert read_manifest(path, wanted=lambda head: head.size == 5) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        assert len(digests) == 64 << 20
    finally:
        tracemalloc.stop()


def test_digests_are_not_held_twice(tmp_path: Path) -> None:
    path, head = tmp_path / "a.seal", SealHead(Algorithm.XXH3_128, 1 << 41, 0, True)
    digests = b"\1" * head.digests_size
    path.write_bytes(head.encode(digests) + digests)
    tracemalloc.start()
    try:
        read_manifest(path)
        assert tracemalloc.get_traced_memory()[1] < len(digests) + (8 << 20)
    finally:
        tracemalloc.stop()


def test_a_huge_file_that_is_not_a_seal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.seal").touch()
    os.truncate(tmp_path / "a.seal", 1 << 40)
    with pytest.raises(SnapshotError, match="does not end"):
        read_manifest(tmp_path / "a.seal")
    (tmp_path / "b.seal").write_bytes(b"{" + b" " * HEAD_MAX + b"}\n")
    with pytest.raises(SnapshotError, match="does not end"):
        read_manifest(tmp_path / "b.seal")


def test_what_is_not_a_regular_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(SnapshotError, match="regular"):
            read_manifest(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(TargetError):
            read_manifest(tmp_path / "socket")


def test_seal_is_beside_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/guest.mapped")
    assert seal_path(tmp_path / "link") == tmp_path / "far/guest.mapped.seal"
    assert seal_path(str(tmp_path / "plain")) == tmp_path / "plain.seal"
