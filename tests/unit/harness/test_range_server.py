"""The web server of ranges, which stands for an object store that is far away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.store.place import Place, open_place
from tests.harness.range_server import RangeServer, serving

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    served = tmp_path / "served"
    (served / "packs").mkdir(parents=True)
    (served / "packs" / "a").write_bytes(CONTENT)
    (tmp_path / "secret").write_bytes(b"not served")
    return served


@pytest.fixture
def server(directory: Path) -> Iterator[RangeServer]:
    with RangeServer(directory) as found:
        yield found


@pytest.fixture
def place(server: RangeServer) -> Place:
    pytest.importorskip("obstore")
    return open_place(server.url)


def test_ranges_are_those_of_the_file(place: Place, server: RangeServer) -> None:
    assert bytes(place.read("packs/a")) == CONTENT
    assert bytes(place.read("packs/a", 10, 20)) == CONTENT[10:30]
    assert bytes(place.read("packs/a", 1000, 100)) == CONTENT[1000:]
    end, size = place.read_end("packs/a", 7)
    assert (bytes(end), size) == (CONTENT[-7:], len(CONTENT))
    entry = place.find("packs/a")
    assert entry is not None
    assert entry.size == len(CONTENT)
    assert server.count("packs/") == 5
    assert server.requests[1][2:] == (10, 20)


@pytest.mark.parametrize("key", ["packs/b", "packs", "..%2Fsecret"])
def test_only_files_of_the_directory_are_served(place: Place, key: str) -> None:
    with pytest.raises(TargetError):
        place.read(key)


def test_each_request_waits(directory: Path) -> None:
    pytest.importorskip("obstore")
    with serving(directory, 0.05) as server:
        place = open_place(server.url)
        began = time.monotonic()
        place.read("packs/a", 0, 1)
        place.read("packs/a", 5, 1)
        assert time.monotonic() - began >= 0.1
        assert [request.start for request in server.take_requests()] == [0, 5]
        assert server.take_requests() == []
