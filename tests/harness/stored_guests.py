"""Snapshots in stores, made page by page from files: what ``store add`` makes of them."""

from __future__ import annotations

from pathlib import Path

from pyqmigrate.format.store.config import PAGE
from pyqmigrate.store.store import Store
from tests.harness.stores import put_snapshot

__all__ = ["store_file"]


def store_file(store: Store, path: Path, name: str, **options: object) -> str:
    """Store a sealed mapped-ram file under a name, with its record; return ``STORE#NAME``."""
    content = path.read_bytes()
    whole = len(content) // PAGE * PAGE
    record = path.with_name(f"{path.name}.vm.json")
    put_snapshot(
        store,
        name,
        content,
        extents=[(whole, len(content) - whole)] if whole < len(content) else [],
        mtime_ns=path.stat().st_mtime_ns,
        seal=path.with_name(f"{path.name}.seal").read_bytes(),
        companions={".vm.json": record.read_bytes()} if record.exists() else {},
        **options,  # type: ignore[arg-type]
    )
    return f"{store.name}#{name}"
