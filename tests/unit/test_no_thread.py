"""A system that allows no more threads: the right error, nothing left, and it works again later."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyqmigrate
from pyqmigrate import RamBlock, TargetError, seal, verify_seal
from pyqmigrate.cli import main
from pyqmigrate.export.convert import convert
from pyqmigrate.export.raw import unpack
from pyqmigrate.io.threads import start_thread, starting_threads
from pyqmigrate.migration import Migration
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qapi.status import Status
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from pyqmigrate.vm.plan.estimate import measure_rate
from tests.harness.snapshots import known_memory, save_known

Work = Callable[[Path], object]


class Limit:
    """Lets so many threads start, and no more; ``refused`` is how many were not."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.refused = 0

    def start(self, thread: threading.Thread) -> None:
        if self.left is not None:
            if self.left == 0:
                self.refused += 1
                raise RuntimeError("can't start new thread")
            self.left -= 1
        _start(thread)


_start = threading.Thread.start


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Limit]:
    limit = Limit()
    monkeypatch.setattr(threading.Thread, "start", lambda thread: limit.start(thread))
    before = set(threading.enumerate())
    yield limit
    limit.left = None
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # it may be on its way out
    assert set(threading.enumerate()) <= before


def load(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        snapshot.load({name: bytearray(b.length) for name, b in snapshot.blocks.items()})


def converted(path: Path, form: str) -> None:
    with open_snapshot(path) as snapshot:
        convert(snapshot, path.with_name("new"), to=form)


def looked_through(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        assert snapshot.stream


def unpacked(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        unpack(snapshot, path.with_name("raw"))


WORK: dict[str, Work] = {
    "save": lambda d: pyqmigrate.save(d / "new", [RamBlock("ram", known_memory())], seal="sha256"),
    "sequential save": lambda d: start_sequential_save(
        d / "new", [RamBlock("ram", known_memory())]
    ).wait(),
    "load": lambda d: load(d / "mapped"),
    "load sequential": lambda d: load(d / "sequential"),
    "look through": lambda d: looked_through(d / "sequential"),
    "seal": lambda d: seal(d / "mapped"),
    "verify": lambda d: verify_seal(d / "sealed"),
    "to stream": lambda d: converted(d / "mapped", "stream"),
    "to mapped-ram": lambda d: converted(d / "sequential", "mapped-ram"),
    "to elf": lambda d: converted(d / "sequential", "elf"),
    "unpack": lambda d: unpacked(d / "mapped"),
    "unpack sequential": lambda d: unpacked(d / "sequential"),
    "try the disk": measure_rate,
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_known(tmp_path / "mapped", machine="pc-q35-10.0")
    save_known(tmp_path / "sealed", seal="xxh3-128")
    start_sequential_save(
        tmp_path / "sequential", [RamBlock("pc.ram", known_memory())], machine="pc-q35-10.0"
    ).wait()
    return tmp_path


@pytest.mark.parametrize("what", WORK)
def test_work_without_threads_is_refused_and_leaves_nothing(
    what: str, work: Path, limit: Limit, same_descriptors: None
) -> None:
    before = sorted(path.name for path in work.iterdir())
    for allowed in range(40):
        limit.left, limit.refused = allowed, 0
        try:
            WORK[what](work)
        except TargetError as error:
            assert error.errno == errno.EAGAIN
            assert "thread" in str(error)
            assert limit.refused
            assert sorted(path.name for path in work.iterdir()) == before
        else:
            break
    else:
        pytest.fail("it needs ever more threads")
    assert allowed > 0, "it starts no thread at all"


@pytest.mark.parametrize("policy", [Policy.STRICT, Policy.COMPAT])
def test_a_migration_without_a_thread_fails_and_can_be_begun_again(
    policy: Policy, tmp_path: Path, limit: Limit
) -> None:
    migration = Migration([RamBlock("ram", known_memory())], policy=policy)
    migration.set_capabilities({"mapped-ram": True})
    limit.left = 0
    with pytest.raises(TargetError) as caught:
        migration.migrate(f"file:{tmp_path}/snap")
    assert caught.value.errno == errno.EAGAIN
    assert migration.query().status is Status.FAILED
    assert "thread" in migration.query().error
    assert list(tmp_path.iterdir()) == []
    limit.left = None
    migration.migrate(f"file:{tmp_path}/snap")
    assert migration.wait(60).status is Status.COMPLETED
    migration.close()
    with open_snapshot(tmp_path / "snap") as snapshot:
        snapshot.verify()


@pytest.mark.parametrize("policy", [Policy.STRICT, Policy.COMPAT])
def test_an_incoming_migration_without_a_thread_can_be_begun_again(
    policy: Policy, work: Path, limit: Limit, same_descriptors: None
) -> None:
    memory = bytearray(len(known_memory()))
    migration = Migration([RamBlock("ram", memory)], policy=policy, incoming=True)
    migration.set_capabilities({"mapped-ram": True})
    limit.left = 0
    with pytest.raises(TargetError):
        migration.migrate_incoming(f"file:{work}/mapped")
    limit.left = None
    migration.migrate_incoming(f"file:{work}/mapped")
    assert migration.wait(60)
    assert bytes(memory) == known_memory().tobytes()
    migration.close()


def test_the_command_without_threads_exits_as_refused_by_the_system(
    work: Path, limit: Limit, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["seal", "mapped"], ["info", "sequential"], ["unpack", "sequential", "raw"]):
        limit.left = 0
        words = [arguments[0], *(str(work / name) for name in arguments[1:])]
        assert main(words) == 3
        assert "cannot start a thread" in capsys.readouterr().err


def test_an_error_of_another_kind_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="another"), starting_threads():
        raise RuntimeError("another")
    thread = threading.Thread(target=lambda: None)
    start_thread(thread)
    thread.join()
