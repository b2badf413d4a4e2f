"""Remove snapshots from a store, by name or by age. Their packs remain until the next gc."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.store.keys import snapshot_key, working_set_key
from pyqmigrate.store.holding import remove_unheld
from pyqmigrate.store.leases import leased
from pyqmigrate.store.locks import adding
from pyqmigrate.store.retention import Dated, Retention
from pyqmigrate.store.store import NoSnapshot, SnapshotEntry, Store

__all__ = ["RemoveReport", "remove"]


@dataclass(frozen=True)
class RemoveReport:
    """Names of snapshots: ``removed`` (with a dry run: that would be), ``kept`` among those that were
    looked at, and ``in_use``, which were not removed because a process reads them. ``notes`` are
    sentences."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    in_use: tuple[str, ...]
    dry_run: bool
    notes: tuple[str, ...] = ()


def remove(
    store: Store,
    names: Iterable[str] = (),
    *,
    keep: str | None = None,
    match: str | None = None,
    dry_run: bool = False,
) -> RemoveReport:
    """Remove the snapshots ``names``, or with ``keep`` those that it does not keep.

    keep: such as ``7d/4w/12m`` (:mod:`pyqmigrate.store.retention`), for each guest by itself: a guest
        is known by its UUID, or else by its machine type and RAM blocks.
    match: a pattern of names (``web-*``), to which ``keep`` is limited.

    A snapshot that a process reads (a mount, a restored guest) is not removed; see
    :meth:`Store.open_file`. Waits for a collector to end. Raises
    UsageError for a name that is not there, before anything is removed; SnapshotError, likewise, if
    ``keep`` is given and a snapshot is damaged; TargetError.
    """
    listed = list(names)
    if (keep is None) == (not listed):
        raise UsageError("give either names of snapshots, or what to keep (7d/4w/12m)")
    if match is not None and keep is None:
        raise UsageError("a pattern of names limits what is kept, so it needs --keep")
    if keep is None:
        there = set(store.names())
        for name in listed:
            snapshot_key(name)  # checks it
            if name not in there:
                raise NoSnapshot(f"there is no snapshot {name!r} in {store.name}")
        doomed, kept, notes = list(dict.fromkeys(listed)), [], []
    else:
        retention = Retention.parse(keep)
        entries = [e for e in store.list() if match is None or fnmatchcase(e.name, match)]
        stay = retention.kept(map(_dated, entries))
        doomed = [entry.name for entry in entries if entry.name not in stay]
        notes = _notes(entries, match)
        kept = [entry.name for entry in entries if entry.name in stay]
    in_use: list[str] = []
    if not dry_run and doomed:
        with adding(store.place) as place:
            read = set() if place.directory is not None else leased(place, place.lock.now)
            in_use = [name for name in doomed if name in read or not _remove(store, name)]
    removed = [name for name in doomed if name not in in_use]
    return RemoveReport(tuple(removed), tuple(kept), tuple(in_use), dry_run, tuple(notes))


def _notes(entries: Sequence[SnapshotEntry], match: str | None) -> list[str]:
    unknown = sum(entry.head is not None and entry.head.uuid is None for entry in entries)
    if not unknown or match is not None:
        return []
    return [
        f"{unknown} snapshots do not record the UUID of their guest: guests with the same machine type "
        "and RAM count as one; limit the rules to the names of one guest if there are several"
    ]


def _dated(entry: SnapshotEntry) -> Dated:
    head = entry.head
    if head is None:
        raise SnapshotError(
            f"{entry.error}; nothing was removed: remove {entry.name!r} by its name first"
        )
    return Dated(entry.name, head.uuid or (head.machine, head.blocks), head.mtime_ns)


def _remove(store: Store, name: str) -> bool:
    if not remove_unheld(store.place, snapshot_key(name)):
        return False
    store.place.delete(working_set_key(name))
    return True
