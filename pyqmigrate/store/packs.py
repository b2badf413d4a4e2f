"""The packs of a store, read by ranges: footers, and compressed frames.

Of a remote store, what was read is kept in a local cache of compressed packs, if there is one. What
comes from the cache is not trusted: a frame whose pages do not have their digests is read again from the
store.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.store.config import StoreConfig
from pyqmigrate.format.store.keys import pack_key
from pyqmigrate.format.store.pack import END_GUESS, TRAILER_SIZE, Frame, PackFooter
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.pack_cache import PackCache
from pyqmigrate.store.place import Bytes, Place, is_unreachable

__all__ = ["Packs"]

T = TypeVar("T")

_FOOTERS_MAX = 64 << 20  # bytes of footers that are kept
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0  # seconds between attempts to reach the store


class Packs:
    """The packs of the store in ``place``; all methods may be called by several threads at once.

    For ``patience`` seconds a place that does not answer is asked again, each time; ``stop`` ends that
    earlier. ``requests`` counts the reads from the place; ``on_request`` is called with each, and with
    whether a reader waits for it.
    """

    def __init__(
        self,
        place: Place,
        config: StoreConfig,
        cache: PackCache | None = None,
        *,
        patience: float = 0.0,
    ) -> None:
        self.place = place
        self.config = config
        self.cache = cache
        self.patience = patience
        self.stop = threading.Event()
        self.requests = 0
        self.on_request: Callable[[bool], object] | None = None
        self._footers: OrderedDict[bytes, PackFooter] = OrderedDict()
        self._footer_bytes = 0
        self._lock = threading.Lock()

    def footer(self, pack: bytes, *, demand: bool = True) -> PackFooter:
        """Return the footer of a pack. Raises DamagedPack for a pack that is damaged or missing,
        TargetError."""
        with self._lock:
            found = self._footers.get(pack)
            if found is not None:
                self._footers.move_to_end(pack)
                return found
        found = self._read_footer(pack, demand)
        with self._lock:
            if pack not in self._footers:
                self._footers[pack] = found
                self._footer_bytes += _cost(found)
                while self._footer_bytes > _FOOTERS_MAX and len(self._footers) > 1:
                    self._footer_bytes -= _cost(self._footers.popitem(last=False)[1])
        return found

    def has_footer(self, pack: bytes) -> bool:
        """Return whether the footer of a pack is known, so that it is not read again."""
        with self._lock:
            return pack in self._footers

    def frames(
        self, pack: bytes, frames: Sequence[Frame], *, fresh: bool = False, demand: bool = True
    ) -> list[memoryview]:
        """Return the compressed bytes of ``frames``, which are in the order of the pack, with one
        request. With ``fresh``, not from the cache; with ``demand`` a reader waits."""
        start, end = frames[0].offset, frames[-1].offset + frames[-1].length
        data: Bytes | None = None
        if self.cache is not None and not fresh:
            data = self.cache.read(pack, start, end - start)
        if data is None:
            data = self._read(pack, start, end - start, demand)
            if self.cache is not None:
                self.cache.write(pack, start, data)
        view = memoryview(data)
        return [view[frame.offset - start :][: frame.length] for frame in frames]

    def _read(self, pack: bytes, start: int, length: int, demand: bool) -> Bytes:
        data = self._patiently(lambda: self.place.read(pack_key(pack), start, length), pack, demand)
        if len(data) != length:
            raise DamagedPack("it is cut off", pack, store=self.place.name)
        return data

    def _read_footer(self, pack: bytes, demand: bool) -> PackFooter:
        if self.cache is not None:
            end = self.cache.read_end(pack, END_GUESS)
            if end is not None:
                try:
                    return self._decode(pack, *end)
                except SnapshotError:
                    pass  # of the cache: read again
        data, size = self._read_end(pack, END_GUESS, demand)
        try:
            needed = PackFooter.end_size(bytes(data[-TRAILER_SIZE:]), size, pack.hex())
            if needed > len(data):
                data, size = self._read_end(pack, needed, demand)
            footer = self._decode(pack, data, size)
        except DamagedPack:
            raise
        except SnapshotError as error:
            raise DamagedPack(str(error), pack, store=self.place.name) from error
        if self.cache is not None:
            self.cache.write(pack, size - len(data), data, size)
        return footer

    def _read_end(self, pack: bytes, length: int, demand: bool) -> tuple[Bytes, int]:
        return self._patiently(lambda: self.place.read_end(pack_key(pack), length), pack, demand)

    def _decode(self, pack: bytes, end: Bytes, size: int) -> PackFooter:
        return PackFooter.decode(self.config.key, bytes(end), size, pack.hex())

    def _patiently(self, read: Callable[[], T], pack: bytes, demand: bool) -> T:
        """Read from the place, and again for a while if it does not answer."""
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            with self._lock:
                self.requests += 1
                if self.on_request is not None:
                    self.on_request(demand)
            try:
                return read()
            except TargetError as error:
                if error.errno == errno.ENOENT:
                    raise DamagedPack("it is missing", pack, store=self.place.name) from error
                late = time.monotonic() - began >= self.patience
                if late or not is_unreachable(error) or self.stop.wait(pause):
                    raise
                pause = min(2 * pause, _LAST_PAUSE)


def _cost(footer: PackFooter) -> int:
    """Return the memory of a footer in bytes, about."""
    return 1024 + 24 * len(footer) + 32 * len(footer.lengths)
