"""Copy snapshots from one store to another: only the packs that are missing there, snapshots last."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.keys import (
    CONFIG_KEY,
    PACKS,
    pack_key,
    pack_of_key,
    snapshot_key,
    working_set_key,
)
from pyqmigrate.format.store.pack import PACK_MAX
from pyqmigrate.io.job import Progress
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.holding import hold_snapshot
from pyqmigrate.store.locks import adding
from pyqmigrate.store.place import Place, open_place
from pyqmigrate.store.reporting import Reporter
from pyqmigrate.store.store import NoSnapshot, Store

__all__ = ["CopyReport", "copy"]


@dataclass(frozen=True)
class CopyReport:
    """What was sent: ``copied`` snapshots by name, and packs; ``present`` snapshots were there."""

    copied: tuple[str, ...]
    present: tuple[str, ...]
    sent_packs: int
    sent_bytes: int
    present_packs: int
    seconds: float


def copy(
    source: Store,
    target: str,
    names: Iterable[str] | None = None,
    *,
    channels: int = 4,
    progress: Callable[[Progress], object] | None = None,
) -> CopyReport:
    """Copy all snapshots, or ``names``, to the store in the directory or below the URL ``target``.

    An empty or missing place becomes a store with the key of the source; a store with another key is
    NotSupported, since its digests differ. A pack that is there with another size than here is sent again,
    also if the snapshots that need it are there. Packs go first, each snapshot after its packs: a copy that
    was interrupted is resumed by the same call, and sends no pack twice. ``channels`` are threads, each
    with a pack of 8 MiB at most. Each pack is compared with its digest before it is sent. Raises
    NoSnapshot, UsageError for another snapshot of the same name there, DamagedPack, TargetError.
    """
    began = time.monotonic()
    wanted = source.names() if names is None else list(dict.fromkeys(names))
    with _opened(source, target) as place, adding(place) as there, contextlib.ExitStack() as stack:
        for name in wanted:
            stack.callback(_hold(source, name))
        present = [name for name in wanted if _is_there(source, there, name)]
        left = [name for name in wanted if name not in present]
        known = _packs_in(there)
        sizes = _packs_in(source.place)
        needed = {name: source.read_snapshot(name).packs for name in (*left, *present)}
        every = {pack for packs in needed.values() for pack in packs}
        # What is there and missing here is not compared.
        missing = {
            pack
            for pack in every
            if pack not in known or (pack in sizes and known[pack] != sizes[pack])
        }
        report = Reporter(progress, sum(sizes.get(pack, 0) for pack in missing))
        sent_packs = sent_bytes = 0

        def send(pack: bytes) -> int:
            size = _send_pack(source, there, pack, again=pack in known)
            report.add(size)
            return size

        with ThreadPoolExecutor(max(1, channels), "pyqmigrate-copy") as pool:
            try:
                for name in needed:
                    packs = [pack for pack in needed[name] if pack in missing]
                    sent_bytes += sum(pool.map(send, packs))
                    sent_packs += len(packs)
                    missing.difference_update(packs)
                    if name in left:
                        _send_snapshot(source, there, name)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return CopyReport(
        tuple(left),
        tuple(present),
        sent_packs,
        sent_bytes,
        len(every) - sent_packs,
        time.monotonic() - began,
    )


def _packs_in(place: Place) -> dict[bytes, int]:
    """Return the sizes of all packs in a place, in bytes."""
    named = ((pack_of_key(entry.key), entry.size) for entry in place.list(PACKS))
    return {pack: size for pack, size in named if pack is not None}


@contextlib.contextmanager
def _opened(source: Store, target: str) -> Iterator[Place]:
    """Open the place of the target, which has the configuration of the source then."""
    with contextlib.ExitStack() as stack:
        place = open_place(target, create=True)
        stack.callback(place.close)
        if place.name == source.place.name:
            raise UsageError(f"{place.name} cannot be copied to itself")
        found = next(iter(place.list("")), None)
        if found is None:
            place.write_new(CONFIG_KEY, source.config.encode())
        with Store.open(target) as there:
            if there.config.key != source.config.key:
                raise NotSupported(
                    f"{place.name} was created with a key of its own, so its digests differ: copy to "
                    "an empty place, which becomes a store with the same key, or get each snapshot "
                    "and add it there"
                )
        yield place


def _hold(source: Store, name: str) -> Callable[[], None]:
    key = snapshot_key(name)
    try:
        return hold_snapshot(source.place, key)
    except TargetError as error:
        if error.errno != errno.ENOENT:
            raise
        raise NoSnapshot(f"there is no snapshot {name!r} in {source.name}") from error


def _is_there(source: Store, there: Place, name: str) -> bool:
    """Return whether the target has the snapshot. Raises UsageError if it has another of the name."""
    key = snapshot_key(name)
    entry = there.find(key)
    if entry is None:
        return False
    # The end of a document is the digest of all of it.
    end, size = source.place.read_end(key, DIGEST_SIZE)
    if size != entry.size or bytes(there.read_end(key, DIGEST_SIZE)[0]) != bytes(end):
        raise UsageError(f"{there.name} has another snapshot {name!r}: nothing was copied")
    return True


def _send_pack(source: Store, there: Place, pack: bytes, *, again: bool) -> int:
    """Send a pack, and return its size; ``again`` replaces the one that is there."""
    try:
        data = source.place.read(pack_key(pack), 0, PACK_MAX + 1)
    except TargetError as error:
        if error.errno != errno.ENOENT:
            raise
        raise DamagedPack("it is missing", pack, store=source.name) from error
    if keyed_digest(source.config.key, [data]) != pack:
        raise DamagedPack("its bytes are not those of its name", pack, store=source.name)
    if again:
        there.replace(pack_key(pack), data)
    else:
        there.write_new(pack_key(pack), data)
    return len(data)


def _send_snapshot(source: Store, there: Place, name: str) -> None:
    """Send the document, which was read and found intact before, and the working set."""
    document = source.place.read(snapshot_key(name))
    working_set = source.working_set(name)
    if working_set is not None and there.find(working_set_key(name)) is None:
        there.replace(working_set_key(name), working_set)
    if not there.write_new(snapshot_key(name), document) and not _is_there(source, there, name):
        raise UsageError(f"{there.name} has another snapshot {name!r} since the copy began")
