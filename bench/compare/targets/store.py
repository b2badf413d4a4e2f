"""Targets of the store."""

from __future__ import annotations

from collections.abc import Iterator

from bench.compare.store import (
    ADD_WORK,
    COPY,
    COPY_ALONE,
    COPY_WORK,
    DIFF_WORK,
    FAULT_WORK,
    FIRST,
    FLEET_WORK,
    LATER,
    MOUNTED,
    WALK_WORK,
)
from bench.compare.store import PLAIN as PLAIN_FILE
from bench.compare.store_restores import (
    FIRST_BYTE_WORK,
    FROM_PLAIN,
    FROM_REMOTE_SET,
    FROM_STORE,
    FROM_STORE_SET,
)
from bench.compare.targets.ratios import fact, ratio
from bench.results import GIB, MIB, OURS, Results, Verdict

__all__ = ["store"]


def store(results: Results) -> Iterator[Verdict]:
    for name in results.names(ADD_WORK, OURS):
        limit = {FIRST: 1.5, LATER: 0.3}.get(name.partition(",")[0])
        if limit is not None:
            yield Verdict(f"{ADD_WORK}, {name}", results.median(ADD_WORK, OURS, name), limit, "s")
    if results.names(COPY_WORK, COPY):
        ours, theirs = (results.median(COPY_WORK, who, "1 file") for who in (OURS, COPY))
        yield ratio(f"{COPY_WORK} / {COPY} of the plain file", ours, theirs, 2.0)
        alone = results.median(COPY_WORK, COPY_ALONE, "1 file")
        yield ratio(f"{COPY_WORK} / {COPY_ALONE} of it, which is not synced", ours, alone, 2.0)
    if results.names(WALK_WORK, OURS):
        ours, theirs = (
            results.of(WALK_WORK, OURS, name)[0].facts["bytes"]
            / results.median(WALK_WORK, OURS, name)
            / MIB
            for name in (MOUNTED, PLAIN_FILE)
        )
        yield Verdict(f"{WALK_WORK} ({MOUNTED})", ours, 500, "MiB/s", at_least=True)
        yield Verdict(
            f"{WALK_WORK} ({MOUNTED}), rate / {PLAIN_FILE}'s", ours / theirs, 0.8, at_least=True
        )
        ours, theirs = (
            results.of(FAULT_WORK, OURS, name)[0].facts["bytes"]
            / 4096
            / results.median(FAULT_WORK, OURS, name)
            for name in (MOUNTED, PLAIN_FILE)
        )
        yield Verdict(
            f"{FAULT_WORK} ({MOUNTED})",
            ours,
            10_000,
            "a second",
            at_least=True,
            detail=f"plain file {theirs:.0f}",
        )
    for name in results.names(DIFF_WORK, OURS):
        size = results.of(DIFF_WORK, OURS, name)[0].facts["bytes"]
        seconds = results.median(DIFF_WORK, OURS, name) * GIB / size
        yield Verdict(f"{DIFF_WORK}, {name}", seconds, 0.4, "s a GiB")
    if results.names(FIRST_BYTE_WORK, OURS):
        yield from _first_bytes(results)
    for name in results.names(FLEET_WORK, OURS):
        seconds = results.median(FLEET_WORK, OURS, name)
        if name == FIRST:
            yield Verdict(f"{FLEET_WORK}, each", seconds / 200 * 1000, 40, "ms")
        else:
            yield Verdict(f"{FLEET_WORK}, second run in all", seconds, 0.2, "s")


def _first_bytes(results: Results) -> Iterator[Verdict]:
    for name, than, limit in (
        (FROM_STORE, FROM_PLAIN, 0.4),
        (FROM_STORE_SET, FROM_PLAIN, 0.15),
        (FROM_REMOTE_SET, FROM_STORE_SET, 0.3),
    ):
        found, base = (results.median(FIRST_BYTE_WORK, OURS, who) for who in (name, than))
        yield Verdict(
            f"{FIRST_BYTE_WORK}: {name} - {than}",
            found - base,
            limit,
            "s",
            detail=f"{found:.2f} and {base:.2f}",
        )
    demanded = fact(results, FIRST_BYTE_WORK, FROM_REMOTE_SET, "fetched_on_demand")
    yield Verdict(f"{FIRST_BYTE_WORK}: {FROM_REMOTE_SET}, requests on demand", demanded, 5)
