"""store.json round-trips, and anything else is refused without printing the key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.store.config import StoreConfig
from tests.harness.examples import some

CONFIG = StoreConfig(bytes(range(32)))


@some
@given(st.binary(min_size=32, max_size=32), st.integers(1, 64), st.integers(1, 19))
def test_a_configuration_that_is_written_is_read(key: bytes, frame_pages: int, level: int) -> None:
    config = StoreConfig(key, frame_pages, level)
    assert StoreConfig.decode(config.encode()) == config


def test_each_new_store_has_a_key_of_its_own_that_is_not_printed() -> None:
    one, other = StoreConfig.new(), StoreConfig.new()
    assert one.key != other.key
    assert len(one.key) == 32
    assert "key" not in repr(one)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2), ("version", True), ("version", "1"), ("page", 8192), ("digest", "xxh3-128"),
    ],
)  # fmt: skip
def test_another_version_or_page_size_is_not_supported(key: str, value: object) -> None:
    text = json.loads(CONFIG.encode()) | {key: value}
    with pytest.raises(NotSupported, match=key):
        StoreConfig.decode(json.dumps(text).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"), ("key", "00"), ("key", None), ("key", "x" * 64), ("key", 5),
        ("frame_pages", 0), ("frame_pages", 65), ("frame_pages", True), ("zstd_level", 0),
        ("zstd_level", 20), ("zstd_level", "1"), ("zstd_level", 1e300),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(key: str, value: object) -> None:
    text: dict[str, Any] = json.loads(CONFIG.encode()) | {key: value}
    with pytest.raises(SnapshotError) as caught:
        StoreConfig.decode(json.dumps(text).encode())
    assert CONFIG.key.hex() not in str(caught.value)


@some
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        StoreConfig.decode(data)
    for text in (b"[" * 40_000, b" " * 70_000, b"\xff\xfe"):
        with pytest.raises(SnapshotError):
            StoreConfig.decode(text)
