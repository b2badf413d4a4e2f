"""Packs: ``packs/<digest>.pack``, immutable objects of compressed pages.

All numbers are little-endian; a pack has at most 8 MiB::

    8 bytes     magic "qmpack1\\n"
    frames      zstd frames, one after another, of 1 to 64 pages of 4096 bytes each
    footer
      u32       frames, pages, pages in XOR frames, base packs
      u32       length in bytes, of each frame
      u16       pages, of each frame
      u16       kind, of each frame: 0 plain, 1 XOR
      16 bytes  digest, of each base pack
      u32       place in the list of base packs, of each page in an XOR frame; 0xffffffff: no base
      u32       page in that pack, of each page in an XOR frame; 0xffffffff: no base
      16 bytes  digest, of each page
    trailer
      u32       length of the footer in bytes
      u32       0
      16 bytes  keyed digest of the footer
      8 bytes   magic "qmpack1\\n"

Pages are numbered in the order of the frames. A page of an XOR frame is stored XORed with its base, a
page in a *plain* frame of another pack; its digest is that of the page itself. The digest in the
pack's key is that of all of its bytes.
"""

from __future__ import annotations

import functools
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from typing import NamedTuple

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.store.config import FRAME_PAGES_MAX, PAGE
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.numbers import Numbers, from_bytes, to_bytes

__all__ = [
    "END_GUESS",
    "FRAME_MAX",
    "MAGIC",
    "NO_BASE",
    "PACK_MAX",
    "PAGES_MAX",
    "TRAILER_SIZE",
    "BasePage",
    "Frame",
    "PackFooter",
    "footer_size",
]

MAGIC = b"qmpack1\n"
PACK_MAX = 8 << 20  # bytes
PAGES_MAX = 1 << 16  # pages of one pack
FRAME_MAX = FRAME_PAGES_MAX * PAGE + 4096  # bytes; what cannot be compressed grows by 0.4 % at most
END_GUESS = 192 << 10  # bytes: the end of nearly every full pack that has the footer
NO_BASE = 0xFFFFFFFF

_COUNTS = struct.Struct("<IIII")
_TRAILER = struct.Struct(f"<II{DIGEST_SIZE}s{len(MAGIC)}s")
TRAILER_SIZE = _TRAILER.size
_PLAIN, _XOR = 0, 1


class Frame(NamedTuple):
    """One frame. ``offset`` and ``length`` in bytes, of the pack; ``first`` is its first page's number,
    ``first_base`` the place of its first page among the bases (XOR frames only)."""

    number: int
    offset: int
    length: int
    first: int
    npages: int
    xor: bool
    first_base: int


class BasePage(NamedTuple):
    """A page by its pack's digest and its number there."""

    pack: bytes
    page: int


def footer_size(frames: int, pages: int, xor_pages: int, base_packs: int) -> int:
    """Return the length in bytes of a footer with these counts, without the trailer."""
    return (
        _COUNTS.size + 8 * frames + 8 * xor_pages + DIGEST_SIZE * base_packs + DIGEST_SIZE * pages
    )


@dataclass(frozen=True)
class PackFooter:
    """The table of a pack.

    lengths, npages, kinds: of each frame, in order ("I", "H", "H").
    base_packs: digests of the packs that XOR frames refer to.
    base_numbers, base_pages: for each page in XOR frames, the place of its base's pack in
        ``base_packs`` and the page there ("I"); both NO_BASE for a page without a base.
    digests: 16 bytes for each page.
    """

    lengths: Numbers
    npages: Numbers
    kinds: Numbers
    base_packs: tuple[bytes, ...]
    base_numbers: Numbers
    base_pages: Numbers
    digests: bytes

    def __len__(self) -> int:
        """The number of pages."""
        return len(self.digests) // DIGEST_SIZE

    @functools.cached_property
    def _offsets(self) -> Sequence[int]:
        return array("Q", accumulate(self.lengths, initial=len(MAGIC)))

    @functools.cached_property
    def _firsts(self) -> Sequence[int]:
        return array("Q", accumulate(self.npages, initial=0))

    @functools.cached_property
    def _first_bases(self) -> Sequence[int]:
        xor_pages = map(int.__mul__, self.npages, self.kinds)
        return array("Q", accumulate(xor_pages, initial=0))

    @property
    def frames_end(self) -> int:
        """Where the footer begins in the pack, bytes."""
        return self._offsets[-1]

    @property
    def pack_size(self) -> int:
        """The size of the pack, bytes."""
        counts = len(self.lengths), len(self), len(self.base_pages), len(self.base_packs)
        return self.frames_end + footer_size(*counts) + TRAILER_SIZE

    def frame(self, number: int) -> Frame:
        """Return frame ``number``. Raises IndexError."""
        if not 0 <= number < len(self.lengths):
            raise IndexError(f"frame {number} of {len(self.lengths)}")
        return Frame(
            number,
            self._offsets[number],
            self.lengths[number],
            self._firsts[number],
            self.npages[number],
            self.kinds[number] == _XOR,
            self._first_bases[number],
        )

    def frame_of(self, page: int) -> Frame:
        """Return the frame that contains the page. Raises IndexError."""
        if not 0 <= page < len(self):
            raise IndexError(f"page {page} of {len(self)}")
        return self.frame(bisect_right(self._firsts, page) - 1)

    def digest(self, page: int) -> bytes:
        """Return the digest of a page."""
        return self.digests[page * DIGEST_SIZE : (page + 1) * DIGEST_SIZE]

    def base(self, frame: Frame, page: int) -> BasePage | None:
        """Return what page ``page`` of this pack, in the XOR frame ``frame``, is XORed with."""
        at = frame.first_base + page - frame.first
        number = self.base_numbers[at]
        return None if number == NO_BASE else BasePage(self.base_packs[number], self.base_pages[at])

    def encode(self, key: bytes) -> bytes:
        """Return footer and trailer: what follows the frames."""
        counts = _COUNTS.pack(
            len(self.lengths), len(self), len(self.base_numbers), len(self.base_packs)
        )
        footer = b"".join(
            [
                counts,
                to_bytes(self.lengths),
                to_bytes(self.npages),
                to_bytes(self.kinds),
                *self.base_packs,
                to_bytes(self.base_numbers),
                to_bytes(self.base_pages),
                self.digests,
            ]
        )
        return footer + _TRAILER.pack(len(footer), 0, keyed_digest(key, [footer]), MAGIC)

    @staticmethod
    def end_size(end: bytes, size: int, pack: str) -> int:
        """Return how many of the last bytes of a pack footer and trailer have.

        end: the last bytes of the pack, TRAILER_SIZE or more; size: of the whole pack; pack: its
        name for messages. Raises SnapshotError.
        """
        if not len(MAGIC) + TRAILER_SIZE <= size <= PACK_MAX or len(end) < TRAILER_SIZE:
            raise _fault(pack, f"{size} bytes cannot be a pack")
        length, zero, _, magic = _TRAILER.unpack(end[-TRAILER_SIZE:])
        if magic != MAGIC or zero:
            raise _fault(pack, "its last bytes are not those of a pack", size - TRAILER_SIZE)
        if not _COUNTS.size <= length <= size - TRAILER_SIZE - len(MAGIC):
            raise _fault(pack, f"a footer of {length} bytes", size - TRAILER_SIZE)
        return int(length) + TRAILER_SIZE

    @classmethod
    def decode(cls, key: bytes, end: bytes, size: int, pack: str) -> PackFooter:
        """Read the footer from the last bytes of a pack, :meth:`end_size` of them or more.

        Arguments as there. Raises SnapshotError if it is damaged, or any number in it is wrong.
        """
        needed = cls.end_size(end, size, pack)
        if len(end) < needed:
            raise _fault(pack, "its footer is cut off", size - needed)
        footer = memoryview(end)[len(end) - needed : len(end) - TRAILER_SIZE]
        digest = _TRAILER.unpack(end[-TRAILER_SIZE:])[2]
        if keyed_digest(key, [footer]) != digest:
            raise _fault(pack, "its footer is damaged, or of another store", size - needed)
        counts = _COUNTS.unpack_from(footer)
        frames, pages, xor_pages, base_packs = counts
        if len(footer) != footer_size(*counts) or not frames <= pages <= PAGES_MAX:
            raise _fault(pack, f"{frames} frames and {pages} pages do not fit in the footer")
        parts, start = [], _COUNTS.size
        for width, count in (
            (4, frames),
            (2, frames),
            (2, frames),
            (DIGEST_SIZE, base_packs),
            (4, xor_pages),
            (4, xor_pages),
            (DIGEST_SIZE, pages),
        ):
            parts.append(footer[start : start + width * count])
            start += width * count
        names = bytes(parts[3])
        found = cls(
            from_bytes("I", parts[0]),
            from_bytes("H", parts[1]),
            from_bytes("H", parts[2]),
            tuple(names[k : k + DIGEST_SIZE] for k in range(0, len(names), DIGEST_SIZE)),
            from_bytes("I", parts[4]),
            from_bytes("I", parts[5]),
            bytes(parts[6]),
        )
        found._check(pack, size - needed)
        return found

    def _check(self, pack: str, frames_end: int) -> None:
        for what, numbers, least, most in (
            ("a frame's length", self.lengths, 1, FRAME_MAX),
            ("a frame's pages", self.npages, 1, FRAME_PAGES_MAX),
            ("a frame's kind", self.kinds, _PLAIN, _XOR),
        ):
            if numbers and not (least <= min(numbers) and max(numbers) <= most):
                raise _fault(pack, f"{what} is not between {least} and {most}")
        if self.frames_end != frames_end:
            raise _fault(pack, "the frames do not end at the footer", self.frames_end)
        if sum(self.npages) != len(self):
            raise _fault(pack, "the frames have another number of pages than the footer")
        if sum(compress(self.npages, self.kinds)) != len(self.base_numbers):
            raise _fault(pack, "the XOR frames have another number of pages than there are bases")
        if len(set(self.base_packs)) != len(self.base_packs):
            raise _fault(pack, "a base pack is listed twice")
        for number, page in zip(self.base_numbers, self.base_pages, strict=True):
            if (number, page) != (NO_BASE, NO_BASE) and not (
                number < len(self.base_packs) and page < PAGES_MAX
            ):
                raise _fault(pack, f"no page can be page {page} of base pack {number}")


def _fault(pack: str, message: str, offset: int | None = None) -> SnapshotError:
    return SnapshotError(message, field=f"pack {pack}", offset=offset)
