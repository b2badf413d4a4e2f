"""No file of another kind, and no other store, gets into the directory of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyqmigrate import convert, seal
from pyqmigrate.compaction import compact
from pyqmigrate.errors import UsageError
from pyqmigrate.io.enclosing_store import refuse_in_store
from pyqmigrate.mount.mounting import check_not_in_store
from pyqmigrate.store import Store, copy, get
from pyqmigrate.store.pack_cache import PackCache
from tests.harness.snapshots import save_known
from tests.harness.stores import image, put_snapshot

Place = Callable[[Path], object]


def _get(path: Path) -> None:
    with Store.open(path.parents[2] / "source") as store:
        get(store, "a", path)


def _copy(path: Path) -> None:
    with Store.open(path.parents[2] / "source") as store:
        copy(store, str(path))


@pytest.mark.parametrize("folder", ["packs", "snapshots", "locks", "new"])
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: Store.create(path), id="create"),
        pytest.param(lambda path: Store.create(f"file://{path}"), id="create by URL"),
        pytest.param(_copy, id="copy"),
        pytest.param(_get, id="get"),
        pytest.param(lambda path: compact(path.parents[2] / "plain", path), id="compact"),
        pytest.param(
            lambda path: convert(path.parents[2] / "plain", path, to="stream"), id="convert"
        ),
        pytest.param(save_known, id="save"),
        pytest.param(lambda path: check_not_in_store(str(path), "/none"), id="mount"),
        pytest.param(PackCache, id="cache"),
    ],
)
def test_nothing_is_written_into_a_store(tmp_path: Path, write: Place, folder: str) -> None:
    save_known(tmp_path / "plain")
    with Store.create(tmp_path / "source") as source:
        put_snapshot(source, "a", image(10))
    Store.create(tmp_path / "store").close()
    (tmp_path / "store" / folder).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"is in the store .*/store': .* must be elsewhere"):
        write(tmp_path / "store" / folder / "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_into_a_store_is_followed(tmp_path: Path) -> None:
    Store.create(tmp_path / "store").close()
    (tmp_path / "link").symlink_to("store")
    with pytest.raises(UsageError, match="must be elsewhere"):
        refuse_in_store(tmp_path / "link" / "x", "a file")


@pytest.mark.parametrize("content", [None, b"{}", b"", b'{"format": "other"}'])
def test_a_directory_that_is_not_a_store_takes_files(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "store.json").write_bytes(content)
    save_known(tmp_path / "x")
    seal(tmp_path / "x")
    refuse_in_store(tmp_path / "sub" / "y", "a file")


def test_a_directory_beside_a_store_takes_files(tmp_path: Path) -> None:
    Store.create(tmp_path / "store").close()
    refuse_in_store(tmp_path / "store2" / "x", "a file")
    refuse_in_store(tmp_path / "store", "the store itself")
