"""The pages that a store has already, from the footers of its packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pyqmigrate.format.store.keys import PACKS, pack_of_key
from pyqmigrate.format.store.pack import PackFooter
from pyqmigrate.io.store_pages import KnownPages
from pyqmigrate.log import logger
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.store import Store

__all__ = ["KNOWN_MAX", "PACKS_MAX", "KnownPacks"]

KNOWN_MAX = 1 << 24  # pages, 64 GiB of them: some 400 MiB of memory
PACKS_MAX = 2048  # besides those of the parent: each is a request
_AT_ONCE = 64  # footers that are read together


class KnownPacks:
    """The known pages of a store, and the packs that they are in: ``packs`` in the order of their
    numbers. The packs of ``first`` are known whatever their number, then the newest ones, up to
    PACKS_MAX packs and KNOWN_MAX pages.

    Packs that no snapshot names are known as well: those of an adder that was killed are used by the
    next one. Packs that are missing in the listing of the place, or have another size there than their
    footer says, are left out, and so are those whose bases are missing, and damaged footers.
    """

    def __init__(self, store: Store, first: Sequence[bytes], new_pages: int) -> None:
        """new_pages: the most pages that will be new. Raises NotSupported without enough memory,
        TargetError."""
        listed = sorted(store.place.list(PACKS), key=lambda entry: entry.mtime, reverse=True)
        named = ((pack_of_key(entry.key), entry.size) for entry in listed)
        sizes = {digest: size for digest, size in named if digest is not None}
        footers = list(_footers(store, first, sizes).items())
        count = sum(len(footer) for _, footer in footers)
        wanted = set(first)
        others = [digest for digest in sizes if digest not in wanted][:PACKS_MAX]
        for at in range(0, len(others), _AT_ONCE):
            for pack, footer in _footers(store, others[at : at + _AT_ONCE], sizes).items():
                if count + len(footer) <= KNOWN_MAX:
                    footers.append((pack, footer))
                    count += len(footer)
            if count > KNOWN_MAX * 0.99:
                break
        self.pages = KnownPages(count + new_pages)
        self.packs: list[bytes] = []
        self.base_packs: dict[bytes, set[bytes]] = {}
        for pack, footer in footers:
            self.pages.add_pack(footer.digests)
            self.packs.append(pack)
            if footer.base_packs:
                self.base_packs[pack] = set(footer.base_packs)

    def ranges(self) -> dict[bytes, tuple[int, int]]:
        """Return the numbers of the pages of each pack, ``[first, end)``."""
        return dict(zip(self.packs, pairwise(self.pages.starts), strict=False))


def _footers(
    store: Store, packs: Sequence[bytes], sizes: Mapping[bytes, int]
) -> dict[bytes, PackFooter]:
    """Return the footers of the packs that are not damaged, as far as ``sizes``, those of all packs that are
    there, and the footers show."""

    def read(pack: bytes) -> PackFooter | None:
        try:
            if pack not in sizes:
                raise DamagedPack("it is missing", pack, store=store.name)
            footer = store.packs.footer(pack)
            if footer.pack_size != sizes[pack]:
                why = f"it has {sizes[pack]} bytes, and its footer is of {footer.pack_size}"
                raise DamagedPack(why, pack, store=store.name)
            missing = next((base for base in footer.base_packs if base not in sizes), None)
            if missing is not None:
                raise DamagedPack(f"its base, pack {missing.hex()}, is missing", pack)
        except DamagedPack as error:
            logger.warning("not compared with a damaged pack: %s", error)
            return None
        return footer

    found = zip(packs, store.in_parallel(read, packs), strict=True)
    return {pack: footer for pack, footer in found if footer is not None}
