"""What a record and its snapshot know each other by."""

from __future__ import annotations

from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["identify"]

_MOST = 64 << 20  # bytes that are looked at


def identify(snapshot: MappedRamSnapshot) -> str:
    """A digest of what follows the memory, the device state.

    A copy of the file has the same, another save has not: its clocks have gone on. A description
    of the device state that is added later changes nothing. Raises SnapshotError, TargetError.
    """
    import xxhash

    stream = snapshot.stream
    end = stream.end if stream.description_offset is None else stream.description_offset
    length = min(end - stream.ram_end, _MOST)
    return str(xxhash.xxh3_128_hexdigest(snapshot.source.read_at(stream.ram_end, length)))
