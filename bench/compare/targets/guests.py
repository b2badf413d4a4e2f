"""Targets of guests that run: live saves, increments, pools, lazy restores."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.compare.lazy import (
    AFTER_EXEC_WORK,
    BYTE_WORK,
    FIRST_RUN,
    LATENCY_WORK,
    PUSH_WORK,
    REMOTE,
    SECOND_RUN,
    WORKLOAD_WORK,
)
from bench.compare.live import (
    AGAIN,
    BACKGROUND_WORK,
    CLONES_WORK,
    CONVERGE_WORK,
    COST_WORK,
    INCREMENT_WORK,
    INSTANT,
    LINUX_WORK,
    PRECOPY_WORK,
    PRIVATE,
    RECORDED,
    STOPPED,
    UNRECORDED,
    WORKING_SET_WORK,
)
from bench.compare.pool import RESET_WORK, TAKE_WORK
from bench.compare.targets.ratios import fact, pause, ratio
from bench.results import MIB, OURS, Results, Verdict

__all__ = ["increments", "lazy", "live", "pool"]


def live(results: Results) -> Iterator[Verdict]:
    """The pause as the guest sees it; in the detail, what the report says of it."""
    if results.names(CONVERGE_WORK, OURS):
        yield pause(results, CONVERGE_WORK, "converge", 20)
        if results.of(CONVERGE_WORK, OURS, STOPPED):
            ours, theirs = (results.median(CONVERGE_WORK, OURS, n) for n in ("converge", STOPPED))
            yield ratio(f"{CONVERGE_WORK} / engine qemu, {STOPPED}", ours, theirs, 1.2)
    for name in results.names(BACKGROUND_WORK, OURS):
        private = name == PRIVATE
        yield pause(results, BACKGROUND_WORK, name, 100 if private else 150)
        if private:
            yield pause(results, BACKGROUND_WORK, name, 15, "pause_early")
        speed = fact(results, BACKGROUND_WORK, name, "speed")
        work = f"{BACKGROUND_WORK} ({name}), the guest's speed / before"
        yield Verdict(work, speed, 0.5, at_least=True)
    for name in results.names(PRECOPY_WORK, OURS):
        if STOPPED in name:
            continue
        gib = float(name.split()[0])
        yield pause(results, PRECOPY_WORK, name, 350 * gib / 4)
        plain = f"{name}, {STOPPED}"
        if results.names(PRECOPY_WORK, OURS).count(plain):
            ours, theirs = (results.median(PRECOPY_WORK, OURS, n) for n in (name, plain))
            yield ratio(f"{PRECOPY_WORK} ({name}) / {STOPPED}", ours, theirs, 1.25)
    for name in results.names(COST_WORK, OURS):
        speed = fact(results, COST_WORK, name, "speed")
        yield Verdict(f"{COST_WORK} ({name})", speed, 0.97, at_least=True)


def increments(results: Results) -> Iterator[Verdict]:
    for name in results.names(INCREMENT_WORK, OURS):
        longest, total = (20, 0.25) if name.startswith("40 ") else (150, 1.0)
        yield pause(results, INCREMENT_WORK, name, longest)
        seconds = results.median(INCREMENT_WORK, OURS, name)
        yield Verdict(f"{INCREMENT_WORK} ({name}), with fsync", seconds, total, "s")
        changed = fact(results, INCREMENT_WORK, name, "working_set")
        size = fact(results, INCREMENT_WORK, name, "allocated_bytes")
        yield Verdict(
            f"{INCREMENT_WORK} ({name}), the file", size / MIB, changed / MIB * 1.05 + 2, "MiB"
        )
    for name in results.names(LINUX_WORK, OURS):
        yield pause(results, LINUX_WORK, name, 10)
        size = fact(results, LINUX_WORK, name, "allocated_bytes")
        yield Verdict(f"{LINUX_WORK} ({name}), the file", size / MIB, 4, "MiB")
    for name in results.names(AGAIN, OURS):
        if name.startswith(INSTANT):
            continue
        plain = f"{INSTANT}, {name.partition(', ')[2]}"
        ours, theirs = (results.median(AGAIN, OURS, n) * 1000 for n in (name, plain))
        yield Verdict(
            f"{AGAIN} ({name}), beyond {INSTANT}",
            ours - theirs,
            60 if "of 40 MiB" in name else 400,
            "ms",
            detail=f"{ours:.0f} ms against {theirs:.0f} ms",
        )
    for name in results.names(CLONES_WORK, OURS):
        memory, whole, base, changed = (
            fact(results, CLONES_WORK, name, what) / MIB
            for what in ("memory_pss", "process_pss", "base_bytes", "changed_bytes")
        )
        yield Verdict(
            f"{CLONES_WORK} ({name}), PSS of their memory",
            memory,
            base + 1.2 * changed,
            "MiB",
            detail=f"base {base:.0f}, changed {changed:.0f}; of the whole processes {whole:.0f}",
        )
    if results.names(WORKING_SET_WORK, OURS):
        ours, theirs = (
            results.median(WORKING_SET_WORK, OURS, name) for name in (RECORDED, UNRECORDED)
        )
        yield ratio(f"{WORKING_SET_WORK}: {RECORDED} / {UNRECORDED}", ours, theirs, 0.4)


def pool(results: Results) -> Iterator[Verdict]:
    for name in results.names(TAKE_WORK, OURS):
        samples = [sample.seconds * 1000 for sample in results.of(TAKE_WORK, OURS, name)]
        detail = f"{min(samples):.1f} to {max(samples):.1f}"
        yield Verdict(f"{TAKE_WORK}, {name}", statistics.median(samples), 10, "ms", detail=detail)
    for name in results.names(RESET_WORK, OURS):
        speed = 1 / results.median(RESET_WORK, OURS, name)
        yield Verdict(f"{RESET_WORK}, {name}", speed, 20, "a second", at_least=True)
        cpu = results.cpu(RESET_WORK, OURS, name)
        if cpu:
            yield Verdict(
                f"{RESET_WORK}, {name}, by processor time of two cores",
                2 / cpu,
                20,
                "a second",
                at_least=True,
            )


def lazy(results: Results) -> Iterator[Verdict]:
    for name in results.names(BYTE_WORK, OURS):
        if name.startswith("lazy") and name != REMOTE:
            seconds = results.median(BYTE_WORK, OURS, name)
            others = ", ".join(
                f"{mode} {results.median(BYTE_WORK, OURS, other) * 1e3:.0f} ms"
                for mode in ("instant", "load")
                if (other := name.replace("lazy", mode)) in results.names(BYTE_WORK, OURS)
            )
            yield Verdict(f"{BYTE_WORK} ({name})", seconds * 1e3, 10, "ms", detail=others)
    if REMOTE in results.names(AFTER_EXEC_WORK, OURS):
        seconds = results.median(AFTER_EXEC_WORK, OURS, REMOTE)
        yield Verdict(f"{AFTER_EXEC_WORK} ({REMOTE})", seconds * 1e3, 150, "ms")
    if SECOND_RUN in results.names(WORKLOAD_WORK, OURS):
        first, second = (
            results.median(WORKLOAD_WORK, OURS, run) for run in (FIRST_RUN, SECOND_RUN)
        )
        detail = f"{first:.2f} s, then {second:.2f} s"
        yield Verdict(WORKLOAD_WORK, first / second, 4, at_least=True, detail=detail)
    for name in results.names(PUSH_WORK, OURS):
        samples = results.of(PUSH_WORK, OURS, name)
        for what, limit, unit in (("gib_a_second", 0.9, "GiB/s"), ("cpu_a_gib", 0.5, "s/GiB")):
            measured = statistics.median(sample.facts[what] for sample in samples)
            faster = what == "gib_a_second"
            yield Verdict(f"{PUSH_WORK}, {what}", measured, limit, unit, at_least=faster)
    for name in results.names(LATENCY_WORK, OURS):
        yield Verdict(LATENCY_WORK, results.median(LATENCY_WORK, OURS, name) * 1e6, 30, "us")
