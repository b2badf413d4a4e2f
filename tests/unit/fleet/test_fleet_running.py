"""A run over many snapshots, on threads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import UsageError, seal
from pyqmigrate.fleet import FleetReport, Verb, Verdict, Work, list_targets, run
from pyqmigrate.fleet.table import ResultTable
from tests.harness.fleet import COMMAND, damage, make_fleet
from tests.harness.increment_files import save_base, save_increment
from tests.harness.snapshots import ram, save_known

VERIFY = Work(Verb.VERIFY)


def verify(*words: Path | str, **options: object) -> FleetReport:
    return run(VERIFY, list_targets(map(str, words)).targets, **options)  # type: ignore[arg-type]


def names(results: object) -> list[str]:
    return [Path(result.name).name for result in results]  # type: ignore[attr-defined]


def test_exactly_the_damaged_ones_are_found(tmp_path: Path) -> None:
    bad = make_fleet(tmp_path, 20, 4)
    report = verify(tmp_path, jobs=3)
    assert names(report.damaged) == [path.name for path in bad]
    assert len(report.of(Verdict.GOOD)) == 16
    assert "pc.ram" in report.damaged[0].message


def test_a_file_that_is_not_a_snapshot_is_skipped_in_a_directory_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of a guest")
    assert names(verify(tmp_path).of(Verdict.SKIPPED)) == ["notes.txt"]
    assert names(verify(tmp_path / "notes.txt").damaged) == ["notes.txt"]


def test_a_sealed_file_whose_start_is_overwritten_is_damaged_and_not_skipped(
    tmp_path: Path,
) -> None:
    save_known(tmp_path / "guest", seal="xxh3-128")
    with (tmp_path / "guest").open("r+b") as file:
        file.write(bytes(4096))
    assert names(verify(tmp_path).damaged) == ["guest"]


def test_a_file_that_cannot_be_read_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    make_fleet(tmp_path, 3, 0)
    targets = list_targets([str(tmp_path)]).targets
    (tmp_path / "guest-001.mapped").unlink()
    report = run(VERIFY, targets)
    assert names(report.failed) == ["guest-001.mapped"]
    assert len(report.of(Verdict.GOOD)) == 2


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    make_fleet(tmp_path / "snaps", 6, 2)
    first = verify(tmp_path / "snaps", table=tmp_path / "table")
    done: list[str] = []
    second = verify(
        tmp_path / "snaps", table=tmp_path / "table", found=lambda r: done.append(r.name)
    )
    assert (first.done_before, second.done_before, done) == (0, 6, [])
    assert first.results == second.results


def test_a_table_in_the_directory_is_not_looked_at(tmp_path: Path) -> None:
    make_fleet(tmp_path, 2, 0)
    for _ in range(2):
        assert len(verify(tmp_path, table=tmp_path / "table").results) == 2


def test_a_second_run_does_what_changed_and_what_is_new_and_what_had_failed(tmp_path: Path) -> None:
    snaps = tmp_path / "snaps"
    make_fleet(snaps, 5, 0)
    targets = list_targets([str(snaps)]).targets
    gone = snaps / "guest-000.mapped"
    gone.rename(tmp_path / "elsewhere")
    run(VERIFY, targets, table=tmp_path / "table")
    (tmp_path / "elsewhere").rename(gone)
    os.utime(snaps / "guest-001.mapped", ns=(0, 7))  # changed
    shutil.copy2(gone, snaps / "new")
    (snaps / "guest-002.mapped.seal").unlink()
    done: list[object] = []
    verify(snaps, table=tmp_path / "table", found=done.append)
    changed = ["guest-000.mapped", "guest-001.mapped", "guest-002.mapped", "new"]
    assert sorted(names(done)) == changed


def test_again_finds_bits_that_rotted_without_a_change_of_time(tmp_path: Path) -> None:
    make_fleet(tmp_path / "snaps", 3, 0)
    verify(tmp_path / "snaps", table=tmp_path / "table")
    damage(tmp_path / "snaps" / "guest-001.mapped")
    assert not verify(tmp_path / "snaps", table=tmp_path / "table").damaged
    again = verify(tmp_path / "snaps", table=tmp_path / "table", again=True)
    assert names(again.damaged) == ["guest-001.mapped"]


def test_an_increment_is_done_again_when_its_base_has_changed(tmp_path: Path) -> None:
    base, increment = tmp_path / "base", tmp_path / "increment"
    save_base(base, {"ram": ram(64)})
    save_increment(increment, base, {"ram": ram(64, seed=2)}, {"ram": np.ones(64, dtype=bool)})
    assert verify(increment, table=tmp_path / "table").results[0].verdict is Verdict.GOOD
    assert verify(increment, table=tmp_path / "table").done_before == 1
    os.utime(base, ns=(0, 7))
    report = verify(increment, table=tmp_path / "table")
    assert names(report.damaged) == ["increment"]


def test_info_has_the_facts_of_each(tmp_path: Path) -> None:
    save_known(tmp_path / "guest", machine="pc-q35-10.0")
    report = run(Work(Verb.INFO), list_targets([str(tmp_path)]).targets)
    found = report.results[0].data
    assert (found["kind"], found["machine"], found["total_ram"]) == (
        "mapped-ram",
        "pc-q35-10.0",
        2 << 20,
    )


def test_seal_seals_what_has_no_seal_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    snaps = tmp_path / "snaps"
    snaps.mkdir()
    for name in ("a", "b"):
        save_known(snaps / name)
    seal(snaps / "a")
    report = run(Work(Verb.SEAL), list_targets([str(snaps)]).targets, table=tmp_path / "table")
    assert [result.data["sealed_before"] for result in report.results] == [True, False]
    assert (snaps / "b.seal").exists()
    again = run(Work(Verb.SEAL), list_targets([str(snaps)]).targets, table=tmp_path / "table")
    assert again.done_before == 2


def test_an_error_in_a_callback_ends_the_run_and_the_table_keeps_what_was_done(
    tmp_path: Path,
) -> None:
    make_fleet(tmp_path / "snaps", 8, 0)

    def fail(result: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(tmp_path / "snaps", table=tmp_path / "table", jobs=1, found=fail)
    with ResultTable(tmp_path / "table", reading=True) as table:
        assert len(list(table.rows())) >= 1
    assert not [t for t in threading.enumerate() if "fleet" in t.name]


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    make_fleet(tmp_path / "snaps", 600, 0, pages=300, linked=True)
    command = [*COMMAND, "verify", str(tmp_path / "snaps"), "--jobs", "1", "--table", "t.db"]
    run_of_it = subprocess.Popen([*command, "--json"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    table = tmp_path / "t.db"
    while not (table.exists() and _rows(table)) and run_of_it.poll() is None:
        time.sleep(0.01)
    run_of_it.send_signal(signal.SIGKILL)
    run_of_it.wait()
    kept = _rows(table)
    assert kept > 0
    report = verify(tmp_path / "snaps", table=table)
    assert report.done_before == kept
    assert len(report.of(Verdict.GOOD)) == 600


def _rows(table: Path) -> int:
    try:
        with ResultTable(table, reading=True) as kept:
            return len(list(kept.rows()))
    except UsageError:  # it is not a table yet
        return 0


def test_an_interrupt_ends_soon_and_keeps_what_was_done(tmp_path: Path) -> None:
    make_fleet(tmp_path / "snaps", 600, 0, pages=300, linked=True)
    command = [*COMMAND, "verify", str(tmp_path / "snaps"), "--jobs", "1", "--table", "t.db"]
    with subprocess.Popen(
        [*command, "--json"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run_of_it:
        table = tmp_path / "t.db"
        while not (table.exists() and _rows(table)) and run_of_it.poll() is None:
            time.sleep(0.01)
        run_of_it.send_signal(signal.SIGINT)
        started = time.monotonic()
        output, _ = run_of_it.communicate()
    assert time.monotonic() - started < 5
    assert run_of_it.returncode == 130
    assert json.loads(output)["error"]["type"] == "Interrupted"
    assert not list(tmp_path.glob("t.db-*"))
    assert 0 < _rows(table) < 600


@pytest.mark.parametrize("jobs", [0, 256, "two"])
def test_another_number_of_jobs_is_refused(tmp_path: Path, jobs: object) -> None:
    with pytest.raises(UsageError, match="jobs"):
        run(VERIFY, [], jobs=jobs)  # type: ignore[arg-type]
