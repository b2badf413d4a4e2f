"""Bytes and regular expressions in a snapshot's memory are found as in the memory itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate import BlockMismatch, Cancelled, SnapshotError, UsageError, open_snapshot
from pyqmigrate.analysis import memory_scan
from pyqmigrate.analysis.regular_expression import RegularExpression
from pyqmigrate.analysis.search import find
from tests.harness.searching import PAGE, SMALL_WINDOW, found_by_bytes, found_by_re, memories, save
from tests.harness.snapshots import Bytes

PATTERNS = st.one_of(
    st.text("ab\0", min_size=1, max_size=6).map(str.encode),
    st.sampled_from(
        [b"\0", b"\0" * 1500, b"\0a", b"a\0", b"\0" * 1030 + b"b", b"a" * 70_0, b"\xff\n"]
    ),
)
EXPRESSIONS = [
    rb"a+", rb"b\0+a", rb"\0{3}", rb"[^a\0]b", rb"(?:ab|b\0)+c?", rb"a{2,5}", rb"(?<=a)\0", rb"\bc",
    rb"\0{0,40}a\n", rb"(?i)AB", rb".{7}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_scan, "_WINDOW", SMALL_WINDOW)


def offsets(path: Path, pattern: bytes, **options: object) -> list[int]:
    with open_snapshot(path) as snapshot, find(snapshot, pattern, **options) as search:  # type: ignore[arg-type]
        return [match.offset for match in search]


def random_memory(npages: int = 300, seed: int = 0) -> Bytes:
    rng = np.random.default_rng(seed)
    memory = rng.choice(np.frombuffer(b"\0\0abc", np.uint8), (npages, PAGE))
    memory[rng.random(npages) < 0.5] = 0
    return memory.reshape(-1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(memory=memories(), pattern=PATTERNS, channels=st.integers(1, 3))
def test_pattern_is_found_where_bytes_find_it(
    tmp_path: Path, memory: Bytes, pattern: bytes, channels: int
) -> None:
    path = tmp_path / "a"
    save(path, ("ram", memory))
    expected = found_by_bytes(memory.tobytes(), pattern)
    with open_snapshot(path) as snapshot:
        assert find(snapshot, pattern, channels=channels).count() == len(expected)
        assert [match.offset for match in find(snapshot, pattern, channels=channels)] == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(memory=memories(140), expression=st.sampled_from(EXPRESSIONS))
def test_expression_is_found_where_re_finds_it(
    tmp_path: Path, memory: Bytes, expression: bytes
) -> None:
    path = tmp_path / "a"
    # A run that is longer than the longest match that is found whole would be given in parts.
    for start in range(0, len(memory), 60 << 10):
        memory[start : start + 2] = (10, 1)
    save(path, ("ram", memory))
    with open_snapshot(path) as snapshot:
        found = [(m.offset, m.data) for m in find(snapshot, expression, regex=True)]
    assert found == found_by_re(memory.tobytes(), expression)


@pytest.mark.parametrize("pattern", [b"abcab", b"\0" * 2048, b"c\0\0"])
@pytest.mark.parametrize("kind", ["sequential", "increment", "compact"])
def test_every_kind_of_snapshot_is_searched(tmp_path: Path, kind: str, pattern: bytes) -> None:
    memory = random_memory()
    save(tmp_path / "plain", ("ram", memory))
    path = tmp_path / kind
    if kind == "sequential":
        pyqmigrate.convert(tmp_path / "plain", path, to="stream")
    elif kind == "compact":
        pyqmigrate.compact(tmp_path / "plain", path)
    else:
        from tests.harness.increment_files import save_increment

        memory = random_memory(seed=1)
        changed = np.arange(300) % 3 == 0
        merged = np.where(
            changed[:, None], memory.reshape(300, -1), random_memory().reshape(300, -1)
        )
        save_increment(path, tmp_path / "plain", {"ram": memory}, {"ram": changed}, page_size=PAGE)
        memory = merged.reshape(-1)
    with open_snapshot(path, **({"page_size": PAGE} if kind == "sequential" else {})) as snapshot:
        found = [match.offset for match in find(snapshot, pattern)]
    assert found == found_by_bytes(memory.tobytes(), pattern)
    assert found


def test_match_has_its_bytes_and_those_around_it(tmp_path: Path) -> None:
    memory = np.zeros(4 * PAGE, np.uint8)
    memory[PAGE - 3 : PAGE + 4] = np.frombuffer(b"xNEEDLE", np.uint8)
    save(tmp_path / "a", ("ram", memory))
    with open_snapshot(tmp_path / "a") as snapshot:
        [match] = find(snapshot, b"NEEDLE", context=3)
    assert (match.block, match.offset, match.data) == ("ram", PAGE - 2, b"NEEDLE")
    assert (match.before, match.after) == (b"\0\0x", b"\0\0\0")
    assert match.address is None


def test_context_of_zeros_that_are_not_read_is_right(tmp_path: Path) -> None:
    memory = np.zeros(4 * PAGE, np.uint8)
    memory[0] = 7
    memory[-1] = 9
    save(tmp_path / "a", ("ram", memory))
    with open_snapshot(tmp_path / "a") as snapshot:
        found = [*find(snapshot, bytes(PAGE), context=2)]
    assert [match.offset for match in found] == found_by_bytes(memory.tobytes(), bytes(PAGE))
    for match in found:
        start, end = match.offset, match.offset + PAGE
        assert match.before == memory[max(start - 2, 0) : start].tobytes()
        assert match.after == memory[end : end + 2].tobytes()


def test_pages_without_data_are_not_read(tmp_path: Path) -> None:
    memory = np.zeros(4000 * PAGE, np.uint8)
    memory[2000 * PAGE + 5] = 1
    save(tmp_path / "a", ("ram", memory))
    with open_snapshot(tmp_path / "a") as snapshot, find(snapshot, b"\0\0\0\0") as search:
        assert search.count() == 4000 * PAGE // 4 - 1
        assert search.bytes_read <= 4 * PAGE


def test_old_bytes_under_a_clear_bit_are_not_found(tmp_path: Path) -> None:
    save(tmp_path / "a", ("ram", random_memory(64)))
    with open_snapshot(tmp_path / "a") as snapshot:
        block = snapshot.blocks["ram"]
        page = next(first for first, _, data in block.runs() if not data)
        at = block.layout.pages_offset + page * PAGE  # type: ignore[union-attr]
    with (tmp_path / "a").open("r+b") as file:
        file.seek(at)
        file.write(b"SECRET")
    assert offsets(tmp_path / "a", b"SECRET") == []


def test_dense_matches_need_no_more_memory_and_are_complete(tmp_path: Path) -> None:
    memory = np.full(1000 * PAGE, ord("a"), np.uint8)
    save(tmp_path / "a", ("ram", memory))
    with open_snapshot(tmp_path / "a") as snapshot:
        assert find(snapshot, b"a").count() == len(memory)
        assert find(snapshot, b"[a]", regex=True).count() == len(memory)


def test_only_the_named_block_is_searched(tmp_path: Path) -> None:
    save(tmp_path / "a", ("one", random_memory(20)), ("two", random_memory(20, 1)))
    with open_snapshot(tmp_path / "a") as snapshot:
        assert {match.block for match in find(snapshot, b"ab", block="two")} == {"two"}
        assert [m.block for m in find(snapshot, b"ab")] == sorted(
            m.block for m in find(snapshot, b"ab")
        )
        with pytest.raises(BlockMismatch, match="three"):
            find(snapshot, b"ab", block="three")


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        (b"", {}),
        (b"a" * 4097, {}),
        (b"(", {"regex": True}),
        (b"a*", {"regex": True}),
        (b"a", {"context": -1}),
        (b"a", {"channels": 0}),
        (b"a", {"addresses": (5, 5)}),
        ("a", {}),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, pattern: bytes, options: dict[str, object]
) -> None:
    save(tmp_path / "a", ("ram", random_memory(2)))
    with (
        open_snapshot(tmp_path / "a") as snapshot,
        pytest.raises((UsageError, pyqmigrate.NotSupported)),
    ):
        find(snapshot, pattern, **options)  # type: ignore[arg-type]


def test_closing_the_snapshot_ends_a_search(tmp_path: Path) -> None:
    save(tmp_path / "a", ("ram", np.full(2000 * PAGE, 97, np.uint8)))
    snapshot = open_snapshot(tmp_path / "a")
    search = find(snapshot, b"a")
    next(search)
    snapshot.close()
    with pytest.raises(Cancelled):
        search.count()


def test_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a", ("ram", np.full(2000 * PAGE, 97, np.uint8)))
    with open_snapshot(tmp_path / "a") as snapshot:
        _ = snapshot.blocks["ram"].bitmap
        with (tmp_path / "a").open("r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
        with pytest.raises(SnapshotError, match="truncated"):
            find(snapshot, b"b").count()


def test_progress_is_reported_and_can_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_scan, "_REPORT_EVERY", 0)
    save(tmp_path / "a", ("ram", random_memory()))
    done: list[int] = []
    with open_snapshot(tmp_path / "a") as snapshot:
        find(snapshot, b"abc", progress=lambda p: done.append(p.bytes_done)).count()
        assert done == sorted(done)
        assert 0 < done[-1] <= 300 * PAGE

        def stop(_: object) -> None:
            raise KeyError

        with pytest.raises(KeyError):
            find(snapshot, b"abc", progress=stop).count()


@settings(deadline=None)
@given(
    pattern=st.lists(
        st.sampled_from([b"a", b"b", b"\\0", b"\\x00", b".", b"[^a]", b"[a-b]", b"(?:ab|b)", b"(a)",
                         b"\\d", b"\\w", b"|", b"*", b"+?", b"{2}", b"{1,3}", b"\\.", b"\n"]),
        min_size=1, max_size=6,
    ).map(b"".join),
    data=st.text("ab\0\n1.", max_size=60).map(str.encode),
)  # fmt: skip
def test_both_engines_find_the_same(pattern: bytes, data: bytes) -> None:
    pytest.importorskip("re2")
    try:
        expression = RegularExpression(pattern)
    except UsageError:
        return
    starts, ends, _ = expression.find(data, 0, len(data))
    found = [(m.start(), m.end()) for m in re.finditer(pattern, data) if m[0]]
    assert [*zip(starts, ends, strict=True)] == found
