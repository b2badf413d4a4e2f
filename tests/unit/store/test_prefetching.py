"""Reading ahead from a store that is far away: what is requested, and when."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from pyqmigrate.format.store.config import PAGE
from pyqmigrate.store import prefetching
from pyqmigrate.store.frames import FrameId
from pyqmigrate.store.store import Store
from tests.harness.stores import image, put_snapshot

SIZE = 700 * PAGE
CONTENT = image(700, seed=1)


@pytest.fixture
def remote() -> Iterator[Store]:
    pytest.importorskip("obstore")
    with Store.create(f"memory://{uuid4()}") as found:
        put_snapshot(found, "a", CONTENT, frame_pages=7, pack_pages=100)
        yield found


def test_what_a_reader_waits_for_is_told_apart(remote: Store) -> None:
    waited: list[bool] = []
    remote.packs.on_request = waited.append
    with remote.open_file("a") as file:
        file.prefetch([(0, 100 * PAGE)])
        assert set(waited) == {False}
        waited.clear()
        assert bytes(file.read(0, 100 * PAGE)) == CONTENT[: 100 * PAGE]
        assert waited == []
        file.read(600 * PAGE, 100 * PAGE)
        assert set(waited) == {True}


def test_prefetching_from_far_away_asks_for_more_as_long_as_answers_are_quick(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    load = remote.frames.load

    def counted(frames: list[FrameId], *, demand: bool) -> dict[FrameId, bytes]:
        counts.append(len(frames))
        return load(frames, demand=demand)

    monkeypatch.setattr(remote.frames, "load", counted)
    with remote.open_file("a") as file:
        ready: list[tuple[int, int]] = []
        ranges = [(n * 50 * PAGE, 50 * PAGE) for n in range(14)]
        file.prefetch(ranges, workers=1, done=lambda *found: ready.append(found))
        assert ready == ranges
        assert counts[:3] == [4, 8, 16]
        counts.clear()
        monkeypatch.setattr(prefetching, "_QUICK", 0.0)
        file.prefetch(ranges, workers=1)
        assert max(counts) == 4


def test_prefetching_from_far_away_reads_all_footers_first(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote.open_file("a") as file:
        asked: list[bool] = []
        remote.packs.on_request = asked.append
        file.load_footers([(0, SIZE)])
        packs = len(file.snapshot.packs)
        assert len(asked) == packs > 1
        monkeypatch.setattr(remote.place, "read_end", None)  # none is needed any more
        assert bytes(file.read(0, SIZE)) == CONTENT
