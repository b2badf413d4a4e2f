"""The increments of a base are found where they are kept, in bounded time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import RamBlock, UsageError, convert, open_snapshot, save
from pyqmigrate.export.raw import unpack
from pyqmigrate.io import increments_of as module
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.increments_of import increments_of, refuse_base
from pyqmigrate.io.output import OutputFile
from tests.harness.increment_files import save_base, save_increment
from tests.harness.snapshots import ram

MEMORY = ram(40, seed=1)


@pytest.fixture
def base(shm: Path) -> Path:
    save_base(shm / "base", {"ram": MEMORY})
    return shm / "base"


def step(path: Path, base: Path) -> Path:
    changed = np.zeros(40, bool)
    changed[3] = True
    save_increment(path, base, {"ram": MEMORY}, {"ram": changed})
    return path


def found(base: Path) -> list[str]:
    return sorted(path.name for path, _ in increments_of(base))


def test_increments_beside_the_base_are_found(base: Path) -> None:
    assert found(base) == []
    for name in ("one", "two"):
        step(base.with_name(name), base)
    (base.parent / "other").mkdir()
    step(base.parent / "other" / "three", base)  # documented: not found
    save_base(base.with_name("another"), {"ram": MEMORY})
    step(base.with_name("of another"), base.with_name("another"))
    assert found(base) == ["one", "two"]


def test_increments_of_a_base_that_changed_do_not_count(base: Path) -> None:
    step(base.with_name("one"), base)
    os.utime(base, ns=(1, 1))
    assert found(base) == []


def test_what_is_no_increment_is_stepped_over(base: Path) -> None:
    one = step(base.with_name("one"), base)
    damaged = base.with_name("damaged")
    damaged.write_bytes(one.read_bytes())
    with damaged.open("r+b") as file:
        file.seek(50)
        file.write(b"?")
    base.with_name("link").symlink_to("one")
    os.mkfifo(base.with_name("fifo"))
    base.with_name("short").write_bytes(b"QMDELTA1")
    assert found(base) == ["one"]
    assert increments_of(base.with_name("missing")) == []
    assert increments_of(base.parent) == []


def test_the_search_is_bounded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step(base.with_name("one"), base)
    monkeypatch.setattr(module, "ENTRIES_MAX", 0)
    assert found(base) == []
    monkeypatch.setattr(module, "ENTRIES_MAX", 10)
    monkeypatch.setattr(module, "SECONDS_MAX", -1.0)
    assert found(base) == []


def test_increment_that_is_made_during_a_save_keeps_its_base(base: Path) -> None:
    before = base.read_bytes()
    output = OutputFile.open(base, DirectIO.OFF)
    try:
        step(base.with_name("one"), base)
        with pytest.raises(UsageError, match="is the base of 'one'"):
            output.publish(b"QEVM", lambda: None)
    finally:
        output.abort()
    assert base.read_bytes() == before
    assert {path.name for path in base.parent.iterdir()} == {"base", "one"}


def test_every_writer_asks(base: Path) -> None:
    for number in range(5):
        step(base.with_name(f"step{number}"), base)
    with pytest.raises(UsageError, match=r"is the base of '.*', '.*', '.*' and 2 more"):
        refuse_base(base)
    before = base.read_bytes()
    save(base.with_name("new"), [RamBlock("ram", MEMORY)])
    with pytest.raises(UsageError, match="is the base of"):
        convert(base.with_name("new"), base, to="stream")
    base.with_name("link").symlink_to("base")
    with pytest.raises(UsageError, match="is the base of"):
        save(base.with_name("link"), [RamBlock("ram", MEMORY)])
    raw = base.rename(base.with_name("ram.raw"))
    for path in base.parent.glob("step*"):
        path.unlink()
    step(base.with_name("one"), raw)
    with (
        open_snapshot(base.with_name("new")) as snapshot,
        pytest.raises(UsageError, match="is the base of 'one'"),
    ):
        unpack(snapshot, base.parent)
    assert raw.read_bytes() == before
