"""A compact file has the bytes of the snapshot, and what was beside it."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

import pyqmigrate
from pyqmigrate import (
    Cancelled,
    Descriptors,
    NotSupported,
    SnapshotError,
    TargetError,
    UsageError,
    compact,
    open_snapshot,
)
from pyqmigrate.cli import main as command
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.format.seal import SealLine
from pyqmigrate.io.seekable_file import SeekableFile
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.sequential import SequentialWriter
from pyqmigrate.snapshot.save.writer import SaveOptions
from tests.harness.background import write_background_snapshot
from tests.harness.increment_files import MACHINE, save_base, save_increment
from tests.harness.snapshots import Bytes, load, ram
from tests.harness.stream_builders import full

NPAGES = 700


@pytest.fixture
def memory() -> Bytes:
    return ram(NPAGES, seed=8)


@pytest.fixture
def snapshot(tmp_path: Path, memory: Bytes) -> Path:
    save_base(tmp_path / "guest", {"pc.ram": memory})
    return tmp_path / "guest"


def decompressed(path: Path) -> bytes:
    """By the library, front to back, as a program that does not know the table."""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return bytes(reader.read())


def test_the_plain_file_comes_back_byte_for_byte(tmp_path: Path, snapshot: Path) -> None:
    report = compact(snapshot, tmp_path / "compact")
    plain = snapshot.read_bytes()
    assert decompressed(tmp_path / "compact") == plain
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        assert file.read(0, file.size) == plain
        assert file.mtime_ns == snapshot.stat().st_mtime_ns
    assert (report.size, report.compact_size) == (len(plain), (tmp_path / "compact").stat().st_size)
    assert not report.converted
    assert (tmp_path / "compact").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd command")
def test_the_zstd_command_tests_and_decompresses_it(tmp_path: Path, snapshot: Path) -> None:
    compact(snapshot, tmp_path / "compact.zst")
    subprocess.run(["zstd", "-tq", tmp_path / "compact.zst"], check=True)
    subprocess.run(["zstd", "-dq", tmp_path / "compact.zst", "-o", tmp_path / "again"], check=True)
    assert (tmp_path / "again").read_bytes() == snapshot.read_bytes()


def test_holes_of_the_snapshot_are_holes_of_the_compact_file(tmp_path: Path) -> None:
    memory = np.zeros(64 << 20, dtype=np.uint8)
    memory[40 << 20] = 1
    save_base(tmp_path / "guest", {"pc.ram": memory})
    report = compact(tmp_path / "guest", tmp_path / "compact")
    assert report.zero_frames > 250
    assert report.compact_size < 100_000
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        data, offset = 0, 0
        while (start := file.next_data(offset)) is not None:
            offset = file.next_hole(start)
            data += offset - start
    assert data <= 5 * (256 << 10)


def test_the_seal_is_taken_along_if_it_is_current(tmp_path: Path, snapshot: Path) -> None:
    pyqmigrate.seal(snapshot, algorithm="sha256")
    report = compact(snapshot, tmp_path / "compact")
    assert report.sealed
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        assert file.companions[".seal"] == Path(f"{snapshot}.seal").read_bytes()


def test_without_a_current_seal_one_is_made(tmp_path: Path, snapshot: Path) -> None:
    pyqmigrate.seal(snapshot)
    right = Path(f"{snapshot}.seal").read_bytes()
    os.utime(snapshot, ns=(5, 5))
    report = compact(snapshot, tmp_path / "compact")
    assert not report.sealed
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        line, _, digests = file.companions[".seal"].partition(b"\n")
        head = SealLine.decode(line + b"\n").head
        assert (head.size, head.mtime_ns, head.clear_pages_zero) == (file.size, 5, True)
        assert digests == right.partition(b"\n")[2]


def test_old_bytes_under_clear_bits_are_kept_and_the_seal_says_so(
    tmp_path: Path, snapshot: Path, memory: Bytes
) -> None:
    clear = next(p for p in range(NPAGES) if not memory[p * 4096 : (p + 1) * 4096].any())
    with open_snapshot(snapshot) as opened, snapshot.open("r+b") as file:
        file.seek(opened.layouts[0].pages_offset + clear * 4096)
        file.write(b"old")
    compact(snapshot, tmp_path / "compact")
    assert decompressed(tmp_path / "compact") == snapshot.read_bytes()
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as compacted:
        line = compacted.companions[".seal"].partition(b"\n")[0] + b"\n"
    assert not SealLine.decode(line).head.clear_pages_zero


def test_the_record_and_the_working_set_are_taken_along(tmp_path: Path, snapshot: Path) -> None:
    Path(f"{snapshot}.vm.json").write_bytes(b'{"record": 1}')
    Path(f"{snapshot}.workingset").write_bytes(b"pages")
    compact(snapshot, tmp_path / "compact")
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        assert file.companions[".vm.json"] == b'{"record": 1}'
        assert file.companions[".workingset"] == b"pages"


def test_what_is_no_record_is_left_where_it_is(tmp_path: Path, snapshot: Path) -> None:
    Path(f"{snapshot}.vm.json").mkdir()
    os.mkfifo(f"{snapshot}.workingset")
    compact(snapshot, tmp_path / "compact")
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        assert set(file.companions) == {".seal"}


def test_the_working_set_of_another_file_is_not_taken_along(
    tmp_path: Path, snapshot: Path, memory: Bytes
) -> None:
    bits = np.zeros(NPAGES, dtype=bool)
    save_increment(tmp_path / "i", snapshot, {"pc.ram": memory}, {"pc.ram": bits})
    for suffix in (".vm.json", ".workingset"):
        (tmp_path / f"i{suffix}").write_bytes(b"{}")
    compact(tmp_path / "i", tmp_path / "compact")
    with contextlib.closing(SeekableFile(tmp_path / "compact")) as file:
        assert set(file.companions) == {".seal", ".vm.json"}


def test_what_is_before_the_stream_is_kept(tmp_path: Path, memory: Bytes) -> None:
    path = tmp_path / "image"
    header = LibvirtHeader(True, 2, ImageFormat.SPARSE, True, "<domain/>", "<c/>", 300, "little")
    path.write_bytes(encode_header(header))
    pyqmigrate.save(f"file:{path},offset=300", [pyqmigrate.RamBlock("pc.ram", memory)])
    compact(path, tmp_path / "compact")
    assert decompressed(tmp_path / "compact") == path.read_bytes()


def converted_as(path: Path, directory: Path, memory: Bytes) -> None:
    """Check that the compact file of ``path`` has a mapped-ram file with this memory, and a seal of it."""
    report = compact(path, directory / "compact")
    assert report.converted
    (directory / "plain").write_bytes(decompressed(directory / "compact"))
    assert load(directory / "plain")["pc.ram"].tobytes() == memory.tobytes()
    with contextlib.closing(SeekableFile(directory / "compact")) as file:
        (directory / "plain.seal").write_bytes(file.companions[".seal"])
        os.utime(directory / "plain", ns=(file.mtime_ns, file.mtime_ns))
    check = pyqmigrate.verify_seal(directory / "plain")
    assert check is not None
    assert (check.intact, check.notes, check.clear_pages_zero) == (True, (), True)


def test_a_sequential_stream_becomes_a_mapped_ram_file(tmp_path: Path, memory: Bytes) -> None:
    blocks = [pyqmigrate.RamBlock("pc.ram", memory)]
    SequentialWriter(str(tmp_path / "s"), blocks, SaveOptions(machine=MACHINE)).run(b"", None)
    converted_as(tmp_path / "s", tmp_path, memory)
    (tmp_path / "s.gz").write_bytes(gzip.compress((tmp_path / "s").read_bytes(), 1))
    converted_as(tmp_path / "s.gz", tmp_path, memory)


def test_an_increment_becomes_a_whole_mapped_ram_file(
    tmp_path: Path, snapshot: Path, memory: Bytes
) -> None:
    other, bits = memory.copy(), np.zeros(NPAGES, dtype=bool)
    other[:4096], bits[0] = 9, True
    save_increment(tmp_path / "i", snapshot, {"pc.ram": other}, {"pc.ram": bits})
    converted_as(tmp_path / "i", tmp_path, other)


def test_a_background_snapshot_gets_its_bitmaps(tmp_path: Path, memory: Bytes) -> None:
    bits = memory.reshape(-1, 4096).any(axis=1)
    write_background_snapshot(tmp_path / "b", {"pc.ram": (memory, bits)})
    converted_as(tmp_path / "b", tmp_path, memory)


def test_nothing_else_is_left_in_the_directory(tmp_path: Path, memory: Bytes) -> None:
    blocks = [pyqmigrate.RamBlock("pc.ram", memory)]
    SequentialWriter(str(tmp_path / "s"), blocks, SaveOptions(machine=MACHINE)).run(b"", None)
    compact(tmp_path / "s", tmp_path / "compact")
    assert {path.name for path in tmp_path.iterdir()} == {"s", "compact"}


def test_the_snapshot_itself_is_not_overwritten(tmp_path: Path, snapshot: Path) -> None:
    before = snapshot.read_bytes()
    (tmp_path / "link").symlink_to(snapshot)
    for target in (snapshot, tmp_path / "link"):
        with pytest.raises(UsageError):
            compact(snapshot, target)
    assert snapshot.read_bytes() == before


def test_the_base_of_an_increment_is_not_overwritten(
    tmp_path: Path, snapshot: Path, memory: Bytes
) -> None:
    bits = np.zeros(NPAGES, dtype=bool)
    save_increment(tmp_path / "i", snapshot, {"pc.ram": memory}, {"pc.ram": bits})
    before = snapshot.read_bytes()
    with pytest.raises(UsageError):
        compact(tmp_path / "i", snapshot)
    assert snapshot.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 100_000])
def test_an_incomplete_snapshot_is_refused_and_an_old_file_stays(
    tmp_path: Path, memory: Bytes, cut: int
) -> None:
    section = full(7, "timer", b"\7" * 24)  # without a description, only the last byte ends it
    blocks = [pyqmigrate.RamBlock("pc.ram", memory)]
    Writer(str(tmp_path / "guest"), blocks, SaveOptions(machine=MACHINE)).run(section, None)
    os.truncate(tmp_path / "guest", (tmp_path / "guest").stat().st_size - cut)
    (tmp_path / "compact").write_bytes(b"old")
    with pytest.raises(SnapshotError):
        compact(tmp_path / "guest", tmp_path / "compact")
    assert (tmp_path / "compact").read_bytes() == b"old"


def test_a_snapshot_that_changes_is_refused(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.pread

    def change(fd: int, length: int, offset: int) -> bytes:
        os.utime(snapshot, ns=(7, 7))
        return read(fd, length, offset)

    with open_snapshot(snapshot) as opened:
        opened.verify()
        monkeypatch.setattr("pyqmigrate.compaction.os.pread", change)
        with pytest.raises(TargetError, match="was changed") as raised:
            compact(opened, tmp_path / "compact")
    assert raised.value.errno == errno.EBUSY
    assert not (tmp_path / "compact").exists()


def test_a_callback_that_raises_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "guest", {"pc.ram": ram(6000, density=1.0)})
    read = os.pread

    def read_slowly(fd: int, length: int, offset: int) -> bytes:
        time.sleep(0.05)  # the callback must be called before the file is complete
        return read(fd, length, offset)

    monkeypatch.setattr("pyqmigrate.compaction.os.pread", read_slowly)

    def stop(_: object) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        compact(tmp_path / "guest", tmp_path / "compact", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"guest"}


@pytest.mark.parametrize("level", [0, 20, True, "1"])
def test_impossible_levels_are_refused(tmp_path: Path, snapshot: Path, level: int) -> None:
    with pytest.raises(UsageError):
        compact(snapshot, tmp_path / "compact", level=level)


def test_the_target_is_a_path(tmp_path: Path, snapshot: Path) -> None:
    for target in (Descriptors(1), f"file:{tmp_path}/x,offset=4096"):
        with pytest.raises(UsageError, match="path"):
            compact(snapshot, target)  # type: ignore[arg-type]


def test_without_the_library_nothing_is_written(
    tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(NotSupported, match="pip install zstandard"):
        compact(snapshot, tmp_path / "compact")
    assert not (tmp_path / "compact").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, snapshot: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(TargetError):
            compact(snapshot, tmp_path / "compact")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"guest"}


def test_the_command_reports_sizes(
    tmp_path: Path, snapshot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["compact", str(snapshot), str(tmp_path / "c"), "--level", "3"]) == 0
    assert "frames without data" in capsys.readouterr().out
    assert command(["compact", str(snapshot), str(tmp_path / "c"), "--level", "99"]) == 2
