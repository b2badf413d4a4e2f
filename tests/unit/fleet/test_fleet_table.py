"""The table of results."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqmigrate import NoSpace, TargetError, UsageError
from pyqmigrate.fleet import Result, ResultTable, Verb, Verdict, Work
from pyqmigrate.format.digest import Algorithm

VERIFY = Work(Verb.VERIFY)
PATHS = st.binary(min_size=1, max_size=20).map(os.fsdecode)
RESULTS = st.builds(
    Result,
    PATHS,
    st.text("0123456789:+", max_size=20),
    st.sampled_from(Verdict),
    PATHS,
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    st.floats(0, 1e6),
    st.floats(0, 1e10),
    st.text(max_size=10),
)


def result(name: str, identity: str = "1", verdict: Verdict = Verdict.GOOD) -> Result:
    return Result(name, identity, verdict)


@settings(max_examples=8, deadline=None)  # the disk is slow at times
@given(given_result=RESULTS)
def test_what_is_kept_is_what_is_read(
    given_result: Result, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("table") / "results.db"
    with ResultTable(path) as table:
        table.keep(VERIFY, given_result)
    with ResultTable(path, reading=True) as table:
        (row,) = table.rows()
    assert (row.verb, row.options, row.result) == ("verify", "", given_result)


def test_a_later_result_replaces_the_earlier_one_of_the_same_work_only(tmp_path: Path) -> None:
    blake3 = Work(Verb.SEAL, algorithm=Algorithm.BLAKE3)
    with ResultTable(tmp_path / "t") as table:
        for work in (VERIFY, Work(Verb.SEAL), blake3):
            table.keep(work, result("a", "1"))
        table.keep(VERIFY, result("a", "2", Verdict.DAMAGED))
        table.commit()
        found = [(row.verb, row.options, row.result.identity) for row in table.rows()]
    assert found == [("seal", "blake3", "1"), ("seal", "xxh3-128", "1"), ("verify", "", "2")]


def test_what_has_failed_is_not_known(tmp_path: Path) -> None:
    with ResultTable(tmp_path / "t") as table:
        for verdict in Verdict:
            table.keep(VERIFY, result(str(verdict), verdict=verdict))
        table.commit()
        assert sorted(table.known(VERIFY)) == ["damaged", "good", "skipped"]


def test_two_runs_use_it_at_once(tmp_path: Path) -> None:
    with ResultTable(tmp_path / "t") as one, ResultTable(tmp_path / "t") as other:
        for number in range(40):
            for table in (one, other):
                table.keep(VERIFY, result(f"{number}"))
                table.commit()
        assert len(list(one.rows())) == len(list(other.rows())) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_results_are_committed_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("pyqmigrate.fleet.table.time.monotonic", lambda: now[0])
    with ResultTable(tmp_path / "t") as table, ResultTable(tmp_path / "t") as reader:
        table.keep(VERIFY, result("a"))
        assert not list(reader.rows())
        now[0] += 0.9
        table.commit_soon()
        assert len(list(reader.rows())) == 1


@pytest.mark.parametrize("content", [b"not SQLite at all", b"SQLite format 3\0" + bytes(200)])
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UsageError, match="table"):
        ResultTable(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == content


def test_another_program_s_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "t") as database:
        database.execute("create table results (verb)")
    database.close()
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(UsageError, match="not a table of results"):
        ResultTable(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    ResultTable(tmp_path / "t").close()
    with sqlite3.connect(tmp_path / "t") as database:
        database.execute("pragma user_version = 9")
    database.close()
    with pytest.raises(UsageError, match="version 9"):
        ResultTable(tmp_path / "t")


@pytest.mark.parametrize("column", ["data", "depends", "verdict"])
def test_a_table_that_was_tampered_with_is_an_error(tmp_path: Path, column: str) -> None:
    with ResultTable(tmp_path / "t") as table:
        table.keep(VERIFY, result("a"))
    with sqlite3.connect(tmp_path / "t") as database:
        database.execute(f"update results set {column} = '{{'")
    database.close()
    with ResultTable(tmp_path / "t") as table, pytest.raises(UsageError, match="damaged"):
        list(table.rows())


def test_a_special_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a file"):
        ResultTable(tmp_path / "fifo")
    with pytest.raises(TargetError) as caught:
        ResultTable(tmp_path / "missing", reading=True)
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(TargetError):
        ResultTable(tmp_path / "no directory" / "t")


def test_a_full_disk_is_an_error_and_what_was_kept_stays(tmp_path: Path) -> None:
    with ResultTable(tmp_path / "t") as table:
        table.keep(VERIFY, result("a"))
        table.commit()
        table._database.execute("pragma max_page_count = 4")
        for number in range(400):
            table.keep(VERIFY, result(f"{number:0500}"))
        with pytest.raises(NoSpace):
            table.commit()
        table._pending.clear()
        assert [row.result.name for row in table.rows()] == ["a"]
