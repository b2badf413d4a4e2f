"""Run a verb on many snapshots.

    listing = list_targets(["/snap", "s3://bucket/saves/"])
    report = run(Work(Verb.VERIFY), listing.targets, table="results.db")
    for result in report.damaged:
        print(result.name, result.message)

With a table, a second run does only what is missing or changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import UsageError
from pyqmigrate.fleet.result import Result, Verdict
from pyqmigrate.fleet.table import Known, ResultTable
from pyqmigrate.fleet.target import Kind, Target, file_identity
from pyqmigrate.fleet.threads import perform_on_threads
from pyqmigrate.fleet.work import Verb, Work
from pyqmigrate.io.job import Progress
from pyqmigrate.io.place import absolute

__all__ = ["FleetReport", "run"]

_JOBS_MAX = 255


@dataclass(frozen=True)
class FleetReport:
    """What came of a run: ``results`` by name, of which ``done_before`` were in the table already.
    ``seconds`` is how long the run took."""

    work: Work
    results: tuple[Result, ...]
    done_before: int
    seconds: float

    def of(self, verdict: Verdict) -> tuple[Result, ...]:
        """Return the results with this verdict."""
        return tuple(result for result in self.results if result.verdict is verdict)

    @property
    def damaged(self) -> tuple[Result, ...]:
        """The snapshots that are damaged."""
        return self.of(Verdict.DAMAGED)

    @property
    def failed(self) -> tuple[Result, ...]:
        """The snapshots that the verb could not be done with."""
        return self.of(Verdict.FAILED)


def run(
    work: Work,
    targets: Iterable[Target],
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    table: str | os.PathLike[str] | None = None,
    again: bool = False,
    found: Callable[[Result], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> FleetReport:
    """Do the work with every target, and wait.

    jobs: threads, 1 to 255; by default as many as this process has processors, and one for ``add``,
        because snapshots that are added at the same time do not share their new pages.
    scheduler: the address of a Dask scheduler, whose workers do the work instead.
    table: a file that keeps the results; those that it has of the same content are not made again,
        except those of Verdict.FAILED.
    again: whether they are made again.
    found: called on this thread with each result of this run.
    progress: called on this thread at most ten times a second, with the bytes of whole snapshots.

    If one of these raises, or a signal does, running tasks are cancelled, and the table keeps what
    was found. Raises UsageError, NotSupported, TargetError of the table and the scheduler; what is
    wrong with a snapshot is in its result.
    """
    started = time.monotonic()
    check_callback("found", found)
    check_callback("progress", progress)
    check("scheduler", scheduler, str, type(None))
    own = _files_of(table)
    given = sorted((t for t in targets if t.name not in own), key=lambda target: target.name)
    _check(work, given, jobs, scheduler)
    results: list[Result] = []
    with ExitStack() as stack:
        kept = None if table is None else stack.enter_context(ResultTable(table))
        waiting = given
        if kept is not None and not again:
            waiting = _missing(given, kept.known(work))
            missing = {target.name for target in waiting}
            before = {target.name for target in given} - missing
            results += kept.results(work, before) if before else ()
        done_before = len(results)
        follow = _Progress(waiting, progress)
        if waiting:
            made = stack.enter_context(closing(_perform(work, waiting, jobs, scheduler)))
            for result in made:
                if result is not None:
                    results.append(result)
                    if kept is not None:
                        kept.keep(work, result)
                    if found is not None:
                        found(result)
                elif kept is not None:
                    kept.commit_soon()
                follow.show(result)
    results.sort(key=lambda result: result.name)
    return FleetReport(work, tuple(results), done_before, time.monotonic() - started)


def _check(work: Work, targets: Sequence[Target], jobs: int | None, scheduler: str | None) -> None:
    """Raise UsageError for what cannot be done, before anything is."""
    check("jobs", jobs, int, type(None))
    if jobs is not None and not 1 <= jobs <= _JOBS_MAX:
        raise UsageError(f"jobs must be a number from 1 to {_JOBS_MAX}, not {jobs}")
    if jobs is not None and scheduler is not None:
        raise UsageError("jobs are threads of this machine: leave them out with a scheduler")
    if work.verb is Verb.ADD:
        _check_added(work, targets)
    if work.verb is Verb.SEAL:
        for target in targets:
            if target.kind is Kind.OBJECT:
                raise UsageError(
                    f"{target.name!r} is an object, and a seal is written beside a local file: seal "
                    "it before it is uploaded"
                )
            if target.kind is Kind.STORED:
                raise UsageError(f"{target.name!r} has a seal, as every stored snapshot")


def _check_added(work: Work, targets: Sequence[Target]) -> None:
    from pyqmigrate.fleet.storing import stored_name

    if not work.store:
        raise UsageError("add needs a store")
    names: dict[str, str] = {}
    for target in targets:
        if target.kind is Kind.STORED:
            raise UsageError(
                f"{target.name!r} is in a store: pyqmigrate store copy copies it into another one"
            )
        other = names.setdefault(stored_name(target), target.name)
        if other != target.name:
            raise UsageError(
                f"{other!r} and {target.name!r} would both be stored as {stored_name(target)!r}: name "
                "a directory above both, and their names contain the path below it"
            )


def _files_of(table: str | os.PathLike[str] | None) -> set[str]:
    """Return the paths of the table and of the files that SQLite makes beside it, which may be in a
    directory that is looked through."""
    if table is None:
        return set()
    return {f"{absolute(table)}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")}


def _missing(targets: Sequence[Target], known: Mapping[str, Known]) -> list[Target]:
    """Return the targets that the table does not have a result of, or one of other content."""
    identities: dict[str, str | None] = {}

    def same(path: str, identity: str) -> bool:
        if path not in identities:
            try:
                identities[path] = file_identity(path)
            except OSError:
                identities[path] = None
        return identities[path] == identity

    return [
        target
        for target in targets
        if (row := known.get(target.name)) is None
        or row.identity != target.identity
        or not all(same(*item) for item in row.depends.items())
    ]


def _perform(
    work: Work, targets: Sequence[Target], jobs: int | None, scheduler: str | None
) -> Generator[Result | None, None, None]:
    if scheduler is not None:
        from pyqmigrate.fleet.scheduler import perform_on_workers

        return perform_on_workers(work, targets, scheduler)
    if jobs is None:
        jobs = 1 if work.verb is Verb.ADD else len(os.sched_getaffinity(0))
    return perform_on_threads(work, targets, min(jobs, len(targets)))


class _Progress:
    """The progress of a run, by the sizes of its targets."""

    def __init__(
        self, targets: Sequence[Target], show: Callable[[Progress], object] | None
    ) -> None:
        self._show = show
        self._sizes = {target.name: max(target.size, 1) for target in targets}
        self._total = sum(self._sizes.values())
        self._done = 0
        self._started = time.monotonic()
        self._shown = self._started

    def show(self, result: Result | None) -> None:
        if result is not None:
            self._done += self._sizes[result.name]
        now = time.monotonic()
        if self._show is None or (now - self._shown < 0.1 and self._done < self._total):
            return
        self._shown = now
        seconds = now - self._started
        rate = self._done / seconds if seconds else 0.0
        self._show(Progress(self._done, self._total, 0, 0, self._done, seconds, rate))
