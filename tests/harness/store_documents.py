"""Examples of the documents of a store, for property tests."""

from __future__ import annotations

from array import array

from hypothesis import strategies as st

from pyqmigrate.format.store.pack import NO_BASE, PackFooter
from pyqmigrate.format.store.snapshot import Extent, FillRuns, PageRuns, StoredSnapshot
from pyqmigrate.format.store.snapshot_head import SOURCES, Counts, SnapshotHead
from pyqmigrate.format.stream.block_spec import BlockSpec

__all__ = ["KEY", "digests", "example_footer", "example_snapshot", "footers", "snapshots"]

KEY = bytes(range(32))
digests = st.binary(min_size=16, max_size=16)
_U32 = (1 << 32) - 1


@st.composite
def footers(draw: st.DrawFn) -> PackFooter:
    """A footer of up to 6 frames."""
    npages = draw(st.lists(st.integers(1, 64), max_size=6))
    count = len(npages)
    kinds = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 9000), min_size=count, max_size=count))
    packs = draw(st.lists(digests, max_size=3, unique=True))
    base = st.just((NO_BASE, NO_BASE))
    if packs:
        base |= st.tuples(st.integers(0, len(packs) - 1), st.integers(0, 65535))
    xor_pages = sum(n for n, kind in zip(npages, kinds, strict=True) if kind)
    bases = draw(st.lists(base, min_size=xor_pages, max_size=xor_pages))
    seed = draw(digests)
    return PackFooter(
        array("I", lengths),
        array("H", npages),
        array("H", kinds),
        tuple(packs),
        array("I", (number for number, _ in bases)),
        array("I", (page for _, page in bases)),
        b"".join(bytes([k % 256]) + seed[1:] for k in range(sum(npages))),
    )


def example_footer() -> PackFooter:
    """A plain frame of 3 pages, an XOR frame of 2, a plain one of 1."""
    return PackFooter(
        array("I", [100, 40, 9]),
        array("H", [3, 2, 1]),
        array("H", [0, 1, 0]),
        (b"p" * 16, b"q" * 16),
        array("I", [1, NO_BASE]),
        array("I", [70, NO_BASE]),
        b"".join(bytes([k]) * 16 for k in range(6)),
    )


_heads = st.builds(
    SnapshotHead,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+@:-]{0,40}", fullmatch=True).filter(
        lambda name: not name.endswith((".seal", ".vm.json", ".workingset", ".pages"))
    ),
    size=st.integers(0, 1 << 46),
    mtime_ns=st.integers(-(1 << 62), 1 << 62),
    machine=st.text(max_size=30),
    uuid=st.none() | digests,
    added_ns=st.integers(0, 1 << 62),
    parent=st.none() | st.just("before"),
    source=st.sampled_from(SOURCES),
    labels=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    blocks=st.just(()) | st.just((BlockSpec("pc.ram", 1 << 22), BlockSpec("vga", 1 << 16, 65536))),
    counts=st.builds(Counts, *[st.integers(0, 1 << 40)] * 4),
)


@st.composite
def _places(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    firsts, counts, end = [], [], 0
    for _ in range(draw(st.integers(0, 8))):
        first = end + draw(st.integers(0, 1 << 20) | st.just(0))
        count = draw(st.integers(1, 500))
        firsts.append(first)
        counts.append(count)
        end = first + count
    return firsts, counts, end


@st.composite
def snapshots(draw: st.DrawFn) -> StoredSnapshot:
    """A whole document with up to 8 runs of each kind."""
    packs = draw(st.lists(digests, min_size=1, max_size=4, unique=True))
    firsts, counts, end = draw(_places())
    runs = PageRuns(
        array("Q", firsts),
        array("I", counts),
        array("I", (draw(st.integers(0, len(packs) - 1)) for _ in firsts)),
        array("I", (draw(st.integers(0, 65536 - count)) for count in counts)),
    )
    firsts, counts, fill_end = draw(_places())
    words = (draw(st.integers(1, (1 << 64) - 1)) for _ in firsts)
    fills = FillRuns(array("Q", firsts), array("I", counts), array("Q", words))
    extents, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        at += draw(st.integers(0, 5000))
        data = draw(st.binary(min_size=1, max_size=40))
        extents.append(Extent(at, data))
        at += len(data)
    head = draw(_heads)
    size = max(end * 4096, fill_end * 4096, at) + draw(st.integers(0, 5000))
    head = SnapshotHead(**(vars(head) | {"size": size}))
    companions = draw(st.dictionaries(st.just(".vm.json"), st.binary(max_size=60)))
    return StoredSnapshot(
        head, tuple(packs), tuple(extents), runs, fills, draw(st.binary(max_size=80)), companions
    )


def example_snapshot() -> StoredSnapshot:
    """A document with two packs, some runs, an extent, a seal and a record."""
    head = SnapshotHead(
        name="monday",
        size=1 << 20,
        mtime_ns=1_700_000_000_000_000_001,
        machine="pc-q35-10.0",
        uuid=b"u" * 16,
        added_ns=1_700_000_001_000_000_000,
        parent="sunday",
        source="mapped-ram",
        labels={"host": "h1"},
        blocks=(BlockSpec("pc.ram", 1 << 19),),
        counts=Counts(30, 4, 10, 5000),
    )
    return StoredSnapshot(
        head,
        (b"p" * 16, b"q" * 16),
        (Extent(0, b"header"), Extent(900_000, b"devices" * 40)),
        PageRuns(
            array("Q", [8, 40, 60]),
            array("I", [10, 5, 15]),
            array("I", [0, 1, 1]),
            array("I", [7, 100, 105]),
        ),
        FillRuns(array("Q", [20]), array("I", [4]), array("Q", [0xCC << 56])),
        b"a seal",
        {".vm.json": b"{}"},
    )
