"""What a conversion wrote, read again in each form."""

from __future__ import annotations

from pathlib import Path

from pyqmigrate.integrity.seal import stale_pages
from pyqmigrate.snapshot.detect import open_snapshot

__all__ = ["FORMS", "content"]

FORMS = ["mapped-ram", "raw"]


def content(path: Path, form: str, name: str = "ram") -> bytes:
    if form == "raw":
        return (path / f"{name}.raw").read_bytes()
    with open_snapshot(path) as snapshot:
        snapshot.verify()
        assert not any(stale_pages(snapshot).values())
        block = snapshot.blocks[name]
        return block.read(0, block.length)
