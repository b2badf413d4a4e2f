"""The targets, compared with what was measured."""

from __future__ import annotations

from bench.compare.targets.guests import increments, lazy, live, pool
from bench.compare.targets.loads import loads, restores, seals
from bench.compare.targets.saves import page_cache, processor, python, saves, scan, sparse, tebibyte
from bench.compare.targets.scale import channels, file_systems, growth
from bench.compare.targets.store import store
from bench.results import Results, Verdict

__all__ = ["verdicts"]


def verdicts(results: Results) -> list[Verdict]:
    """One for every target whose work was measured, with the peers that were there."""
    rows = (
        scan,
        saves,
        processor,
        loads,
        sparse,
        tebibyte,
        python,
        page_cache,
        seals,
        restores,
        live,
        increments,
        pool,
        lazy,
        store,
        channels,
        file_systems,
        growth,
    )
    return [verdict for row in rows for verdict in row(results)]
