"""The local cache of packs: what is in it is a hint, never trusted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.store.pack_cache import PackCache, default_directory
from pyqmigrate.store.store import Store
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.stores import image, put_snapshot

__all__ = ["object_store"]

CONTENT = image(400, seed=3)
MIB = 1 << 20
ZSTD = b"\x28\xb5\x2f\xfd"


@pytest.fixture
def target(object_store: ObjectStore) -> Iterator[str]:
    target = object_store.url("p")
    with Store.create(target) as store:
        put_snapshot(store, "a", CONTENT, frame_pages=8, pack_pages=100)
    yield target


def read(target: str, cache: Path) -> tuple[bytes, int]:
    with Store.open(target, cache=cache) as store, store.open_file("a") as file:
        data = bytes(file.read(0, file.size))
        return data, store.packs.requests


def test_what_was_read_once_is_not_asked_for_again(target: str, tmp_path: Path) -> None:
    data, requests = read(target, tmp_path / "cache")
    assert data == CONTENT
    assert requests > 0
    assert read(target, tmp_path / "cache") == (CONTENT, 0)


def test_a_cache_that_is_damaged_anywhere_is_read_past(target: str, tmp_path: Path) -> None:
    read(target, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        data = bytearray(path.read_bytes())
        for at in range(8, len(data), 997):
            data[at] ^= 0xFF
        path.write_bytes(data)
    data, requests = read(target, tmp_path / "cache")
    assert data == CONTENT
    assert requests > 0
    assert read(target, tmp_path / "cache") == (CONTENT, 0)  # repaired


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(1000)])
def test_files_cut_short_are_read_past(target: str, tmp_path: Path, content: bytes) -> None:
    read(target, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(content)
    assert read(target, tmp_path / "cache")[0] == CONTENT


def test_prefetching_fills_the_cache_without_decompression(
    target: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    with Store.open(target, cache=tmp_path / "cache") as store, store.open_file("a") as file:
        file.prefetch([(0, file.size)], decompress=False)
        assert store.frames._kept_bytes == 0
        before = store.packs.requests
        assert bytes(file.read(0, file.size)) == CONTENT
        assert store.packs.requests == before


def test_a_local_store_uses_no_cache(tmp_path: Path) -> None:
    Store.create(tmp_path / "store").close()
    with Store.open(tmp_path / "store", cache=tmp_path / "cache") as store:
        assert store.packs.cache is None
    assert not (tmp_path / "cache").exists()


def test_the_packs_used_longest_ago_are_removed(tmp_path: Path) -> None:
    cache = PackCache(tmp_path)
    data = ZSTD + os.urandom(3 * MIB - 4)
    for n in range(4):
        cache.write(bytes([n]) * 16, 0, data)
        os.utime(tmp_path / f"{(bytes([n]) * 16).hex()}.pack", ns=(0, n + 1))
    assert cache.read(bytes(16), 0, 100) is not None  # the first one was used now
    PackCache(tmp_path, 8 * MIB).close()
    left = [n for n in range(4) if cache.read(bytes([n]) * 16, 0, 100) is not None]
    assert left == [0, 3]
    cache.close()


def test_only_files_of_packs_are_removed(tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(bytes(20 * MIB))
    PackCache(tmp_path, 8 * MIB).close()
    assert (tmp_path / "note").exists()


def test_a_link_in_the_cache_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    cache = PackCache(tmp_path / "cache")
    (tmp_path / "cache" / f"{bytes(16).hex()}.pack").symlink_to("../precious")
    cache.write(bytes(16), 0, ZSTD + b"x")
    assert cache.read(bytes(16), 0, 4) is None
    assert (tmp_path / "precious").read_bytes() == b"precious"
    cache.close()


def test_a_directory_that_others_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(TargetError) as error:
        PackCache(tmp_path / "open")
    assert error.value.errno == errno.EACCES


def test_a_limit_below_one_pack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        PackCache(tmp_path, MIB)


def test_the_default_directory_is_that_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/pyqmigrate/packs")
