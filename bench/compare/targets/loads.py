"""Targets of loads, restores and verification."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.compare.seal import CACHED, COLD, PLAIN, SEALED, seal_work
from bench.compare.targets.ratios import rate, ratio
from bench.compare.vm import (
    INSTANT_WORK,
    MEMFD_FULL,
    MEMFD_WIDE,
    MEMFD_WORK,
    RESTORE_WORK,
    SERIAL_WORK,
)
from bench.results import FIO, MIB, OURS, QEMU, Results, Verdict
from tests.harness.contents import Contents

__all__ = ["loads", "restores", "seals"]


def loads(results: Results) -> Iterator[Verdict]:
    """Into a file of shared memory, and into anonymous memory: each against QEMU doing the same,
    with the default of two channels and with the best count."""
    for contents in (Contents.DENSE, Contents.RUNS):
        work = f"load {contents}"
        for kind in ("shared file", "anonymous"):
            names = [name for name in results.names(work, OURS) if name.startswith(kind)]
            names = [name for name in names if "clear" not in name]  # QEMU has no such choice
            theirs = results.best(work, QEMU, kind)
            if not names:
                continue
            best = min(names, key=lambda name: results.median(work, OURS, name))
            for name in dict.fromkeys((names[0], best)):
                ours = results.median(work, OURS, name)
                if theirs:
                    time = results.median(work, QEMU, theirs)
                    yield ratio(f"{work} ({name}) / QEMU's best", ours, time, 0.95, theirs)
                if fio := results.best(work, FIO):
                    rate = results.of(work, OURS, name)[0].facts["data_bytes"] / ours
                    peer = results.of(work, FIO, fio)[0].facts["data_bytes"]
                    peer /= results.median(work, FIO, fio)
                    yield Verdict(
                        f"{work} ({name}), rate / fio's",
                        rate / peer,
                        0.9,
                        at_least=True,
                        detail=f"{rate / MIB:.0f} MiB/s against {peer / MIB:.0f} MiB/s ({fio})",
                    )


def restores(results: Results) -> Iterator[Verdict]:
    for name in results.names(INSTANT_WORK, OURS):
        median = results.median(INSTANT_WORK, OURS, name)
        yield Verdict(f"{INSTANT_WORK}, {name}", median * 1000, 30, "ms")
    for name in results.names(SERIAL_WORK, OURS):
        if fresh := results.best(SERIAL_WORK, QEMU):
            ours = results.median(SERIAL_WORK, OURS, name)
            theirs = results.median(SERIAL_WORK, QEMU, fresh)
            yield Verdict(
                f"{SERIAL_WORK} ({name}), more than fresh",
                (ours - theirs) * 1000,
                60,
                "ms",
                detail=f"{ours * 1000:.0f} ms against {theirs * 1000:.0f} ms",
            )
    if results.names(MEMFD_WORK, OURS):
        wide, full = (results.median(MEMFD_WORK, OURS, n) for n in (MEMFD_WIDE, MEMFD_FULL))
        yield ratio(f"{MEMFD_WORK}: {MEMFD_WIDE} / {MEMFD_FULL}", wide, full, 1.3)
    for name in results.names(RESTORE_WORK, OURS):
        if best := results.best(RESTORE_WORK, QEMU):
            ours = results.median(RESTORE_WORK, OURS, name)
            theirs = results.median(RESTORE_WORK, QEMU, best)
            yield ratio(f"{RESTORE_WORK} ({name}) / QEMU's best", ours, theirs, 1.0, best)


def seals(results: Results) -> Iterator[Verdict]:
    for contents in Contents:
        work = seal_work(contents)
        if results.names(work, OURS):
            plain, sealed = (results.median(work, OURS, name) for name in (PLAIN, SEALED))
            yield ratio(f"save {contents} with a seal / without", sealed, plain, 1.05)
    for name in results.names(COLD, OURS):
        if fio := results.best(COLD, FIO):
            ours, theirs = rate(results, COLD, OURS, name), rate(results, COLD, FIO, fio)
            yield Verdict(
                f"{COLD} ({name}), rate / fio's",
                ours / theirs,
                0.9,
                at_least=True,
                detail=f"{ours / MIB:.0f} MiB/s against {theirs / MIB:.0f} MiB/s ({fio})",
            )
    for name in results.names(CACHED, OURS):
        wall = rate(results, CACHED, OURS, name) / 1e9
        spent = statistics.median(
            s.facts["data_bytes"] / s.cpu / 1e9 for s in results.of(CACHED, OURS, name) if s.cpu
        )
        yield Verdict(
            f"{CACHED}, a core", spent, 4.0, "GB/s", at_least=True, detail=f"{wall:.1f} by the wall"
        )
