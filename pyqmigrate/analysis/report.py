"""The result of a comparison: how two snapshots, A and B, differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pyqmigrate.format.device.values import State, Value

__all__ = ["BlockDiff", "DeviceDiff", "DiffReport", "FieldDiff", "PageRange"]


@dataclass(frozen=True, slots=True)
class PageRange:
    """Consecutive pages ``[first, end)`` of a block that differ. ``address`` is the guest-physical
    address of the first, in bytes; None if it is not known."""

    first: int
    end: int
    address: int | None


@dataclass(frozen=True)
class BlockDiff:
    """The RAM block ``name``, which both snapshots have. ``lengths`` are in bytes, one for each.

    ``pages`` of ``page_size`` bytes are in both; ``compared_pages`` of them were looked at, the others
    are known to be equal. Of the ``differing_pages``, ``zero_in`` are zero in A and in B. ``ranges``:
    what differs, in order; None if it was not asked for. ``external``: the content of the block is in
    another file, at least for one snapshot, so that it was not compared.
    """

    name: str
    lengths: tuple[int, int]
    page_size: int
    pages: int
    compared_pages: int = 0
    differing_pages: int = 0
    zero_in: tuple[int, int] = (0, 0)
    ranges: tuple[PageRange, ...] | None = None
    external: bool = False

    @property
    def equal(self) -> bool:
        return self.lengths[0] == self.lengths[1] and not self.differing_pages

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON."""
        data = asdict(self)
        if self.ranges is None:
            del data["ranges"]
        return data


@dataclass(frozen=True)
class FieldDiff:
    """A field of a device. ``path`` are the names that lead to it, such as ``env.segs[1].base``.

    ``a`` and ``b`` are its values; if only one snapshot has the field, ``only_in`` is its letter, and
    the other value is None.
    """

    path: str
    a: Value
    b: Value
    only_in: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON; bytes are hexadecimal."""
        return {
            "path": self.path,
            "value_a": _json_value(self.a),
            "value_b": _json_value(self.b),
            "only_in": self.only_in,
        }


@dataclass(frozen=True)
class DeviceDiff:
    """A device whose state differs, or that ``only_in`` one snapshot, ``a`` or ``b``, exists.

    ``sizes`` are those of its state in bytes, None where it is missing. ``fields`` are those that
    differ; None if they were not asked for, or are not known.
    """

    name: str
    instance_id: int
    sizes: tuple[int | None, int | None]
    fields: tuple[FieldDiff, ...] | None = None

    @property
    def only_in(self) -> str | None:
        if None not in self.sizes:
            return None
        return "b" if self.sizes[0] is None else "a"

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON."""
        data: dict[str, Any] = {
            "name": self.name,
            "instance_id": self.instance_id,
            "only_in": self.only_in,
            "size_a": self.sizes[0],
            "size_b": self.sizes[1],
        }
        if self.fields is not None:
            data["fields"] = [field.to_json() for field in self.fields]
        return data


@dataclass(frozen=True)
class DiffReport:
    """How the snapshots ``a`` and ``b`` (their names) differ.

    ``machines`` are their machine types. ``only_in_a`` and ``only_in_b`` are names of blocks.
    ``blocks`` are those of both, in the order of A; ``devices`` those that differ. ``tail_differs``:
    the state of some devices cannot be separated, and differs. ``seals`` says whether pages were left
    out because their seals are equal. ``bytes_read`` of each snapshot, ``seconds`` for all.
    ``notes`` are sentences for the user.
    """

    a: str
    b: str
    machines: tuple[str, str]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    blocks: tuple[BlockDiff, ...]
    devices: tuple[DeviceDiff, ...]
    tail_differs: bool
    seals: bool
    bytes_read: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return (
            self.machines[0] == self.machines[1]
            and not (self.only_in_a or self.only_in_b or self.devices or self.tail_differs)
            and all(block.equal for block in self.blocks)
        )

    @property
    def differing_pages(self) -> int:
        return sum(block.differing_pages for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "machines": list(self.machines),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "differing_pages": self.differing_pages,
            "blocks": [block.to_json() for block in self.blocks],
            "devices": [device.to_json() for device in self.devices],
            "tail_differs": self.tail_differs,
            "seals": self.seals,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def _json_value(value: Value) -> Any:
    if isinstance(value, State):  # an empty one: all others are compared field by field
        return {}
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
