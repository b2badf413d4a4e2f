"""What is known of a live method before a save: why it is not possible, and how long it pauses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import UsageError
from pyqmigrate.io.place import absolute
from pyqmigrate.io.view import BASE_INSTEAD, refuse_stored
from pyqmigrate.vm.guest.inspect import GuestInfo

__all__ = [
    "METHODS",
    "Instant",
    "LiveMethod",
    "LiveOption",
    "LiveRequest",
    "check_live",
    "disks_pause",
]

_DISK_PAUSE = 0.015  # seconds, to switch one to its overlay, which was created before
_LONGEST_PAUSE = 2000.0  # seconds; the largest downtime-limit that QEMU accepts


class LiveMethod(StrEnum):
    """How a guest is saved while it runs."""

    CONVERGE = "converge"
    """QEMU writes pages, and those that change again, until the rest fits into the pause."""
    BACKGROUND = "background"
    """QEMU write-protects the memory and writes each page before the guest changes it."""
    PRECOPY = "precopy"
    """Pages are copied with digests; those that differ in the pause are copied again."""
    CHANGED = "changed"
    """Only the pages that changed since the guest was restored are copied, in the pause."""

    @property
    def instant(self) -> Instant:
        """The instant of the save whose state the file holds."""
        return Instant.START if self is LiveMethod.BACKGROUND else Instant.END


class Instant(StrEnum):
    """The instant of a save whose state the file holds."""

    START = "start"
    END = "end"


METHODS = tuple(LiveMethod)


@dataclass(frozen=True, kw_only=True)
class LiveRequest:
    """What was requested of a live save.

    ``engine`` is "auto" or an engine, ``methods`` are those allowed. ``max_pause`` is in seconds,
    None without a promise. ``base`` is None, "auto" or the absolute path of a snapshot; ``full``: a
    complete file is written although there is a base. ``keep_digests``: digests of the pages are
    kept beside the snapshot. ``with_disks``: snapshots of the disks are taken in the pause.
    """

    engine: str = "auto"
    methods: tuple[LiveMethod, ...] = METHODS
    max_pause: float | None = None
    base: str | None = None
    full: bool = False
    keep_digests: bool = False
    with_disks: bool = False

    @property
    def needs_digests_or_base(self) -> bool:
        """Whether a live method is needed for what is written, even if the guest does not run."""
        return self.base is not None or self.keep_digests


@dataclass(frozen=True)
class LiveOption:
    """One method for one guest.

    ``reasons`` say why it is not possible; none if it may be. ``expected_pause`` is the longest
    time, in seconds, that the guest is expected to stand still; None if unknown. ``basis`` says,
    in a sentence, what that rests on.
    """

    method: LiveMethod
    reasons: tuple[str, ...] = ()
    expected_pause: float | None = None
    basis: str = ""

    @property
    def possible(self) -> bool:
        return not self.reasons


def check_live(
    *,
    engine: str = "auto",
    live: bool | LiveMethod | str = False,
    max_pause: float | None = None,
    base: str | os.PathLike[str] | None = None,
    full: bool = False,
    keep_digests: bool = False,
    with_disks: bool = False,
) -> LiveRequest | None:
    """Return what a caller requests of a live save; None if the guest is to be stopped for it.

    Raises UsageError for values that are invalid or do not go together.
    """
    method = None if isinstance(live, bool) else parse_enum(LiveMethod, live, "live")
    if full and base is None:
        raise UsageError("full needs a base: what changed is added to a copy of that")
    requested = live is not False or base is not None or keep_digests
    if max_pause is not None:
        if not requested:
            raise UsageError("max_pause is for live saves")
        if not 0 < max_pause <= _LONGEST_PAUSE:
            raise UsageError(
                f"max_pause must be more than 0 and at most {_LONGEST_PAUSE:g} s, not {max_pause!r}"
            )
    if not requested:
        return None
    return LiveRequest(
        engine=engine,
        methods=METHODS if method is None else (method,),
        max_pause=max_pause,
        base=None if base is None else _base(base),
        full=full,
        keep_digests=keep_digests,
        with_disks=with_disks,
    )


def disks_pause(guest: GuestInfo, with_disks: bool) -> float:
    """Return how long, in seconds, snapshots of the writable disks are expected to take in the
    pause: QEMU flushes the disks and opens the overlays then."""
    return sum(disk.writable for disk in guest.disks) * _DISK_PAUSE if with_disks else 0.0


def _base(base: str | os.PathLike[str]) -> str:
    text = os.fspath(base)
    refuse_stored(text, "be the base of a save", BASE_INSTEAD)
    return text if text == "auto" else os.fspath(absolute(text))
