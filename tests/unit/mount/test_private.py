"""Private mounts: a path for a moment, and nothing that is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.io.lock import lock_file
from pyqmigrate.mount import private
from pyqmigrate.mount.mounting import find_mounts
from pyqmigrate.mount.private import FileRange, open_private, prepare_private
from pyqmigrate.mount.starting import MountRequest, WaitingKeeper
from pyqmigrate.store import Store, remove
from tests.harness.mounted import await_that
from tests.harness.mounted_guests import keepers
from tests.harness.stores import image, put_snapshot


@pytest.fixture
def guest(tmp_path: Path, mount_point: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(os.urandom(3 << 20))
    Path(f"{path}.seal").write_bytes(b"the seal")
    return path


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which private mounts are made."""
    directory = tmp_path / "runtime"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    return directory


def is_there(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_files_are_in_its_path(guest: Path) -> None:
    with open_private(guest) as view:
        assert sorted(os.listdir(view.path)) == ["guest", "guest.seal"]
        assert (view.path / "guest").read_bytes() == guest.read_bytes()
        assert (view.path / "guest").stat().st_mtime_ns == guest.stat().st_mtime_ns
        assert view.path.parent.stat().st_mode & 0o777 == 0o700


def test_hidden_mount_serves_what_is_open_and_ends_with_it(guest: Path, runtime: Path) -> None:
    view = open_private(guest)
    keeper = view.status()["keeper"]
    fd = os.open(view.path / "guest", os.O_RDONLY)
    view.hide()
    view.hide()
    assert find_mounts(str(view.path)) == []
    assert list(runtime.iterdir()) == []
    view.close()
    view.close()
    assert os.pread(fd, 4 << 20, 0) == guest.read_bytes()
    assert is_there(keeper)
    os.close(fd)
    await_that(lambda: not is_there(keeper))


def test_end_of_the_program_hides_it(
    guest: Path, runtime: Path, child_environment: dict[str, str]
) -> None:
    code = (
        "import sys, time\nfrom pyqmigrate.mount.private import open_private\n"
        "view = open_private(sys.argv[1])\n"
        "print(view.path, view.status()['keeper'], flush=True)\ntime.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(guest)],
        stdout=subprocess.PIPE,
        text=True,
        env={**child_environment, "XDG_RUNTIME_DIR": str(runtime)},
    )
    assert process.stdout is not None
    path, keeper = process.stdout.readline().split()
    assert find_mounts(path)
    process.kill()
    process.communicate()
    await_that(lambda: not is_there(int(keeper)))
    assert find_mounts(path) == []
    assert list(runtime.iterdir()) == []


def test_reads_are_recorded_in_their_order(guest: Path) -> None:
    with open_private(guest, record=True) as view, (view.path / "guest").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4096, 2 << 20)
        os.pread(file.fileno(), 4096, 1 << 20)
        reads = view.requests()
        assert [read.name for read in reads] == ["guest"] * len(reads)
        starts = [read.offset for read in reads]
        assert starts.index(2 << 20) < starts.index(1 << 20)


def test_nothing_is_pushed_for_a_file_that_was_not_opened(guest: Path) -> None:
    with open_private(guest) as view:
        with pytest.raises(UsageError, match="'guest' has not been opened"):
            view.push([FileRange("guest", 0, 4096)])
        with (view.path / "guest").open("rb"):
            view.push([FileRange("guest", 0, 4096)])
            await_that(lambda: view.status()["pushed"] == 4096)


def test_credentials_of_a_url_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MountRequest] = []

    def start(keeper: WaitingKeeper, request: MountRequest) -> NoReturn:
        keeper.close()
        seen.append(request)
        raise TargetError(5, "not here")

    monkeypatch.setattr(private.WaitingKeeper, "start", start)
    url = "https://user:secret@host:8080/a/store?token=secret"
    with pytest.raises(TargetError):
        open_private(url)
    assert (seen[0].place, seen[0].shown) == (url, "https://host:8080/a/store")


def test_missing_store_is_an_error_and_leaves_nothing(runtime: Path, mount_point: Path) -> None:
    with pytest.raises((UsageError, TargetError)):
        open_private(mount_point)  # a directory that is not a store
    assert list(runtime.iterdir()) == []
    assert not [m for m in find_mounts() if m.directory.startswith(str(runtime))]


def test_keeper_that_was_killed_is_an_error_for_questions_only(guest: Path) -> None:
    view = open_private(guest)
    status = view.status()
    with (view.path / "guest").open("rb") as file:
        view.hide()
        os.kill(status["keeper"], 9)
        await_that(lambda: not is_there(status["keeper"]))
        assert file.read() == guest.read_bytes()  # the worker still serves
        with pytest.raises(TargetError, match="keeper"):
            view.status()
    view.close()
    await_that(lambda: not is_there(status["worker"]))


def test_prepared_keeper_serves_the_next_mount_of_its_place_only(
    guest: Path, runtime: Path
) -> None:
    with prepare_private(guest) as prepared:
        with open_private(guest) as view:
            assert view.path == prepared.path
            assert (view.path / "guest").read_bytes() == guest.read_bytes()
        with open_private(guest) as other:
            assert other.path != prepared.path


def test_prepared_keeper_that_is_not_used_leaves_nothing(
    guest: Path, runtime: Path, mount_point: Path
) -> None:
    with prepare_private(guest) as prepared, open_private(guest) as view:
        assert view.path == prepared.path
    with prepare_private(mount_point):
        assert len(list(runtime.iterdir())) == 1
        await_that(lambda: bool(keepers(runtime)))  # it has become that program
    await_that(lambda: not keepers(runtime))
    assert list(runtime.iterdir()) == []
    with open_private(guest) as view:  # what was prepared is gone
        assert os.listdir(view.path)


def is_held(document: Path) -> bool:
    with document.open("rb") as file:
        try:
            lock_file(file.fileno(), exclusive=True)
        except BlockingIOError:
            return True
    return False


def test_open_snapshot_that_nobody_reads_is_held_by_the_next_worker(
    tmp_path: Path, mount_point: Path
) -> None:
    with Store.create(tmp_path / "store") as store:
        put_snapshot(store, "a", image(4))
        document = tmp_path / "store/snapshots/a.snap"
        with open_private(tmp_path / "store") as view:
            fd = os.open(view.path / "a", os.O_RDONLY)
            assert is_held(document)
            os.kill(view.status()["worker"], signal.SIGKILL)
            await_that(lambda: view.status()["restarts"] == 1)
            await_that(lambda: is_held(document))
            assert remove(store, ["a"]).in_use == ("a",)
            os.close(fd)
            await_that(lambda: not is_held(document))
        assert remove(store, ["a"]).removed == ("a",)
