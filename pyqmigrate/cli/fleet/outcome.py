"""Run a verb of ``fleet``, and its outcome."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, counted, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.errors import UsageError
from pyqmigrate.fleet.listing import list_targets
from pyqmigrate.fleet.result import Result, Verdict
from pyqmigrate.fleet.running import FleetReport, run
from pyqmigrate.fleet.work import Work

__all__ = ["Lines", "result_data", "run_fleet", "trouble", "when"]

Lines = Callable[[Sequence[Result]], Iterable[str]]


def run_fleet(args: argparse.Namespace, work: Work, lines: Lines | None = None) -> Outcome:
    """Do the work with the given targets. ``lines`` describes the results of snapshots that are
    good, for people; without it these are only counted."""
    if args.again and args.table is None:
        raise UsageError("--again is about the results in a table: give --table FILE")
    listing = list_targets(args.target)
    with shown(f"fleet {work.verb}") as show:
        report = run(
            work,
            listing.targets,
            jobs=args.jobs,
            scheduler=args.scheduler,
            table=args.table,
            again=args.again,
            progress=show,
        )
    results = sorted((*report.results, *listing.skipped), key=lambda result: result.name)
    counts = {verdict: sum(r.verdict is verdict for r in results) for verdict in Verdict}
    data: dict[str, Any] = {
        "verb": str(work.verb),
        "table": args.table,
        **{f"{verdict}_count": count for verdict, count in counts.items()},
        "done_before": report.done_before,
        "seconds": report.seconds,
        "results": [result_data(result) for result in results],
    }
    good = report.of(Verdict.GOOD)
    text = [*(lines(good) if lines is not None else ()), *trouble(results)]
    return Outcome(data, [*text, _summary(report, counts)], _code(counts))


def result_data(result: Result) -> dict[str, Any]:
    """Return the values of one result for JSON."""
    return {
        "name": result.name,
        "identity": result.identity,
        "verdict": str(result.verdict),
        "message": result.message,
        "seconds": result.seconds,
        "finished": result.finished,
        "dask_worker": result.worker or None,
        "found": dict(result.data),
    }


def trouble(results: Iterable[Result]) -> Iterator[str]:
    """Yield a line for each result that is not good."""
    for result in results:
        if result.verdict is not Verdict.GOOD:
            yield f"{result.verdict:<9} {printable(result.name)}: {printable(result.message)}"


def when(seconds: float) -> str:
    """Return a time of 1970 seconds as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def _summary(report: FleetReport, counts: dict[Verdict, int]) -> str:
    snapshots = sum(counts.values()) - counts[Verdict.SKIPPED]
    parts = [f"{counts[Verdict.GOOD]} good"]
    parts += [
        f"{counts[verdict]} {verdict}"
        for verdict in (Verdict.DAMAGED, Verdict.FAILED)
        if counts[verdict]
    ]
    if counts[Verdict.SKIPPED]:
        parts.append(f"{counted(counts[Verdict.SKIPPED], 'other file')} skipped")
    if report.done_before:
        parts.append(f"{report.done_before} done before")
    return f"{counted(snapshots, 'snapshot')}: {', '.join(parts)}; {report.seconds:.2f} s"


def _code(counts: dict[Verdict, int]) -> ExitCode:
    if counts[Verdict.DAMAGED]:
        return ExitCode.BAD
    return ExitCode.REFUSED if counts[Verdict.FAILED] else ExitCode.DONE
