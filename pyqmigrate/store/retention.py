"""Which snapshots to keep: ``7d/4w/12m``, as restic and borg understand it.

``7d`` keeps the newest snapshot of each of the last seven days that have any; ``w`` is for weeks (from
Monday), ``m`` for months, ``y`` for years, ``h`` for hours, in the local time zone. A snapshot is kept if
one of the rules keeps it. The time of a snapshot is when its file was saved.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime

from pyqmigrate.errors import UsageError

__all__ = ["Dated", "Retention"]

_RULE = re.compile(r"([1-9][0-9]{0,5})([hdwmy])")


@dataclass(frozen=True)
class Dated:
    """A snapshot: ``group`` is what rules are applied to apart, such as its guest; ``time_ns`` in
    nanoseconds since 1970."""

    name: str
    group: Hashable
    time_ns: int


@dataclass(frozen=True)
class Retention:
    """Numbers by unit, in the order in which they were given."""

    rules: tuple[tuple[int, str], ...]

    @classmethod
    def parse(cls, text: str) -> Retention:
        """Read ``7d/4w/12m``. Raises UsageError."""
        rules: list[tuple[int, str]] = []
        for word in text.split("/"):
            found = _RULE.fullmatch(word)
            if found is None or found[2] in {unit for _, unit in rules}:
                raise UsageError(
                    f"{text!r} does not say what to keep: numbers of h, d, w, m or y, each once, such "
                    "as 7d/4w/12m"
                )
            rules.append((int(found[1]), found[2]))
        return cls(tuple(rules))

    def kept(self, snapshots: Iterable[Dated]) -> set[str]:
        """Return the names of the snapshots that are kept."""
        groups: dict[Hashable, list[Dated]] = {}
        for snapshot in snapshots:
            groups.setdefault(snapshot.group, []).append(snapshot)
        names: set[str] = set()
        for group in groups.values():
            group.sort(key=lambda snapshot: (snapshot.time_ns, snapshot.name), reverse=True)
            for number, unit in self.rules:
                newest: dict[Hashable, str] = {}
                for snapshot in group:
                    newest.setdefault(_period(snapshot.time_ns, unit), snapshot.name)
                names.update(list(newest.values())[:number])
        return names


def _period(time_ns: int, unit: str) -> Hashable:
    try:
        when = datetime.fromtimestamp(time_ns // 10**9).astimezone()
    except (ValueError, OverflowError, OSError):  # a time that no calendar has
        return time_ns
    if unit == "w":
        return when.isocalendar()[:2]
    parts = (when.year, when.month, when.day, when.hour, when.utcoffset())
    return parts[: {"y": 1, "m": 2, "d": 3, "h": 5}[unit]]
