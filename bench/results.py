"""The measurements, and their comparison with the targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "GIB",
    "MIB",
    "OURS",
    "QEMU",
    "FIO",
    "LIBVIRT",
    "Results",
    "Sample",
    "Verdict",
    "table",
    "verdict_table",
]

MIB, GIB = 1 << 20, 1 << 30
OURS, QEMU, FIO, LIBVIRT = "pyqmigrate", "qemu", "fio", "libvirt"


@dataclass(frozen=True)
class Sample:
    """One run. ``seconds`` is wall time, ``cpu`` user and system time of the whole process (None:
    not known), ``facts`` other results worth keeping."""

    seconds: float
    cpu: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """One line of the table: ``measured`` against ``limit``, which it must not exceed (or, with
    ``at_least``, must reach)."""

    work: str
    measured: float
    limit: float
    unit: str = ""
    at_least: bool = False
    detail: str = ""

    @property
    def reached(self) -> bool:
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit


class Results:
    """All samples, by work (``save dense``), side and contender, in the order they were announced
    (:meth:`expect`) or first taken."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[tuple[str, str], list[Sample]]] = {}

    def expect(self, work: str, side: str, name: str) -> list[Sample]:
        return self.samples.setdefault(work, {}).setdefault((side, name), [])

    def add(self, work: str, side: str, name: str, sample: Sample) -> None:
        self.expect(work, side, name).append(sample)

    def drop_expected(self) -> None:
        """Forget who was announced and not measured."""
        for work, runs in list(self.samples.items()):
            self.samples[work] = {who: samples for who, samples in runs.items() if samples}

    def names(self, work: str, side: str) -> list[str]:
        """Who of ``side`` did ``work``."""
        return [name for s, name in self.samples.get(work, {}) if s == side]

    def of(self, work: str, side: str, name: str) -> list[Sample]:
        return self.samples[work][side, name]

    def median(self, work: str, side: str, name: str) -> float:
        """Median of the wall times."""
        return statistics.median(s.seconds for s in self.of(work, side, name))

    def cpu(self, work: str, side: str, name: str) -> float | None:
        """Median of the processor times."""
        known = [s.cpu for s in self.of(work, side, name) if s.cpu is not None]
        return statistics.median(known) if known else None

    def best(self, work: str, side: str, only: str = "") -> str | None:
        """Whose median is lowest among those of ``side`` with ``only`` in their name."""
        names = [name for name in self.names(work, side) if only in name]
        return min(names, key=lambda name: self.median(work, side, name), default=None)

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "work": work,
                "side": side,
                "name": name,
                "median_seconds": self.median(work, side, name),
                "median_cpu_seconds": self.cpu(work, side, name),
                "samples": [vars(sample) for sample in samples],
            }
            for work, runs in self.samples.items()
            for (side, name), samples in runs.items()
        ]

    def lines(self) -> list[list[str]]:
        """Every contender of every work: median, spread, processor time."""
        rows = []
        for work, runs in self.samples.items():
            for (side, name), samples in runs.items():
                seconds = [s.seconds for s in samples]
                cpu = self.cpu(work, side, name)
                rows.append(
                    [
                        work,
                        side,
                        name,
                        f"{statistics.median(seconds):.3f}",
                        f"{min(seconds):.3f}-{max(seconds):.3f}",
                        str(len(seconds)),
                        "" if cpu is None else f"{cpu:.3f}",
                    ]
                )
        return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """What was measured against each target."""
    rows = [
        [
            v.work,
            f"{v.measured:.3g}{v.unit and ' ' + v.unit}",
            f"{'>=' if v.at_least else '<='} {v.limit:g}{v.unit and ' ' + v.unit}",
            "reached" if v.reached else "MISSED",
            v.detail,
        ]
        for v in verdicts
    ]
    return table(["target", "measured", "wanted", "", "from"], rows)
