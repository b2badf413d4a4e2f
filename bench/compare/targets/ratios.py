"""What most targets are made of: a ratio, a rate, a pause, a fact."""

from __future__ import annotations

import statistics

from bench.results import OURS, Results, Verdict

__all__ = ["fact", "pause", "rate", "ratio"]


def ratio(work: str, ours: float, theirs: float, limit: float, who: str = "") -> Verdict:
    detail = f"{ours:.3f} s against {theirs:.3f} s" + (f" ({who})" if who else "")
    return Verdict(work, ours / theirs, limit, detail=detail)


def rate(results: Results, work: str, side: str, name: str) -> float:
    """Bytes of data a second, by the median time."""
    data: float = results.of(work, side, name)[0].facts["data_bytes"]
    return data / results.median(work, side, name)


def pause(results: Results, work: str, name: str, limit: float, fact: str = "pause") -> Verdict:
    """In ms; ``fact`` says which of its pauses."""
    samples = [s.facts for s in results.of(work, OURS, name)]
    pauses = [facts[fact] * 1000 for facts in samples]
    reported = [f["downtime_reported"] * 1000 for f in samples if f["downtime_reported"]]
    detail = f"{min(pauses):.1f} to {max(pauses):.1f}"
    if reported:
        detail += f"; reported {statistics.median(reported):.1f}"
    where = "at the start" if fact == "pause_early" else "pause"
    return Verdict(
        f"{work} ({name}), {where}", statistics.median(pauses), limit, "ms", detail=detail
    )


def fact(results: Results, work: str, name: str, fact: str) -> float:
    """The median of a fact."""
    return statistics.median(float(sample.facts[fact]) for sample in results.of(work, OURS, name))
