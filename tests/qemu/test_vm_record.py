"""What a save records of a real QEMU, and a restore by the record alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.vm.record.contents import record_path
from tests.harness.bare import BareQemu
from tests.harness.recorded import MIB, SIZE, VM, drive, image, restored, saved

pytestmark = pytest.mark.qemu

SECRET = "hunter2"


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where monitors are: it stays when QEMU has ended, so that another one can be there."""
    return tmp_path_factory.mktemp("monitor")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return image(tmp_path / "disk")


def test_record_says_what_the_vm_is(tmp_path: Path, disk: Path) -> None:
    extra = ["-object", f"secret,id=s0,data={SECRET}", "-device", "e1000,id=n0"]
    with BareQemu(*VM, *drive(disk), *extra, cwd=tmp_path) as qemu:
        record = saved(qemu, tmp_path / "snap")
        words = Path(f"/proc/{qemu.process.pid}/cmdline").read_bytes()
        assert record.command is not None
        assert len(record.command) == words.count(b"\0")
        assert SECRET not in record_path(tmp_path / "snap").read_text()
        (number,) = record.qemu.redacted
        assert record.command[number].startswith("secret,id=s0")
        assert record.qemu.directory == str(tmp_path)
        assert record.qemu.binary == str(Path(f"/proc/{qemu.process.pid}/exe").readlink())
    assert record.machine.type.startswith("pc-i440fx-")
    assert (record.machine.target, record.machine.accelerator) == ("x86_64", "tcg")
    assert record.machine.memory == 32 * MIB
    assert (record.cpus.number, record.cpus.type) == (2, "qemu64-x86_64-cpu")
    assert ("/machine/peripheral/n0", "e1000") in record.devices
    assert {block.name: block.length for block in record.blocks}["pc.ram"] == 32 * MIB
    (found,) = (each for each in record.disks if each.writable)
    assert (found.device, found.file, found.format) == ("d0", str(disk), "raw")
    state, info = found.images[0].state, disk.stat()
    assert state is not None
    assert (state.size, state.mtime_ns, state.inode) == (SIZE, info.st_mtime_ns, info.st_ino)
    assert record.save.run_state == "prelaunch" and not record.save.resumed
    assert record_path(tmp_path / "snap").stat().st_mode & 0o777 == 0o600


def test_chain_of_images_is_recorded_with_their_formats(tmp_path: Path, disk: Path) -> None:
    with BareQemu(*VM, *drive(disk), run=True) as qemu:
        saved(qemu, tmp_path / "one", with_disks=True)
        record = saved(qemu, tmp_path / "two", with_disks=True)
    (found,) = (each for each in record.disks if each.writable)
    names = [(Path(each.file).name, each.format) for each in found.images]
    assert names == [("disk.one.qcow2", "qcow2"), ("disk", "raw")]
    assert all(each.state is not None for each in found.images)
    assert found.images[0].state.qcow2 is not None  # type: ignore[union-attr]
    assert Path(found.continued_in or "").name == "disk.two.qcow2"


def test_record_has_its_name_only_with_its_snapshot(tmp_path: Path) -> None:
    with BareQemu(*VM) as qemu:
        saved(qemu, tmp_path / "snap")
        before = record_path(tmp_path / "snap").read_bytes()
        (tmp_path / "snap").unlink()
        (tmp_path / "snap").mkdir()  # it cannot be replaced
        with pytest.raises(PyqmigrateError):
            saved(qemu, tmp_path / "snap")
    assert record_path(tmp_path / "snap").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snap", "snap.vm.json"]


@pytest.mark.parametrize("kind", ["text", "link", "directory"])
def test_file_that_is_not_a_record_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = record_path(tmp_path / "snap")
    if kind == "text":
        path.write_text("{}")
    elif kind == "link":
        (tmp_path / "notes").write_text("{}")
        path.symlink_to("notes")
    else:
        path.mkdir()
    before = sorted(each.name for each in tmp_path.iterdir())
    with BareQemu(*VM) as qemu, pytest.raises(UsageError, match="the record would replace"):
        saved(qemu, tmp_path / "snap")
    assert sorted(each.name for each in tmp_path.iterdir()) == before


def test_name_of_255_bytes_is_saved_and_restored(tmp_path: Path, place: Path) -> None:
    snapshot = tmp_path / ("s" * 255)
    with BareQemu(*VM, socket=place / "qmp") as qemu:
        saved(qemu, snapshot, then="quit")
    restored(snapshot)
