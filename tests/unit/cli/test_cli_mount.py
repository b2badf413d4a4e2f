"""``pyqmigrate mount`` and ``umount``, run as a user runs them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.mount.mounting import find_mounts, unmount
from pyqmigrate.store.store import Store
from tests.harness.command import COMMAND, Command
from tests.harness.json_page import assert_as_documented
from tests.harness.mounted import await_that, need_fuse
from tests.harness.stores import Added, image, put_snapshot


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A mount point, from which everything is unmounted in the end."""
    path = tmp_path / "shown"
    path.mkdir()
    need_fuse(path)
    yield path
    while find_mounts(str(path)):
        unmount(str(path), lazy=True)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with Store.create(path) as store:
        added = Added()
        put_snapshot(store, "monday", image(300), added=added)
        put_snapshot(store, "tuesday", image(300, 1), added=added)
    return path


def test_store_is_shown_until_it_is_unmounted(
    store: Path, directory: Path, command: Command
) -> None:
    ran = command("mount", "--json", store, directory)
    assert ran.code == 0, ran.err
    assert_as_documented("mount", ran.json)
    names = ["monday", "monday.seal", "tuesday", "tuesday.seal"]
    assert sorted(os.listdir(directory)) == names
    assert (directory / "tuesday").read_bytes() == image(300, 1)
    ran = command("umount", "--json", directory)
    assert ran.code == 0, ran.err
    assert_as_documented("umount", ran.json)
    assert ran.json["ended"]
    assert os.listdir(directory) == []


def test_snapshots_that_are_added_and_removed_later_appear_and_disappear(
    store: Path, directory: Path, command: Command
) -> None:
    assert command("mount", "-q", store, directory).code == 0
    with Store.open(store) as opened:
        put_snapshot(opened, "wednesday", image(100, 2))
        opened.write_working_set("wednesday", b"pages")
        assert (directory / "wednesday").read_bytes() == image(100, 2)
        assert (directory / "wednesday.workingset").read_bytes() == b"pages"
        assert "wednesday.workingset" in os.listdir(directory)
        opened.place.delete("snapshots/monday.snap")
    assert "monday" not in os.listdir(directory)
    await_that(lambda: not (directory / "monday").exists())


def test_damaged_pack_is_an_error_and_a_message_with_snapshot_and_pack(
    store: Path, directory: Path, command: Command
) -> None:
    for pack in (store / "packs").iterdir():
        content = bytearray(pack.read_bytes())
        content[len(content) // 2] ^= 1
        pack.write_bytes(content)
    assert command("mount", store, directory).code == 0
    with pytest.raises(OSError, match="Input/output error"):
        (directory / "monday").read_bytes()
    (status,) = command("mount", "--status", "--json", directory).json["mounts"]
    assert "monday" in status["messages"][0]["text"]
    assert "pack" in status["messages"][0]["text"]
    assert "monday" in command("mount", "--status", directory).out


def test_damaged_snapshot_is_listed_and_a_message_says_why_it_cannot_be_opened(
    store: Path, directory: Path, command: Command
) -> None:
    (store / "snapshots/monday.snap").write_bytes(b"damaged")
    assert command("mount", store, directory).code == 0
    assert "monday" in os.listdir(directory)
    with pytest.raises(OSError, match="Input/output error"):
        (directory / "monday").stat()
    assert (directory / "tuesday").read_bytes() == image(300, 1)
    (status,) = command("mount", "--status", "--json", directory).json["mounts"]
    assert status["messages"][0]["text"].startswith("monday: cannot be shown: ")


def test_status_of_all_mounts_and_of_one(store: Path, directory: Path, command: Command) -> None:
    assert command("mount", store, directory).code == 0
    assert (directory / "monday").read_bytes() == image(300)
    ran = command("mount", "--status", "--json", directory)
    assert_as_documented("mount", ran.json)
    (status,) = ran.json["mounts"]
    assert (status["directory"], status["place"]) == (str(directory), str(store))
    assert status["bytes_read"] == len(image(300))
    everything = command("mount", "--status", "--json").json["mounts"]
    assert str(directory) in [mount["directory"] for mount in everything]
    assert f"{directory}: {store}, keeper " in command("mount", "--status").out


def test_mount_in_use_is_not_unmounted_and_its_user_is_named(
    store: Path, directory: Path, command: Command
) -> None:
    assert command("mount", store, directory).code == 0
    with (directory / "monday").open("rb") as file:
        ran = command("umount", directory)
        assert ran.code == 3
        assert f"in use by {Path('/proc/self/comm').read_text().strip()} ({os.getpid()})" in ran.err
        ran = command("umount", "--lazy", "--json", directory)
        assert (ran.code, ran.json["ended"]) == (0, False)
        assert not find_mounts(str(directory))
        assert file.read() == image(300)


def test_mount_whose_processes_were_killed_can_be_unmounted(
    store: Path, directory: Path, command: Command
) -> None:
    assert command("mount", store, directory).code == 0
    (status,) = command("mount", "--status", "--json", directory).json["mounts"]
    for process in (status["keeper"], status["worker"]):
        os.kill(process, signal.SIGKILL)
    with pytest.raises(OSError) as caught:
        await_that(lambda: not os.listdir(directory))
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    ran = command("mount", "--status", "--json", directory)
    assert_as_documented("mount", ran.json)
    assert ran.json["mounts"][0]["keeper"] is None
    assert "its keeper does not answer" in command("mount", "--status", directory).out
    ran = command("umount", "--json", directory)
    assert (ran.code, ran.json["keeper"], ran.json["ended"]) == (0, None, True)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("{store}",), 2, "STORE and DIR are required"),
        (("{store}", "{store}"), 2, "not empty"),
        (("{store}", "{missing}"), 3, "no file"),
        (("{missing}", "{directory}"), 3, "no file"),
        (("{directory}", "{directory}"), 2, "not a store"),
        (("--log", "{directory}/log", "{store}", "{directory}"), 2, "is used by the mount"),
        (("{store}", "{store}/working-sets"), 2, "is in the store itself"),
        (("--status", "{directory}"), 2, "not a mount of pyqmigrate"),
        (("--status", "{store}", "{directory}"), 2, "--status takes DIR"),
    ],
)
def test_what_cannot_be_mounted_is_refused(
    store: Path,
    directory: Path,
    command: Command,
    arguments: tuple[str, ...],
    code: int,
    reason: str,
) -> None:
    (store / "working-sets").mkdir()
    places = {"store": store, "directory": directory, "missing": store.parent / "missing"}
    ran = command("mount", *(argument.format(**places) for argument in arguments))
    assert ran.code == code, ran.err
    assert reason in ran.err
    assert not find_mounts(str(directory))


def test_only_a_mount_of_this_package_is_unmounted(tmp_path: Path, command: Command) -> None:
    for place in (tmp_path, "/proc"):
        ran = command("umount", place)
        assert ran.code == 2
        assert "is not a mount of pyqmigrate" in ran.err
    assert os.path.ismount("/proc")


def test_foreground_prints_messages_and_ctrl_c_unmounts(store: Path, directory: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "mount", "--foreground", str(store), str(directory)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert f"{directory}: shows {store}" in process.stderr.readline()
    for pack in (store / "packs").iterdir():
        pack.unlink()
    with pytest.raises(OSError, match="Input/output error"):
        (directory / "monday").read_bytes()
    assert "pyqmigrate: monday: cannot read" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert not find_mounts(str(directory))
    process.stderr.close()


def test_log_gets_the_messages(store: Path, directory: Path, command: Command) -> None:
    log = store.parent / "mount.log"
    assert command("mount", "--log", log, store, directory).code == 0
    for pack in (store / "packs").iterdir():
        pack.unlink()
    with pytest.raises(OSError, match="Input/output error"):
        (directory / "monday").read_bytes()
    await_that(lambda: "monday: cannot read" in log.read_text())
    assert log.stat().st_mode & 0o777 == 0o600


def test_other_users_read_only_what_is_allowed(
    store: Path, directory: Path, command: Command
) -> None:
    for allowed in ((), ("--allow-other",)):
        assert command("mount", *allowed, store, directory).code == 0
        mode = (directory / "monday").stat().st_mode & 0o777
        assert mode == (0o444 if allowed else 0o400)
        assert command("umount", directory).code == 0


def test_single_file_is_shown_too(directory: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "guest").write_bytes(image(10))
    assert command("mount", tmp_path / "guest", directory).code == 0
    assert (directory / "guest").read_bytes() == image(10)
    assert command("umount", directory).code == 0


def test_verbs_of_reading_take_files_of_a_mount_as_they_are(
    directory: Path, snapshot: Path, command: Command
) -> None:
    assert command("seal", snapshot).code == 0
    assert command("mount", snapshot, directory).code == 0
    assert command("verify", directory / snapshot.name).code == 0
    assert command("info", directory / snapshot.name).code == 0
