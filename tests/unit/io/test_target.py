"""A path becomes a snapshot whole or not at all; what is written in place has its magic last."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyqmigrate
from pyqmigrate import RamBlock, TargetError
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from tests.harness.snapshots import SLOW, data_bytes, known_memory, load, ram, save_known

OLD = b"what stood there before"
MIB = 1 << 20


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def slow_save(target: Any, **options: Any) -> pyqmigrate.Job[pyqmigrate.SaveReport]:
    """A save of known memory that lasts a second."""
    return pyqmigrate.start_save(
        target, [RamBlock("ram", known_memory())], max_bandwidth=SLOW, **options
    )


def cancel(job: pyqmigrate.Job[Any]) -> None:
    job.cancel()
    with pytest.raises(pyqmigrate.Cancelled):
        job.result(5)


# ---- publication ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_file_that_a_guest_runs_from_is_not_changed_in_place(tmp_path: Path, reuse: bool) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"mapped by a guest")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(TargetError, match="a guest runs from it"):
            OutputFile.open(
                str(path) if reuse else f"file:{path},offset=4", DirectIO.OFF, reuse=reuse
            )
    assert path.read_bytes() == b"mapped by a guest"


def test_the_name_appears_only_when_the_snapshot_is_whole(disk: Path) -> None:
    job = slow_save(disk / "snap")
    assert names(disk) == []
    job.set_max_bandwidth(0)
    job.result(10)
    assert names(disk) == ["snap"]
    assert (load(disk / "snap")["ram"] == known_memory()).all()


def test_an_existing_file_stays_until_it_is_replaced_by_a_whole_one(disk: Path) -> None:
    (disk / "snap").write_bytes(OLD)
    job = slow_save(disk / "snap")
    with (disk / "snap").open("rb") as old:
        assert old.read() == OLD
        job.set_max_bandwidth(0)
        job.result(10)
        old.seek(0)
        assert old.read() == OLD, "the old file was changed, not replaced"
    assert (load(disk / "snap")["ram"] == known_memory()).all()
    assert names(disk) == ["snap"]


def test_a_cancelled_save_leaves_the_old_file_and_nothing_else(disk: Path) -> None:
    (disk / "snap").write_bytes(OLD)
    cancel(slow_save(disk / "snap"))
    assert (disk / "snap").read_bytes() == OLD
    assert names(disk) == ["snap"]


def test_a_cancelled_save_to_a_new_name_leaves_nothing(disk: Path) -> None:
    cancel(slow_save(disk / "snap"))
    assert names(disk) == []


def test_a_symlink_is_followed_and_stays(disk: Path) -> None:
    (disk / "far").mkdir()
    (disk / "far/snap").write_bytes(OLD)
    (disk / "link").symlink_to("far/snap")
    memory = save_known(disk / "link")
    assert (disk / "link").is_symlink()
    assert names(disk / "far") == ["snap"]
    assert (load(disk / "far/snap")["ram"] == memory).all()


def test_a_dangling_symlink_names_the_new_file(disk: Path) -> None:
    (disk / "link").symlink_to("new")
    save_known(disk / "link")
    assert (disk / "link").is_symlink()
    assert (disk / "new").is_file()


def test_other_hard_links_keep_the_old_content(disk: Path) -> None:
    (disk / "snap").write_bytes(OLD)
    os.link(disk / "snap", disk / "other")
    save_known(disk / "snap")
    assert (disk / "other").read_bytes() == OLD


def test_files_are_private_whatever_the_umask(disk: Path) -> None:
    before = os.umask(0)
    try:
        save_known(disk / "snap")
        save_known(disk / "reused", reuse=True)
        pyqmigrate.save(f"file:{disk}/offset,offset=4k", [RamBlock("ram", known_memory())])
    finally:
        os.umask(before)
    for name in names(disk):
        assert stat.S_IMODE((disk / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("call", ["fsync", "link", "pwrite", "ftruncate"])
def test_a_failure_at_the_end_leaves_the_old_file_and_nothing_else(
    disk: Path, monkeypatch: pytest.MonkeyPatch, call: str, same_descriptors: None
) -> None:
    (disk / "snap").write_bytes(OLD)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(pyqmigrate.TargetError) as caught:
            save_known(disk / "snap")
    assert caught.value.errno == errno.EIO
    assert (disk / "snap").read_bytes() == OLD
    assert names(disk) == ["snap"]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "snap").write_bytes(OLD)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(pyqmigrate.TargetError):
            save_known(disk / "snap")
    assert (disk / "snap").read_bytes() == OLD
    assert names(disk) == ["snap"]


def test_no_space_for_the_head_is_a_no_space_error(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refuse)
        with pytest.raises(pyqmigrate.NoSpace) as caught:
            save_known(disk / "snap")
    assert caught.value.errno == errno.ENOSPC
    assert names(disk) == []


@pytest.mark.parametrize("end", ["published", "cancelled"])
def test_where_there_are_no_unnamed_files_a_named_one_is_used(
    disk: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    real = os.open

    def without(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "injected")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", without)
    (disk / "snap").write_bytes(OLD)
    job = slow_save(disk / "snap")
    assert len(names(disk)) == 2
    assert all(stat.S_IMODE((disk / n).stat().st_mode) == 0o600 for n in names(disk) if n[0] == ".")
    if end == "cancelled":
        cancel(job)
        assert (disk / "snap").read_bytes() == OLD
    else:
        job.set_max_bandwidth(0)
        job.result(10)
        assert (load(disk / "snap")["ram"] == known_memory()).all()
    assert names(disk) == ["snap"]


def test_the_longest_file_name_works(disk: Path) -> None:
    name = "n" * 255
    (disk / name).write_bytes(OLD)
    save_known(disk / name)
    assert names(disk) == [name]


def test_a_name_with_undecodable_bytes_works(disk: Path) -> None:
    path = os.fsencode(disk) + b"/snap\xff"
    pyqmigrate.save(os.fsdecode(path), [RamBlock("ram", known_memory())])
    assert os.listdir(os.fsencode(disk)) == [b"snap\xff"]  # bytes


def test_a_relative_path_is_taken_from_where_the_save_began(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "here").mkdir()
    monkeypatch.chdir(disk / "here")
    job = slow_save("snap")
    monkeypatch.chdir(disk)
    job.set_max_bandwidth(0)
    job.result(10)
    assert names(disk / "here") == ["snap"]


def test_a_missing_directory_is_a_target_error(disk: Path) -> None:
    with pytest.raises(pyqmigrate.TargetError) as caught:
        save_known(disk / "no" / "snap")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("options", [{}, {"reuse": True}])
def test_a_directory_is_not_a_target(disk: Path, options: dict[str, bool]) -> None:
    with pytest.raises(pyqmigrate.TargetError) as caught:
        save_known(disk, **options)
    assert caught.value.errno == errno.EISDIR


@pytest.mark.parametrize("options", [{}, {"reuse": True}])
@pytest.mark.timeout(10)
def test_a_fifo_is_refused_and_not_waited_for(disk: Path, options: dict[str, bool]) -> None:
    os.mkfifo(disk / "fifo")
    with pytest.raises((pyqmigrate.UsageError, pyqmigrate.TargetError)):
        save_known(disk / "fifo", **options)
    assert stat.S_ISFIFO((disk / "fifo").stat().st_mode)


@pytest.mark.timeout(10)
def test_a_fifo_is_not_a_snapshot_and_not_waited_for(disk: Path) -> None:
    os.mkfifo(disk / "fifo")
    with pytest.raises(pyqmigrate.UsageError):
        pyqmigrate.open_snapshot(disk / "fifo")


# ---- in place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 4096, 65537, MIB, 3 * MIB + 5])
@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_an_offset_keeps_the_bytes_below_it(disk: Path, offset: int, direct_io: str) -> None:
    below = bytes(range(256)) * (offset // 256 + 1)
    (disk / "snap").write_bytes(below[:offset] + b"longer" * MIB)
    pyqmigrate.save(
        f"file:{disk}/snap,offset={offset}", [RamBlock("ram", known_memory())], direct_io=direct_io
    )
    assert (disk / "snap").read_bytes()[:offset] == below[:offset]
    assert (load(f"file:{disk}/snap,offset={offset}")["ram"] == known_memory()).all()
    with pyqmigrate.open_snapshot(disk / "snap", offset=offset) as snapshot:
        assert snapshot.offset == offset
        snapshot.verify()


def test_an_offset_past_the_end_of_the_file_leaves_a_hole(disk: Path) -> None:
    (disk / "snap").write_bytes(OLD)
    pyqmigrate.save(f"file:{disk}/snap,offset=8M", [RamBlock("ram", known_memory())])
    assert (disk / "snap").read_bytes()[: 8 * MIB] == OLD + bytes(8 * MIB - len(OLD))


def test_an_offset_past_all_file_positions_is_refused(disk: Path) -> None:
    for offset in [1 << 63, (1 << 63) - 1, (1 << 64) - 1]:
        with pytest.raises(pyqmigrate.UsageError):
            pyqmigrate.save(f"file:{disk}/s,offset={offset}", [RamBlock("ram", known_memory())])
    assert names(disk) == []


@pytest.mark.parametrize("reuse", [False, True])
def test_the_magic_is_zero_until_everything_else_is_durable(
    disk: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    offset = 0 if reuse else 4096
    path = disk / "snap"
    save_known(path, seed=1)
    seen: list[bytes] = []
    real = os.fsync

    def look(fd: int) -> None:
        real(fd)
        seen.append(path.read_bytes()[offset : offset + 4])

    monkeypatch.setattr(os, "fsync", look)
    pyqmigrate.save(f"file:{path},offset={offset}", [RamBlock("ram", known_memory())], reuse=reuse)
    assert seen == [bytes(4)]
    assert path.read_bytes()[offset : offset + 4] == b"QEVM"


@pytest.mark.parametrize("how", ["offset", "reuse", "descriptors"])
def test_a_partial_file_is_not_taken_for_a_snapshot(disk: Path, how: str) -> None:
    path = disk / "snap"
    save_known(path, seed=1)
    target: Any = path
    fd = os.open(path, os.O_RDWR)
    if how == "offset":
        pyqmigrate.save(f"file:{path},offset=1M", [RamBlock("ram", known_memory(1))])
        target = f"file:{path},offset=1M"
    elif how == "descriptors":
        target = pyqmigrate.Descriptors(fd)
    job = slow_save(target, reuse=how == "reuse")
    with pytest.raises(pyqmigrate.SnapshotError):
        pyqmigrate.open_snapshot(target)
    cancel(job)
    with pytest.raises(pyqmigrate.SnapshotError):
        pyqmigrate.open_snapshot(target)
    os.close(fd)


def test_wrong_arguments_leave_an_existing_file_alone(disk: Path, same_descriptors: None) -> None:
    path = disk / "snap"
    memory = save_known(path)
    block = RamBlock("ram", memory)
    wrong: list[tuple[list[RamBlock], dict[str, Any]]] = [
        ([], {}),
        ([block, block], {}),
        ([RamBlock("", memory)], {}),
        ([RamBlock("ram", memory[:-1])], {}),
        ([RamBlock("ram", memory, 3000)], {}),
        ([block], {"channels": 0}),
        ([block], {"channels": 256}),
        ([block], {"direct_io": "maybe"}),
        ([block], {"sparse": "no"}),
        ([block], {"machine": "m" * 70000}),
        ([block], {"target_page_bits": 13}),
        ([block], {"max_bandwidth": -1}),
        ([block], {"max_bandwidth": 1 << 64}),
    ]
    for blocks, options in wrong:
        with pytest.raises(ValueError) as caught:
            pyqmigrate.save(path, blocks, reuse=True, **options)
        assert isinstance(caught.value, pyqmigrate.UsageError), (options, caught.value)
        assert (load(path)["ram"] == memory).all()


def test_reuse_overwrites_the_blocks_that_are_there(disk: Path) -> None:
    path = disk / "snap"
    dense = ram(1024, density=1.0, seed=1)
    pyqmigrate.save(path, [RamBlock("ram", dense)])
    inode = path.stat().st_ino
    memory = ram(1024, density=0.3, seed=2)
    report = pyqmigrate.save(path, [RamBlock("ram", memory)], reuse=True)
    assert path.stat().st_ino == inode
    assert (load(path)["ram"] == memory).all()
    assert report.bytes_allocated >= len(dense), "the blocks were given back"


def test_reuse_of_a_longer_file_cuts_it_to_the_new_length(disk: Path) -> None:
    path = disk / "snap"
    pyqmigrate.save(path, [RamBlock("ram", ram(2048, seed=1)), RamBlock("more", ram(512))])
    memory = ram(256, seed=2)
    report = pyqmigrate.save(path, [RamBlock("ram", memory)], reuse=True)
    assert path.stat().st_size == report.file_size
    assert (load(path)["ram"] == memory).all()


def test_reuse_of_what_was_no_snapshot_works(disk: Path) -> None:
    path = disk / "snap"
    path.write_bytes(b"\xee" * 4 * MIB)
    memory = save_known(path, reuse=True)
    assert (load(path)["ram"] == memory).all()


def test_reuse_of_a_missing_file_makes_one(disk: Path) -> None:
    memory = save_known(disk / "snap", reuse=True)
    assert (load(disk / "snap")["ram"] == memory).all()


def test_no_thread_is_left_after_a_cancelled_save(disk: Path) -> None:
    cancel(slow_save(disk / "snap"))
    assert not [t.name for t in threading.enumerate() if t.name.startswith("pyqmigrate")]


# ---- direct I/O ----------------------------------------------------------------------------------


def test_direct_io_on_a_disk_is_used_and_the_reason_reported(disk: Path) -> None:
    report = pyqmigrate.save(disk / "snap", [RamBlock("ram", known_memory())])
    assert report.direct_io
    assert "aligned" in report.direct_io_reason
    report = pyqmigrate.save(disk / "snap", [RamBlock("ram", known_memory())], direct_io="on")
    assert report.direct_io


def test_direct_io_can_be_switched_off(disk: Path) -> None:
    report = pyqmigrate.save(disk / "snap", [RamBlock("ram", known_memory())], direct_io="off")
    assert not report.direct_io
    assert report.direct_io_reason == "switched off"


def test_on_tmpfs_auto_is_off_with_a_reason(shm: Path) -> None:
    memory = known_memory()
    report = pyqmigrate.save(shm / "snap", [RamBlock("ram", memory)])
    assert not report.direct_io
    assert "reports no alignment" in report.direct_io_reason
    assert (load(shm / "snap")["ram"] == memory).all()


def test_on_tmpfs_direct_io_on_works_or_is_refused(shm: Path) -> None:
    memory = known_memory()
    try:
        report = pyqmigrate.save(shm / "snap", [RamBlock("ram", memory)], direct_io="on")
    except pyqmigrate.DirectIORefused:
        assert names(shm) == []
    else:
        assert report.direct_io
        assert (load(shm / "snap", direct_io="on")["ram"] == memory).all()


@pytest.mark.parametrize("step", ["open", "write"])
def test_a_refusal_of_direct_io_is_a_reason_or_an_error(
    disk: Path, monkeypatch: pytest.MonkeyPatch, step: str, same_descriptors: None
) -> None:
    real = os.open

    def without(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **more)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if step == "open":
        monkeypatch.setattr(os, "open", without)
    else:
        monkeypatch.setattr(os, "pwritev", refuse)
    report = pyqmigrate.save(disk / "a", [RamBlock("ram", known_memory())])
    assert not report.direct_io
    assert "Invalid argument" in report.direct_io_reason
    with pytest.raises(pyqmigrate.DirectIORefused) as caught:
        pyqmigrate.save(disk / "b", [RamBlock("ram", known_memory())], direct_io="on")
    assert caught.value.errno == errno.EINVAL
    assert names(disk) == ["a"]
    assert (load(disk / "a")["ram"] == known_memory()).all()


@pytest.mark.parametrize("direct_io", ["auto", "on", "off"])
def test_the_trial_of_direct_io_leaves_no_trace(disk: Path, direct_io: str) -> None:
    """Nothing but zeros: the file holds head, bitmap and tail, and no page."""
    empty = ram(1024, density=0)
    report = pyqmigrate.save(disk / "snap", [RamBlock("ram", empty)], direct_io=direct_io)
    with pyqmigrate.open_snapshot(disk / "snap") as snapshot:
        block = snapshot.blocks["ram"]
        start, end = block.pages_offset, block.pages_offset + block.length
    assert data_bytes(disk / "snap", start, end // 4096 * 4096) == 0
    assert report.bytes_allocated <= 16384


def test_an_unaligned_buffer_is_saved_and_named_in_the_report(disk: Path) -> None:
    odd, even = ram(256, shift=8, seed=1), ram(256, seed=2)
    report = pyqmigrate.save(disk / "snap", [RamBlock("odd", odd), RamBlock("even", even)])
    assert report.unaligned_blocks == ("odd",)
    loaded = load(disk / "snap")
    assert (loaded["odd"] == odd).all()
    assert (loaded["even"] == even).all()


def cached_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        seen = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), seen) == 0
    os.close(fd)
    return sum(byte & 1 for byte in seen) * mmap.PAGESIZE


def test_a_direct_save_leaves_next_to_nothing_in_the_page_cache(disk: Path) -> None:
    memory = ram(4096, density=1.0)
    assert pyqmigrate.save(disk / "snap", [RamBlock("ram", memory)]).direct_io
    assert cached_bytes(disk / "snap") < 0.01 * len(memory)
