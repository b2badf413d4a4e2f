"""A view of a stored snapshot that has everything but its pages."""

from __future__ import annotations

from pathlib import Path

import pyqmigrate
from pyqmigrate.io.view import ViewOptions, open_view
from pyqmigrate.mount.heads import HeadView
from pyqmigrate.store.store import Store
from tests.harness.snapshots import ram
from tests.harness.stored_guests import store_file


def test_a_view_of_heads_has_all_but_the_pages(tmp_path: Path) -> None:
    path = tmp_path / "guest.mapped"
    memory = ram(600)
    pyqmigrate.save(path, [pyqmigrate.RamBlock("ram", memory)], seal="xxh3-128")
    with Store.create(tmp_path / "store") as store:
        name = store_file(store, path, "monday")
    view = open_view(name, ViewOptions(pages=False))
    assert view is not None
    try:
        assert isinstance(view.view, HeadView)
        assert view.stored
        with pyqmigrate.open_snapshot(path) as whole, pyqmigrate.open_snapshot(view.path) as heads:
            block, head = whole.blocks["ram"], heads.blocks["ram"]
            assert list(head.runs()) == list(block.runs())
            assert block.read(0, block.length) == bytes(memory)
            assert not any(head.read(0, head.length))
        assert view.path.stat().st_mtime_ns == path.stat().st_mtime_ns
        assert view.view.check_recordable().endswith("working-sets/monday.ws")
        place = view.path
    finally:
        view.close()
    assert not place.exists()
