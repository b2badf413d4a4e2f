"""Targets of other file systems, and what was measured of many channels and of large guests."""

from __future__ import annotations

from collections.abc import Iterator

from bench.compare.growth import GROWTH_WORK
from bench.compare.mounted import KINDS
from bench.compare.scale import CHANNELS_WORK, file_system_work
from bench.compare.targets.ratios import rate, ratio
from bench.results import FIO, OURS, QEMU, Results, Verdict
from tests.harness.contents import Contents

__all__ = ["channels", "file_systems", "growth"]


def file_systems(results: Results) -> Iterator[Verdict]:
    """The same limits on each: those of the main table."""
    for kind in KINDS:
        for contents, limit in ((Contents.DENSE, 0.95), (Contents.RUNS, 0.8)):
            work = file_system_work(kind, contents)
            for memory in results.names(work, OURS):
                ours, label = results.median(work, OURS, memory), f"{work} ({memory})"
                if best := results.best(work, QEMU):
                    theirs = results.median(work, QEMU, best)
                    yield ratio(f"{label} / QEMU's best", ours, theirs, limit, best)
                if "defaults" in results.names(work, QEMU):
                    theirs = results.median(work, QEMU, "defaults")
                    yield ratio(f"{label} / QEMU's defaults", ours, theirs, 1.0)
                if fio := results.best(work, FIO):
                    yield ratio(f"{label} / fio", ours, results.median(work, FIO, fio), 1.05, fio)


def channels(results: Results) -> Iterator[Verdict]:
    """More channels than processors must not cost much."""
    for work in CHANNELS_WORK.values():
        best, most = results.best(work, OURS), "32 channels"
        if best is None:
            continue
        quick, many = (rate(results, work, OURS, name) / 1e9 for name in (best, most))
        detail = f"{many:.2f} against {quick:.2f} GB/s ({best})"
        yield Verdict(f"{work}, {most} / best", many / quick, 0.8, at_least=True, detail=detail)


def growth(results: Results) -> Iterator[Verdict]:
    """1 TiB against 1 GiB with the same data."""
    for name in results.names(GROWTH_WORK, OURS):
        step, _, size = name.partition(", ")
        if size == "1024 GiB":
            base = results.median(GROWTH_WORK, OURS, f"{step}, 1 GiB")
            more = results.median(GROWTH_WORK, OURS, name) - base
            yield Verdict(f"{step} of 1 TiB, more than of 1 GiB", more, 1.0, "s")
