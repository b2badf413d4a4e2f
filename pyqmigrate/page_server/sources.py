"""Where the pages come from: one interface for every kind of snapshot.

    with open_source("/snap/guest.mapped") as source:
        source.data(0)                       # the bitmap of the pages with data of the first block
        source.read(0, 256, 16)              # 16 pages from page 256 of it

A file that can be mapped-ram, an increment with its base, a sequential stream or a compact file is opened
by :func:`~pyqmigrate.snapshot.detect.open_snapshot`; a snapshot of a store is read directly
(:mod:`pyqmigrate.page_server.stored`).
"""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.postcopy.records import RecordData
from pyqmigrate.format.postcopy.stream import PACKAGE_MAX
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.elements import PARTS_LISTED
from pyqmigrate.format.stream.sequential import SequentialStream
from pyqmigrate.format.stream.wire import RAM_NAME, Section, SectionKind, Stream
from pyqmigrate.format.stream.writer import RAM_SECTION_ID
from pyqmigrate.format.working_set import TouchedRun
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.page_sending import PagesInFile
from pyqmigrate.io.view import names_stored

__all__ = ["GuestState", "PageSource", "ReadAt", "guest_state", "open_source"]


@dataclass(frozen=True)
class GuestState:
    """What a snapshot has besides pages: the configuration, the blocks, and the sections, as they were
    saved, that come before RAM's pages (``early``) and after them (``devices``)."""

    settings: Configuration
    blocks: tuple[BlockSpec, ...]
    early: bytes
    devices: bytes

    def digest(self) -> str:
        """Return what a copy of the snapshot has in common with it, in whatever form: a digest of the
        machine, the blocks and the state of the devices. Another save has another clock."""
        import hashlib

        digest = hashlib.blake2b(self.settings.machine.encode(), digest_size=16)
        for block in self.blocks:
            digest.update(f"\n{block.length} {block.name}".encode())
        for sections in (self.early, self.devices):
            digest.update(len(sections).to_bytes(8, "big"))
            digest.update(sections)
        return digest.hexdigest()


class PageSource(abc.ABC):
    """The pages of a snapshot; blocks are numbered in the order of ``state.blocks``. Close it.

    ``name`` is for messages, ``identity`` is that of the file, for working sets. ``readers`` is how many
    reads are best under way at once; 0 if they are so quick that the caller need not use threads.
    ``window`` is how many pages are best read together.
    """

    name: str
    identity: SnapshotId
    state: GuestState
    readers = 0
    window = 64

    @abc.abstractmethod
    def data(self, block: int) -> Bitmap:
        """Return which pages have data; all others are zeros. The bitmap is borrowed.

        Raises SnapshotError, TargetError.
        """

    @abc.abstractmethod
    def read(self, block: int, first: int, npages: int) -> RecordData:
        """Return the pages ``[first, first + npages)``. Those without data have any content.

        May be called by several threads. Raises SnapshotError for damage, TargetError; the message names
        the file, the caller adds block and pages.
        """

    def place(self, block: int) -> PagesInFile | None:
        """Return where the pages of a block are in one plain file; None if they are not."""
        return None

    def prefetch(self, runs: Sequence[TouchedRun]) -> None:
        """Have pages ready that will be read soon, in this order. Returns at once, and raises nothing."""
        return  # where reads are quick

    def working_set(self) -> bytes:
        """Return the working set that the store of the snapshot keeps; empty if it has none.

        Raises UsageError for a snapshot that is not in a store, TargetError.
        """
        raise UsageError(f"{self.name!r} is not in a store, which would keep its working set")

    def write_working_set(self, content: bytes) -> None:
        """Have the store keep a working set. Raises as :meth:`working_set`."""
        self.working_set()

    @abc.abstractmethod
    def close(self) -> None:
        """Close it. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ReadAt(abc.ABC):
    """A file whose bytes are read by position."""

    @abc.abstractmethod
    def read_at(self, offset: int, length: int) -> RecordData:
        """Return exactly ``length`` bytes. Raises SnapshotError, TargetError."""


def open_source(
    snapshot: str | os.PathLike[str],
    *,
    sealed: bool = True,
    base: str | None = None,
    offset: int | None = None,
    cache: str | None = None,
) -> PageSource:
    """Open a snapshot of any kind: a path, a ``file:`` URI, ``STORE#NAME``.

    sealed: whether what is read is compared with the seal, if there is one. Pages of a store are always
        compared with their digests.
    base: where the base of an increment is, instead of the recorded place.
    offset: where the stream starts in a file, bytes; None finds it.
    cache: where the packs of a remote store are kept, None for the default directory.

    Raises the errors of :func:`~pyqmigrate.snapshot.detect.open_snapshot`, and NotSupported for a snapshot
    whose blocks are partly elsewhere or whose device state cannot be separated.
    """
    name = os.fspath(snapshot)
    if "#" in name and names_stored(name):
        from pyqmigrate.page_server.stored import StoredSource

        return StoredSource(name, cache)
    from pyqmigrate.page_server.opened import open_file_source

    return open_file_source(name, sealed=sealed, base=base, offset=offset)


def guest_state(
    stream: Stream | SequentialStream, page_sizes: Sequence[BlockSpec], file: ReadAt
) -> GuestState:
    """Return what a parsed stream has besides pages; its sections are read from ``file``."""
    if stream.opaque_tail or not stream.complete:
        raise NotSupported(
            "the device state cannot be separated: it has no description, or is cut off"
        )
    others = [
        section
        for section in stream.sections
        if section.kind is not SectionKind.COMMAND
        and (section.kind is SectionKind.FULL or section.name != RAM_NAME)
    ]
    if len(stream.sections) > PARTS_LISTED and any(
        section.kind is SectionKind.PART for section in others
    ):
        raise NotSupported("too many sections of live devices")
    if any(section.section_id == RAM_SECTION_ID for section in others):
        raise NotSupported(f"another section than RAM's has the id {RAM_SECTION_ID}")
    devices = [
        section
        for section in others
        if section.kind is SectionKind.FULL and section.offset >= stream.ram_end
    ]
    early = [
        section
        for section in others
        if section.kind is not SectionKind.FULL or section.offset < stream.ram_end
    ]
    settings = Configuration(stream.machine, (), stream.target_page_bits, stream.uuid)
    return GuestState(settings, tuple(page_sizes), _bytes_of(early, file), _bytes_of(devices, file))


def _bytes_of(sections: Sequence[Section], file: ReadAt) -> bytes:
    total = sum(section.length for section in sections)
    if total > PACKAGE_MAX:
        raise NotSupported(
            f"{total} bytes of device state are too long for a post-copy migration: QEMU takes "
            f"{PACKAGE_MAX}"
        )
    return b"".join(bytes(file.read_at(s.offset, s.length)) for s in sections)
