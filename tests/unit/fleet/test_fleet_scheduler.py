"""A run on the workers of a real Dask scheduler, on the loopback interface."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate import TargetError, UsageError
from pyqmigrate.fleet import FleetReport, Result, Verb, Verdict, Work, list_targets, run
from tests.harness.dask_cluster import Cluster, dask_cluster
from tests.harness.fleet import copy, make_fleet

pytest.importorskip("distributed")

VERIFY = Work(Verb.VERIFY)


def verify(cluster: Cluster, directory: Path, **options: object) -> FleetReport:
    targets = list_targets([str(directory)]).targets
    return run(VERIFY, targets, scheduler=cluster.address, **options)  # type: ignore[arg-type]


def names(results: object) -> list[str]:
    return [Path(result.name).name for result in results]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A scheduler with two workers, which take 20 ms longer for each snapshot."""
    with dask_cluster(1, 2, seconds=0.02) as cluster:
        yield cluster


def check_all_are_right_although_a_worker_is_killed(
    cluster: Cluster, directory: Path, count: int
) -> None:
    bad = make_fleet(directory / "snaps", count, 8, linked=True)
    done: list[Result] = []

    def found(result: Result) -> None:
        done.append(result)
        if len(done) == count // 4:
            cluster.kill(1)

    report = verify(cluster, directory / "snaps", table=directory / "table", found=found)
    assert names(report.damaged) == [path.name for path in bad]
    assert len(report.of(Verdict.GOOD)) == count - len(bad)
    assert len(done) == len({result.name for result in done}) == count
    assert all(result.worker.startswith("tcp://127.0.0.1:") for result in done)
    second = verify(cluster, directory / "snaps", table=directory / "table")
    assert second.done_before == count
    assert second.results == report.results


def test_a_worker_that_is_killed_loses_no_result(cluster: Cluster, tmp_path: Path) -> None:
    check_all_are_right_although_a_worker_is_killed(cluster, tmp_path, 30)


def test_a_worker_without_the_package_is_named_before_anything_starts(
    cluster: Cluster, tmp_path: Path
) -> None:
    make_fleet(tmp_path, 2, 0)
    cluster.start_worker(3, package=False)
    cluster.wait_for_workers(2)
    found: list[Result] = []
    try:
        with pytest.raises(UsageError, match=r"pyqmigrate is missing on 1 of 2 workers \(tcp:"):
            verify(cluster, tmp_path, found=found.append)
    finally:
        cluster.kill(3)
    assert not found


def test_a_task_has_no_path_in_its_name(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "secret-directory").mkdir()
    make_fleet(tmp_path / "secret-directory", 4, 1)
    assert len(verify(cluster, tmp_path).damaged) == 1
    assert "secret-directory" not in cluster.printed()


def test_a_scheduler_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    make_fleet(tmp_path, 1, 0)
    targets = list_targets([str(tmp_path)]).targets
    with pytest.raises(UsageError, match="tcp://HOST:PORT"):
        run(VERIFY, targets, scheduler="nonsense://x")
    with pytest.raises(UsageError, match="leave them out"):
        run(VERIFY, targets, scheduler="tcp://127.0.0.1:1", jobs=2)


@pytest.mark.long
def test_200_snapshots_and_a_worker_that_is_killed(tmp_path: Path) -> None:
    with dask_cluster(1, 2, seconds=0.02) as cluster:
        check_all_are_right_although_a_worker_is_killed(cluster, tmp_path, 200)


@pytest.mark.long
def test_a_task_that_kills_its_workers_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    make_fleet(tmp_path, 12, 2)
    copy(tmp_path / "guest-000.mapped", tmp_path / "deadly")
    with dask_cluster(1, 2, nanny=True, failures=1) as cluster:
        report = verify(cluster, tmp_path)
    assert names(report.failed) == ["deadly"]
    assert "lost" in report.failed[0].message
    assert (len(report.damaged), len(report.of(Verdict.GOOD))) == (2, 10)


@pytest.mark.long
def test_a_run_whose_scheduler_is_killed_ends_with_an_error_and_keeps_what_it_has(
    tmp_path: Path,
) -> None:
    make_fleet(tmp_path / "snaps", 60, 0, linked=True)
    done: list[Result] = []
    with dask_cluster(1, seconds=0.05) as cluster:

        def found(result: Result) -> None:
            done.append(result)
            if len(done) == 5:
                cluster.scheduler.kill()

        with pytest.raises(TargetError, match="lost the scheduler"):
            verify(cluster, tmp_path / "snaps", table=tmp_path / "table", found=found)
    targets = list_targets([str(tmp_path / "snaps")]).targets
    assert run(VERIFY, targets, table=tmp_path / "table").done_before >= 5


@pytest.mark.long
def test_an_interrupted_run_leaves_nothing_waiting_on_the_scheduler(tmp_path: Path) -> None:
    from distributed import Client

    make_fleet(tmp_path, 60, 0, linked=True)

    def found(result: Result) -> None:
        raise KeyboardInterrupt

    with dask_cluster(1, seconds=0.2) as cluster:
        with contextlib.suppress(KeyboardInterrupt):
            verify(cluster, tmp_path, found=found)
        deadline = time.monotonic() + 10
        with Client(cluster.address, set_as_default=False) as client:
            while any(client.processing().values()) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not any(client.processing().values())
    assert not [t for t in threading.enumerate() if "fleet" in t.name]
