"""How far a lazy restore is, and the damage that it met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pyqmigrate.vm.incoming.keeper.state import ENDED

__all__ = ["Damage", "LazyState"]


@dataclass(frozen=True)
class Damage:
    """A page that cannot be had from the snapshot: the guest waits when it touches it. ``why`` says
    that, with the block and the page; ``page`` is the number of the page in the block."""

    block: str
    page: int
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class LazyState:
    """How far a lazy restore is.

    ``state`` is ``starting``, ``running`` (pages are missing), ``recovering`` (the page server is
    being replaced), ``completed`` (the guest has all of its memory), ``failed`` or ``gone`` (QEMU has
    ended). ``pages_left`` counts pages with data that were not sent yet, None if that is not known;
    ``faults`` are the guest's requests for pages, ``fault_seconds`` their mean latency in the server.
    ``restarts`` counts replacements of the server, ``huge`` the bytes that were made huge pages.
    ``damages`` are pages that cannot be had, ``warnings`` sentences on what else went wrong, ``failure``
    is why it failed or ended.
    """

    state: str = "starting"
    loaded: bool = False
    pages_left: int | None = None
    faults: int = 0
    fault_seconds: float | None = None
    restarts: int = 0
    damages: tuple[Damage, ...] = ()
    warnings: tuple[str, ...] = ()
    huge: int = 0
    failure: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return what a line of the keeper says."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["damages"] = tuple(
            Damage(str(entry["block"]), int(entry["page"]), str(entry["why"]))
            for entry in values.get("damages", ())
        )
        known["warnings"] = tuple(map(str, values.get("warnings", ())))
        return cls(**known)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-compatible values."""
        return asdict(self)
