"""The task of a fleet run: one verb on one snapshot. It runs in a thread, or on a Dask worker.

A task has a result whatever happens, unless the run is to end: one snapshot, however damaged, does
not keep the others from being worked on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

from pyqmigrate.errors import Cancelled, PyqmigrateError, SnapshotError, UsageError
from pyqmigrate.fleet.finding import Finding
from pyqmigrate.fleet.result import Result, Verdict
from pyqmigrate.fleet.target import Kind, Target, file_identity
from pyqmigrate.fleet.work import Verb, Work

__all__ = ["perform", "perform_travelling"]


def perform(work: Work, target: Target, stop: Callable[[], bool] = lambda: False) -> Result:
    """Do the work with one snapshot and return what came of it.

    stop: polled at least every 8 MiB. Raises Cancelled after it has returned True, and nothing else.
    """

    def poll() -> None:
        if stop():
            raise Cancelled("cancelled")

    started = time.monotonic()
    try:
        finding = _perform(work, target, poll)
    except Cancelled:
        raise
    except SnapshotError as error:
        finding = Finding(Verdict.DAMAGED, str(error))
    except (PyqmigrateError, OSError, MemoryError) as error:
        finding = Finding(Verdict.FAILED, _sentence(error))
    except Exception as error:  # a bug must not end the whole run
        finding = Finding(Verdict.FAILED, f"unexpected {type(error).__name__}: {error}")
    return Result(
        target.name,
        _identity_after(work, target),
        finding.verdict,
        finding.message,
        finding.data,
        finding.depends,
        time.monotonic() - started,
        time.time(),
    )


def perform_travelling(text: str) -> str:
    """Do the work that ``text`` describes, JSON of ``work`` and ``target``; return JSON of the
    result. This is what Dask workers run."""
    from distributed import get_worker

    given = json.loads(text)
    result = perform(Work.from_json(given["work"]), Target.from_json(given["target"]))
    return json.dumps(replace(result, worker=str(get_worker().address)).to_json())


def _perform(work: Work, target: Target, poll: Callable[[], None]) -> Finding:
    # A run loads what its verb needs.
    poll()
    if target.kind is Kind.FILE:
        return _with_file(work, target, poll)
    from pyqmigrate.fleet.opening import is_snapshot, open_plain

    with open_plain(target, poll) as plain:
        known = target.kind is Kind.STORED or target.named or target.sealed
        if not known and not is_snapshot(plain, target.name):
            return _not_a_snapshot()
        match work.verb:
            case Verb.VERIFY:
                from pyqmigrate.fleet.checking import verify_shown

                return verify_shown(plain, target.name, poll)
            case Verb.INFO:
                from pyqmigrate.fleet.describing import describe_shown

                return describe_shown(plain, target.name, poll)
            case Verb.ADD:
                from pyqmigrate.fleet.storing import add_shown

                return add_shown(plain, target, work.store, poll)
        raise UsageError("a seal is written beside a local file")


def _with_file(work: Work, target: Target, poll: Callable[[], None]) -> Finding:
    if not (target.named or target.sealed):
        from pyqmigrate.fleet.opening import is_snapshot_file

        if not is_snapshot_file(target.place):
            return _not_a_snapshot()
    match work.verb:
        case Verb.VERIFY:
            from pyqmigrate.fleet.checking import verify_file

            return verify_file(target.place, poll)
        case Verb.INFO:
            from pyqmigrate.fleet.describing import describe_file

            return describe_file(target.place, poll)
        case Verb.ADD:
            from pyqmigrate.fleet.storing import add_file

            return add_file(target, work.store, poll)
        case Verb.SEAL:
            from pyqmigrate.fleet.sealing import seal_file

            return seal_file(target.place, work.algorithm, poll)


def _not_a_snapshot() -> Finding:
    return Finding(Verdict.SKIPPED, "not a snapshot")


def _identity_after(work: Work, target: Target) -> str:
    """Return the identity of the target, as it is after a seal was written beside it."""
    if work.verb is Verb.SEAL:
        try:
            return file_identity(target.place)
        except OSError:
            pass
    return target.identity


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f": {error.filename!r}"
        return f"{error.strerror}{name}"
    return str(error) or type(error).__name__
