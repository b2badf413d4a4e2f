"""Places of objects: a directory, memory, and a real object store on the loopback interface."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import NotSupported, SnapshotError, TargetError, UsageError
from pyqmigrate.store import object_place
from pyqmigrate.store.local_place import LocalPlace
from pyqmigrate.store.place import Place, is_unreachable, open_place, read_at_most
from tests.harness.object_store import ObjectStore, object_store

__all__ = ["object_store"]

KINDS = ["directory", "memory", "s3"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "directory":
        found = open_place(str(tmp_path))
    elif request.param == "memory":
        pytest.importorskip("obstore")
        found = open_place(f"memory://{tmp_path.name}-{os.urandom(4).hex()}")
    else:
        server: ObjectStore = request.getfixturevalue("object_store")
        found = open_place(server.url("some/prefix"))
    yield found
    found.close()


def keys(place: Place, prefix: str) -> list[str]:
    return [entry.key for entry in place.list(prefix)]


def number(call: Callable[[], object]) -> int:
    with pytest.raises(TargetError) as error:
        call()
    return error.value.errno or 0


def test_an_object_is_read_back_in_ranges(place: Place) -> None:
    assert place.write_new("a/b", b"0123456789")
    assert bytes(place.read("a/b")) == b"0123456789"
    assert bytes(place.read("a/b", 3, 4)) == b"3456"
    assert bytes(place.read("a/b", 8)) == b"89"
    assert bytes(place.read("a/b", 8, 100)) == b"89"
    assert bytes(place.read("a/b", 10, 1)) == b""
    assert bytes(place.read("a/b", 11, 5)) == b""
    assert bytes(place.read("a/b", 0, 0)) == b""


def test_the_end_of_an_object_is_read_with_its_size(place: Place) -> None:
    place.write_new("a/b", b"0123456789")
    place.write_new("a/empty", b"")
    data, size = place.read_end("a/b", 4)
    assert (bytes(data), size) == (b"6789", 10)
    data, size = place.read_end("a/b", 400)
    assert (bytes(data), size) == (b"0123456789", 10)
    data, size = place.read_end("a/empty", 4)
    assert (bytes(data), size) == (b"", 0)


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_key_that_exists_is_not_written_again(place: Place, size: int) -> None:
    assert place.write_new("a/b", b"a" * size)
    assert not place.write_new("a/b", b"b" * size)
    assert bytes(place.read("a/b", 0, 3)) == b"aaa"


def test_an_object_is_replaced(place: Place) -> None:
    place.replace("x", b"old")
    place.replace("x", b"new one")
    assert bytes(place.read("x")) == b"new one"


def test_a_deleted_object_is_gone(place: Place) -> None:
    place.write_new("a/b", b"1")
    assert place.delete("a/b")
    assert place.find("a/b") is None
    place.delete("a/b")  # idempotent
    assert number(lambda: place.read("a/b")) == errno.ENOENT


def test_a_missing_object_is_enoent_with_the_place_and_the_key(place: Place) -> None:
    for call in (lambda: place.read("a/b"), lambda: place.read_end("a/b", 1)):
        with pytest.raises(TargetError) as error:
            call()
        assert error.value.errno == errno.ENOENT
        assert str(error.value.filename) == f"{place.name}/a/b"


def test_objects_are_listed_below_a_prefix(place: Place) -> None:
    for key in ("store.json", "a/1", "a/2", "a/deep/3", "ab/4"):
        place.write_new(key, key.encode())
    assert sorted(keys(place, "a/")) == ["a/1", "a/2", "a/deep/3"]
    assert sorted(keys(place, "")) == ["a/1", "a/2", "a/deep/3", "ab/4", "store.json"]
    assert keys(place, "none/") == []
    entry = next(entry for entry in place.list("") if entry.key == "store.json")
    assert entry.size == 10
    assert entry == place.find("store.json")
    assert 1.7e9 < entry.mtime < 4e9


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a//b", "a/../../b", "..", ".", "a/./b", "a\0b", "x" * 1025]
)
def test_a_key_that_leaves_the_place_is_refused(place: Place, key: str) -> None:
    for call in (place.read, place.find, place.delete):
        with pytest.raises(UsageError):
            call(key)
    for write in (place.write_new, place.replace):
        with pytest.raises(UsageError):
            write(key, b"")


def test_only_one_of_many_writers_gets_a_key(place: Place) -> None:
    won: list[int] = []

    def write(n: int) -> None:
        if place.write_new("one", bytes([n])):
            won.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bytes([n]) for n in won] == [bytes(place.read("one"))]


def test_an_object_larger_than_its_limit_is_not_read(place: Place) -> None:
    place.write_new("x", bytes(100))
    assert len(read_at_most(place, "x", 100, "file")) == 100
    with pytest.raises(SnapshotError, match=r"the file 'x' of .* larger than 99 bytes"):
        read_at_most(place, "x", 99, "file")


# ---- a directory ----


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalPlace]:
    (tmp_path / "store" / "packs").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    found = LocalPlace(tmp_path / "store")
    yield found
    found.close()


def test_a_symbolic_link_in_a_directory_is_not_followed(local: LocalPlace, tmp_path: Path) -> None:
    (local.directory / "packs" / "x").symlink_to("../../secret")
    for call in (lambda: local.read("packs/x"), lambda: local.read_end("packs/x", 1)):
        assert number(call) == errno.ELOOP
    assert number(lambda: local.find("packs/x")) == errno.ELOOP
    assert number(lambda: list(local.list("packs/"))) == errno.ELOOP
    assert not local.write_new("packs/x", b"new")
    local.replace("packs/x", b"new")  # the link, not the file that it leads to
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_folder_that_is_a_symbolic_link_is_not_followed(
    local: LocalPlace, tmp_path: Path
) -> None:
    (local.directory / "snapshots").symlink_to("..")
    for call in (
        lambda: local.read("snapshots/secret"),
        lambda: local.find("snapshots/secret"),
        lambda: local.write_new("snapshots/new", b""),
        lambda: local.replace("snapshots/secret", b""),
        lambda: local.delete("snapshots/secret"),
        lambda: list(local.list("snapshots/")),
    ):
        with pytest.raises(TargetError, match="symbolic link in a store is not followed"):
            call()
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert not (tmp_path / "new").exists()


def test_deleting_a_symbolic_link_leaves_its_target(local: LocalPlace, tmp_path: Path) -> None:
    (local.directory / "packs" / "x").symlink_to("../../secret")
    assert local.delete("packs/x")
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_fifo_is_not_waited_for(local: LocalPlace) -> None:
    os.mkfifo(local.directory / "packs" / "x")
    assert number(lambda: local.read("packs/x")) == errno.EINVAL


def test_hidden_files_are_not_listed(local: LocalPlace) -> None:
    (local.directory / "packs" / ".x.partial").write_bytes(b"")
    assert keys(local, "packs/") == []


def test_objects_of_a_directory_belong_to_the_user_alone(local: LocalPlace) -> None:
    local.write_new("snapshots/x", b"1")
    assert (local.directory / "snapshots").stat().st_mode & 0o777 == 0o700
    assert (local.directory / "snapshots" / "x").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("same_descriptors")
def test_no_descriptor_is_left(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "new", create=True)
    place.write_new("a/b", b"1")
    assert number(lambda: place.read("a/c")) == errno.ENOENT
    assert keys(place, "") == ["a/b"]
    place.close()
    place.close()
    assert number(lambda: place.read("a/b")) == errno.EBADF


def test_a_directory_that_is_missing_is_enoent(tmp_path: Path) -> None:
    assert number(lambda: open_place(str(tmp_path / "none"))) == errno.ENOENT


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    with pytest.raises(UsageError, match="not the URL of a local directory"):
        open_place("file://otherhost/a")
    assert open_place(f"file://{tmp_path}/a%20b").directory == tmp_path / "a b"


# ---- an object store ----


def test_a_server_that_is_gone_is_unreachable_and_answers_later(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(object_place._RETRIES, "max_retries", 1)
    place = open_place(object_store.url("p"))
    place.write_new("a", b"1")
    object_store.stop()
    try:
        with pytest.raises(TargetError, match="the object store does not answer") as error:
            place.read("a")
    finally:
        object_store.start()
    assert is_unreachable(error.value)
    assert bytes(place.read("a")) == b"1"


def test_a_large_object_that_exists_is_not_sent(object_store: ObjectStore) -> None:
    place = open_place(object_store.url("p"))
    place.write_new("a", bytes(1 << 20))
    place.write_new("a", bytes(1 << 20))
    assert object_store.count("PUT", "p/a") == 1


def test_a_bucket_that_is_missing_is_named(object_store: ObjectStore) -> None:
    place = open_place("s3://no-such-bucket/p")
    for call in (lambda: place.read("a"), lambda: list(place.list("a/"))):
        with pytest.raises(TargetError, match="NoSuchBucket") as error:
            call()
        assert error.value.errno == errno.ENOENT


def test_no_error_shows_a_credential(object_store: ObjectStore) -> None:
    secret = object_store.environment["AWS_SECRET_ACCESS_KEY"]
    place = open_place("s3://no-such-bucket/p")
    texts = []
    for call in (lambda: place.read("a"), lambda: place.write_new("a", b"")):
        with pytest.raises(TargetError) as error:
            call()
        texts.append(f"{error.value} {error.value.__cause__} {error.value.filename}")
    for url in (f"http://user:{secret}@localhost/x", f"https://localhost/x?sig={secret}"):
        with pytest.raises(UsageError) as usage:
            open_place(url)
        texts.append(str(usage.value))
    assert not [text for text in texts if secret in text]


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "s3://", "s3://[x", "http://h:x/", "file://[x/", "az://container/path"]
)
def test_a_url_that_cannot_be_opened_is_a_usage_error(url: str) -> None:
    pytest.importorskip("obstore")
    with pytest.raises(UsageError):
        open_place(url)


def test_without_the_library_the_command_for_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    monkeypatch.setitem(__import__("sys").modules, "obstore.exceptions", None)
    with pytest.raises(NotSupported, match="pip install obstore"):
        open_place("s3://bucket/x")
