"""Snapshots that are not local files: plain objects, and those of a store."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyqmigrate import SnapshotError, UsageError, convert, save, verify_seal
from pyqmigrate.fleet import FleetReport, Kind, Result, Verb, Verdict, Work, list_targets, run
from pyqmigrate.fleet.checking import verify_shown
from pyqmigrate.fleet.partial_copy import PartialCopy
from pyqmigrate.integrity.manifest import decode_manifest, read_manifest
from pyqmigrate.io.plain_file import LocalPlainFile
from pyqmigrate.store import Store, add
from pyqmigrate.store.place import open_place
from tests.harness.fleet import COMMAND, make_fleet
from tests.harness.object_store import ObjectStore, object_store  # noqa: F401
from tests.harness.sealed import Sealed
from tests.harness.snapshots import save_known


def verify(*words: str, verb: Verb = Verb.VERIFY, **options: object) -> FleetReport:
    return run(Work(verb), list_targets(words).targets, **options)  # type: ignore[arg-type]


def names(results: object) -> list[str]:
    return [result.name.rpartition("/")[2] for result in results]  # type: ignore[attr-defined]


def upload(directory: Path, url: str) -> None:
    """Put every file of a directory below a URL."""
    place = open_place(url)
    for path in sorted(directory.iterdir()):
        place.replace(path.name, path.read_bytes())


@pytest.fixture
def objects(tmp_path: Path) -> str:
    """A prefix with six snapshots, two of them damaged, and another file."""
    make_fleet(tmp_path / "objects", 6, 2)
    (tmp_path / "objects" / "notes").write_text("notes")
    url = f"memory://{tmp_path.name}/"
    upload(tmp_path / "objects", url)
    return url


def test_damaged_objects_are_found_and_other_objects_skipped(objects: str, tmp_path: Path) -> None:
    report = verify(objects)
    assert names(report.damaged) == ["guest-001.mapped", "guest-004.mapped"]
    assert names(report.of(Verdict.SKIPPED)) == ["notes"]
    assert len(report.of(Verdict.GOOD)) == 4
    local = verify_seal(tmp_path / "objects" / "guest-001.mapped")
    assert local is not None
    assert report.damaged[0].message == str(local.damages[0])


def test_one_object_and_a_pattern(objects: str) -> None:
    assert names(verify(f"{objects}guest-002.mapped").results) == ["guest-002.mapped"]
    assert len(list_targets([f"{objects}guest*"]).targets) == 6
    with pytest.raises(OSError, match="no such object"):
        list_targets([f"{objects}missing"])


def test_a_second_run_does_what_changed_only(objects: str, tmp_path: Path) -> None:
    verify(objects, table=tmp_path / "t")
    open_place(objects).replace("guest-000.mapped", b"QEVM and no more")
    done: list[Result] = []
    verify(objects, table=tmp_path / "t", found=done.append)
    assert names(done) == ["guest-000.mapped"]
    assert done[0].verdict is Verdict.DAMAGED


@pytest.mark.parametrize("kind", ["stream", "gzip"])
def test_other_kinds_of_objects_are_verified(tmp_path: Path, kind: str) -> None:
    save_known(tmp_path / "plain")
    directory = tmp_path / "objects"
    directory.mkdir()
    convert(tmp_path / "plain", directory / "guest", to="stream")
    if kind == "gzip":
        subprocess.run(["gzip", directory / "guest"], check=True)
    url = f"memory://{tmp_path.name}/"
    upload(directory, url)
    (result,) = verify(url).results
    assert result.verdict is Verdict.GOOD, result.message
    with_facts = verify(url, verb=Verb.INFO).results[0].data
    assert with_facts["total_ram"] == 2 << 20


def test_info_reads_the_framing_only(tmp_path: Path) -> None:
    save(tmp_path / "guest", [_block("ram", 32 << 20)])

    class Counting(LocalPlainFile):
        read_bytes = 0

        def read(self, offset: int, length: int) -> bytes:
            self.read_bytes += length
            return super().read(offset, length)

    from pyqmigrate.fleet.describing import describe_shown

    plain = Counting(tmp_path / "guest")
    found = describe_shown(plain, "guest", lambda: None)
    plain.close()
    assert found.data["data_pages"] == 8192
    assert plain.read_bytes < 3 << 20


def _block(name: str, length: int) -> object:
    from pyqmigrate import RamBlock

    return RamBlock(name, bytearray(b"x" * length))


def test_a_seal_in_memory_is_read_as_a_file_is(tmp_path: Path) -> None:
    sealed = Sealed.make(tmp_path / "guest")
    data = sealed.seal.read_bytes()
    assert decode_manifest(data) == read_manifest(sealed.seal)
    for bad in (data[:-1], data + b"x", data[:-5] + b"12345", b"", b"\n", b"x" * 100):
        with pytest.raises(SnapshotError):
            decode_manifest(bad)


@pytest.mark.parametrize("where", [0, 30, -1])
def test_each_damage_is_found_as_in_a_local_file(tmp_path: Path, where: int) -> None:
    sealed = Sealed.make(tmp_path / "guest")
    data = bytearray(sealed.path.read_bytes())
    data[where if where else sealed.block("big")[1]] ^= 1
    times = sealed.path.stat()
    sealed.path.write_bytes(data)
    os.utime(sealed.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    plain = LocalPlainFile(sealed.path)
    found = verify_shown(plain, str(sealed.path), lambda: None)
    plain.close()
    local = [damage.to_json() for damage in sealed.check().damages]
    assert found.verdict is Verdict.DAMAGED
    assert found.data["seal"]["damages"] == local


@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_another_length_than_sealed_is_damage(tmp_path: Path, change: str) -> None:
    sealed = Sealed.make(tmp_path / "guest")
    size = sealed.path.stat().st_size + (-5000 if change == "shorter" else 5000)
    os.truncate(sealed.path, size)
    plain = LocalPlainFile(sealed.path)
    found = verify_shown(plain, str(sealed.path), lambda: None)
    plain.close()
    local = [damage.to_json() for damage in sealed.check().damages]
    assert found.data["seal"]["damages"] == local


def test_a_partial_copy_has_no_name_and_what_was_fetched(tmp_path: Path) -> None:
    save_known(tmp_path / "guest")
    data = (tmp_path / "guest").read_bytes()
    plain = LocalPlainFile(tmp_path / "guest")
    copy = PartialCopy(plain, "guest")
    assert "(deleted)" in os.readlink(f"/proc/self/fd/{copy.fd}")
    assert copy.read_at(100_000, 100_000) == data[100_000:200_000]
    assert copy.read_at(len(data) - 10, 100) == data[-10:]
    assert copy.size == len(data)
    copy.fetch_all()
    assert os.pread(copy.fd, len(data), 0) == data
    copy.close()
    plain.close()


def test_stored_snapshots_are_verified_and_a_damaged_pack_is_named(tmp_path: Path) -> None:
    save_known(tmp_path / "a", seed=1)
    save_known(tmp_path / "b", seed=2)
    with Store.create(tmp_path / "store") as store:
        for name in "ab":
            add(store, tmp_path / name, name)
    assert [r.verdict for r in verify(str(tmp_path / "store")).results] == [Verdict.GOOD] * 2
    assert verify(str(tmp_path / "store"), verb=Verb.INFO).results[0].data["total_ram"] == 2 << 20
    with Store.open(tmp_path / "store") as store:
        pack = store.read_snapshot("b").packs[-1].hex()
    path = tmp_path / "store" / "packs" / f"{pack}.pack"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    report = verify(str(tmp_path / "store"))
    assert [result.verdict for result in report.results] == [Verdict.GOOD, Verdict.DAMAGED]
    assert pack in report.damaged[0].message


def test_add_stores_files_and_objects_and_a_repeated_run_adds_nothing(
    objects: str, tmp_path: Path
) -> None:
    (tmp_path / "files" / "web").mkdir(parents=True)
    save_known(tmp_path / "files" / "web" / "one two", seed=5)
    Store.create(tmp_path / "store").close()
    work = Work(Verb.ADD, store=str(tmp_path / "store"))
    targets = list_targets([objects, str(tmp_path / "files")]).targets
    report = run(work, targets)
    assert len(report.of(Verdict.GOOD)) == 7, report.failed
    with Store.open(tmp_path / "store") as store:
        assert store.names()[-1] == "web+one_two"
        with store.open_file("guest-002.mapped") as file:
            whole = bytes(file.read(0, file.size))
    assert whole[-100:] == (tmp_path / "objects" / "guest-002.mapped").read_bytes()[-100:]
    again = run(work, targets)  # as after a kill before the table was written
    assert not any(result.data["added"] for result in again.of(Verdict.GOOD))
    save_known(tmp_path / "files" / "web" / "one two", seed=6)
    changed = run(work, list_targets([str(tmp_path / "files")]).targets)
    assert "has another snapshot" in changed.failed[0].message


def test_what_a_verb_cannot_do_is_refused_before_anything_is_done(
    objects: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is an object"):
        verify(objects, verb=Verb.SEAL)
    with pytest.raises(UsageError, match="needs a store"):
        verify(objects, verb=Verb.ADD)
    for name in "xy":
        (tmp_path / name).mkdir()
        save_known(tmp_path / name / "same")
    with pytest.raises(UsageError, match="both be stored as 'same'"):
        targets = list_targets([str(tmp_path / name) for name in "xy"]).targets
        run(Work(Verb.ADD, store=str(tmp_path)), targets)


def test_an_object_store_on_the_network(
    object_store: ObjectStore,  # noqa: F811
    tmp_path: Path,
) -> None:
    make_fleet(tmp_path / "objects", 4, 1)
    upload(tmp_path / "objects", object_store.url("saves/"))
    command = [*COMMAND, "verify", object_store.url("saves") + "/", "--table", "t", "--json"]
    before = len(object_store.requests)
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 1, first.stderr
    assert len(object_store.requests) - before <= 1 + 2 * 4  # a list; each snapshot and its seal
    before = len(object_store.requests)
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 1
    assert len(object_store.requests) - before == 1
    for output in (first, second):
        assert "very-secret-key" not in output.stdout + output.stderr
    object_store.stop()
    assert object_store.environment["AWS_ACCESS_KEY_ID"]


def test_an_object_that_vanishes_has_failed(objects: str) -> None:
    targets = list_targets([objects]).targets
    assert {target.kind for target in targets} == {Kind.OBJECT}
    open_place(objects).delete("guest-000.mapped")
    report = run(Work(Verb.VERIFY), targets)
    assert names(report.failed) == ["guest-000.mapped"]
