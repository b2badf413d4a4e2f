"""Remove the packs that no snapshot needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.store.keys import (
    PACKS,
    SNAPSHOTS,
    WORKING_SETS,
    name_of_snapshot,
    pack_of_key,
)
from pyqmigrate.io.job import Progress
from pyqmigrate.store.local_place import LocalPlace
from pyqmigrate.store.locks import STALE, collecting
from pyqmigrate.store.reporting import Reporter
from pyqmigrate.store.store import NoSnapshot, Store

__all__ = ["GcReport", "gc"]


@dataclass(frozen=True)
class GcReport:
    """What was removed, or with a dry run would be: packs and their bytes. ``young_packs`` are not
    needed either, but may belong to an add that was interrupted, or to one on a host without locks."""

    snapshot_count: int
    removed_packs: int
    removed_bytes: int
    kept_packs: int
    kept_bytes: int
    young_packs: int
    young_bytes: int
    removed_working_sets: int
    dry_run: bool


def gc(
    store: Store,
    *,
    dry_run: bool = False,
    min_age: float = STALE,
    wait: float = 0.0,
    progress: Callable[[Progress], object] | None = None,
) -> GcReport:
    """Remove packs that no snapshot names and that are older than ``min_age`` seconds.

    Adders and other collectors are kept out during that time; ``wait`` is for how many seconds their end is
    awaited. It can be killed at any moment. Raises SnapshotError, before anything is removed, if a
    snapshot is damaged, since it is not known what that needs; TargetError, with EBUSY while an adder
    is at work.
    """
    place = store.place
    with collecting(place, wait=wait) as lock:
        names = store.names()
        known = {*names, None}  # None: not the key of a working set
        needed: set[bytes] = set()
        for packs in store.in_parallel(lambda name: _packs_of(store, name), names):
            needed.update(packs)
        garbage, kept, young = [], [], []
        for entry in place.list(PACKS):
            pack = pack_of_key(entry.key)
            if pack is None:
                continue  # not a pack
            if pack in needed:
                kept.append(entry)
            elif lock.now - entry.mtime > min_age:
                garbage.append(entry)
            else:
                young.append(entry)
        orphans = [
            entry.key
            for entry in place.list(WORKING_SETS)
            if name_of_snapshot(_document_of(entry.key)) not in known
            and lock.now - entry.mtime > min_age
        ]
        report = Reporter(progress, sum(entry.size for entry in garbage))
        if not dry_run:
            for entry in garbage:
                lock.check()
                place.delete(entry.key)
                report.add(entry.size)
            for key in orphans:
                lock.check()
                place.delete(key)
            if isinstance(place, LocalPlace):
                for folder in (PACKS, SNAPSHOTS, WORKING_SETS):
                    place.remove_incomplete(folder[:-1], lock.now - min_age)
    return GcReport(
        len(names),
        len(garbage),
        sum(entry.size for entry in garbage),
        len(kept),
        sum(entry.size for entry in kept),
        len(young),
        sum(entry.size for entry in young),
        len(orphans),
        dry_run,
    )


def _packs_of(store: Store, name: str) -> tuple[bytes, ...]:
    try:
        return store.read_snapshot(name).packs
    except NoSnapshot:
        return ()  # it was removed since it was listed
    except SnapshotError as error:
        error.add_note(f"nothing was removed, because a snapshot is damaged ({store.name}): ")
        raise


def _document_of(working_set: str) -> str:
    """Return the key of the document that a working set belongs to."""
    return f"{SNAPSHOTS}{working_set.removeprefix(WORKING_SETS).removesuffix('.ws')}.snap"
