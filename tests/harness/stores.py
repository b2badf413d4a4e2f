"""Stores made in plain Python, page by page: the twin of what adds snapshots to a store."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pyqmigrate.format.store.config import FRAME_PAGES_MAX, PAGE
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.keys import pack_key, snapshot_key
from pyqmigrate.format.store.pack import MAGIC, NO_BASE, BasePage, PackFooter
from pyqmigrate.format.store.snapshot import Extent, FillRuns, PageRuns, StoredSnapshot
from pyqmigrate.format.store.snapshot_head import Counts, SnapshotHead
from pyqmigrate.format.store.zstd import compress
from pyqmigrate.store.store import Store

__all__ = ["Added", "image", "put_pack", "put_snapshot"]


@dataclass
class Added:
    """What was put into a store: where each known page is, by its content."""

    pages: dict[bytes, BasePage] = field(default_factory=dict)


def image(pages: int, seed: int = 0, *, size: int | None = None) -> bytes:
    """Return the content of a file: a quarter zero pages, some of one word, the rest random, which
    shrinks to a half."""
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 16, (pages, PAGE), np.uint8)
    content[:, ::2] += 1
    kind = rng.integers(0, 8, pages)
    content[kind < 2] = 0
    for page in np.flatnonzero(kind == 2):
        content[page] = np.frombuffer(struct.pack("<Q", 0xCC00 + int(page) % 3) * 512, np.uint8)
    data = content.tobytes()
    return data if size is None else data[:size]


def put_pack(
    store: Store,
    pages: Sequence[bytes],
    bases: Mapping[int, BasePage] | None = None,
    known: Mapping[BasePage, bytes] | None = None,
    *,
    frame_pages: int = FRAME_PAGES_MAX,
) -> bytes:
    """Write a pack of these pages, in frames of ``frame_pages``; return its digest. A frame with a page
    that is in ``bases`` is an XOR frame; ``known`` has the content of the bases."""
    key = store.config.key
    bases, known = bases or {}, known or {}
    frames, kinds, counts, numbers, base_pages = [], array("H"), array("H"), array("I"), array("I")
    base_packs: list[bytes] = []
    for first in range(0, len(pages), frame_pages):
        here = list(range(first, min(first + frame_pages, len(pages))))
        xor = any(page in bases for page in here)
        content = b""
        for page in here:
            base = bases.get(page)
            if xor and base is not None:
                if base.pack not in base_packs:
                    base_packs.append(base.pack)
                numbers.append(base_packs.index(base.pack))
                base_pages.append(base.page)
            elif xor:
                numbers.append(NO_BASE)
                base_pages.append(NO_BASE)
            mask = 0 if base is None else int.from_bytes(known[base], "little")
            content += (int.from_bytes(pages[page], "little") ^ mask).to_bytes(PAGE, "little")
        frames.append(compress(content, 1))
        kinds.append(int(xor))
        counts.append(len(here))
    footer = PackFooter(
        array("I", map(len, frames)),
        counts,
        kinds,
        tuple(base_packs),
        numbers,
        base_pages,
        b"".join(keyed_digest(key, [page]) for page in pages),
    )
    pack = MAGIC + b"".join(frames) + footer.encode(key)
    digest = keyed_digest(key, [pack])
    store.place.write_new(pack_key(digest), pack)
    return digest


def put_snapshot(
    store: Store,
    name: str,
    content: bytes,
    *,
    added: Added | None = None,
    extents: Iterable[tuple[int, int]] = (),
    mtime_ns: int = 1_700_000_000_123_456_789,
    uuid: bytes | None = None,
    seal: bytes = b"the seal",
    companions: Mapping[str, bytes] | None = None,
    frame_pages: int = FRAME_PAGES_MAX,
    pack_pages: int = 1000,
) -> StoredSnapshot:
    """Store a file of these bytes under a name: known pages are not stored again.

    ``extents`` are (offset, length) of what is not stored as pages, of which the rest of a page that
    is not whole must be a part.
    """
    added = Added() if added is None else added
    runs: list[tuple[int, BasePage]] = []
    fills: list[tuple[int, int]] = []
    new: list[bytes] = []
    new_at: list[int] = []
    for number in range(len(content) // PAGE):
        page = content[number * PAGE : (number + 1) * PAGE]
        if page == page[:8] * (PAGE // 8):
            if any(page):
                fills.append((number, struct.unpack_from("<Q", page)[0]))
        elif page in added.pages:
            runs.append((number, added.pages[page]))
        else:
            new.append(page)
            new_at.append(number)
    for start in range(0, len(new), pack_pages):
        part = new[start : start + pack_pages]
        digest = put_pack(store, part, frame_pages=frame_pages)
        for k, page in enumerate(part):
            place = BasePage(digest, k)
            added.pages.setdefault(page, place)
            runs.append((new_at[start + k], place))
    runs.sort()
    packs = list(dict.fromkeys(place.pack for _, place in runs))
    head = SnapshotHead(
        name,
        len(content),
        mtime_ns,
        "pc-q35-10.0",
        uuid,
        mtime_ns,
        None,
        "mapped-ram",
        counts=Counts(len(runs), len(fills), len(new), 0),
    )
    document = StoredSnapshot(
        head,
        tuple(packs),
        tuple(Extent(at, content[at : at + length]) for at, length in extents),
        PageRuns(
            array("Q", (number for number, _ in runs)),
            array("I", (1 for _ in runs)),
            array("I", (packs.index(place.pack) for _, place in runs)),
            array("I", (place.page for _, place in runs)),
        ),
        FillRuns(
            array("Q", (number for number, _ in fills)),
            array("I", (1 for _ in fills)),
            array("Q", (word for _, word in fills)),
        ),
        seal,
        companions or {},
    )
    assert store.place.write_new(snapshot_key(name), document.encode(store.config.key))
    return document
