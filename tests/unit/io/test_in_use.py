"""What is in use is neither written over nor replaced, under whichever name it is given."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate import FileMemory, ProcessMemory, RamBlock, UsageError
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import (
    Area,
    FileId,
    files_in_areas,
    files_in_use,
    files_mapped,
    refuse_in_use,
)
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.save.sequential import start_sequential_save

MIB = 1 << 20
PRECIOUS = b"precious" * (MIB // 8)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


def by_path(path: Path) -> Any:
    return path


def by_symlink(path: Path) -> Any:
    (path.parent / "link").symlink_to(path.name)
    return path.parent / "link"


def by_hard_link(path: Path) -> Any:
    os.link(path, path.parent / "other name")
    return path.parent / "other name"


def by_offset(path: Path) -> Any:
    return f"file:{path},offset=4k"


NAMES = pytest.mark.parametrize("named", [by_path, by_symlink, by_hard_link, by_offset])


@NAMES
@pytest.mark.parametrize("reuse", [False, True])
def test_a_file_in_use_is_neither_replaced_nor_written_in_place(
    precious: Path, named: Callable[[Path], Any], reuse: bool
) -> None:
    in_use = files_in_use([(precious, "disk virtio0 of the guest")])
    target = named(precious)
    before = sorted(os.listdir(precious.parent))
    with pytest.raises(UsageError, match=r"disk virtio0 of the guest.*write to another file"):
        OutputFile.open(target, DirectIO.AUTO, reuse=reuse, in_use=in_use)
    assert precious.read_bytes() == PRECIOUS
    assert sorted(os.listdir(precious.parent)) == before


def test_descriptors_of_a_file_in_use_are_refused(precious: Path) -> None:
    fd = os.open(precious, os.O_RDWR)
    try:
        with pytest.raises(UsageError, match=r"descriptor .* is the disk"):
            OutputFile.open(
                Descriptors(fd), DirectIO.OFF, in_use=files_in_use([(precious, "the disk")])
            )
    finally:
        os.close(fd)
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("how", ["seal", "beside"])
def test_files_beside_the_target_are_compared_too(
    precious: Path, tmp_path: Path, reuse: bool, how: str
) -> None:
    """The name of the seal leads to the disk; a record of the caller's would."""
    target = tmp_path / "snap"
    target.write_bytes(b"an old one")
    beside = tmp_path / ("snap.seal" if how == "seal" else "snap.record")
    os.link(precious, beside)
    with pytest.raises(UsageError, match=beside.name):
        OutputFile.open(
            target,
            DirectIO.OFF,
            reuse=reuse,
            in_use=files_in_use([(precious, "the disk")]),
            beside=[beside] if how == "beside" else [],
        )
    assert target.read_bytes() == b"an old one"
    assert beside.read_bytes() == PRECIOUS


def test_a_file_that_takes_the_name_during_the_save_is_not_replaced(
    precious: Path, tmp_path: Path
) -> None:
    target = OutputFile.open(
        tmp_path / "snap", DirectIO.OFF, in_use=files_in_use([(precious, "the disk")])
    )
    os.link(precious, tmp_path / "snap")
    try:
        with pytest.raises(UsageError, match="the disk"):
            target.publish(b"QEVM", lambda: None)
    finally:
        target.abort()
    assert (tmp_path / "snap").read_bytes() == PRECIOUS


def test_other_files_are_not_refused(precious: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(PRECIOUS)
    refuse_in_use([copy, tmp_path / "missing"], files_in_use([(precious, "the disk")]))


def test_what_is_missing_is_not_in_use(tmp_path: Path) -> None:
    assert files_in_use([(tmp_path / "missing", "a disk"), (9999, "another")]) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes are made by root")
def test_a_block_device_is_the_same_by_each_of_its_nodes(tmp_path: Path) -> None:
    one, other, different = tmp_path / "one", tmp_path / "other", tmp_path / "different"
    try:
        for node, minor in [(one, 77), (other, 77), (different, 78)]:
            os.mknod(node, 0o60600, os.makedev(7, minor))
    except PermissionError:
        pytest.skip("this container may not make device nodes")
    in_use = files_in_use([(one, "the disk")])
    with pytest.raises(UsageError, match="the disk"):
        refuse_in_use(other, in_use)
    refuse_in_use(different, in_use)


# ---- memory --------------------------------------------------------------------------------------


def as_file(path: Path) -> Any:
    return FileMemory(os.open(path, os.O_RDONLY))


def as_mapping(path: Path) -> Any:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def as_private_mapping(path: Path) -> Any:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


@NAMES
@pytest.mark.parametrize("memory", [as_file, as_mapping, as_private_mapping])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("start", [pyqmigrate.start_save, start_sequential_save])
def test_memory_is_not_saved_over_itself(
    precious: Path,
    named: Callable[[Path], Any],
    memory: Callable[[Path], Any],
    reuse: bool,
    start: Callable[..., Any],
) -> None:
    target, block = named(precious), RamBlock("pc.ram", memory(precious))
    with pytest.raises(UsageError, match=r"the memory of block 'pc.ram'"):
        start(target, [block], reuse=reuse)
    assert precious.read_bytes() == PRECIOUS
    if isinstance(block.memory, FileMemory):
        os.close(block.memory.fd)


def test_the_files_of_a_mapping_are_found_by_its_address(precious: Path) -> None:
    with precious.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    np = pytest.importorskip("numpy")
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    identity = FileId.of(precious.stat())
    areas = [Area(address - 8192, 4096, "before"), Area(address + 4096, 1, "it")]
    assert files_in_areas(os.getpid(), areas)[identity] == "it"
    assert identity not in files_in_areas(os.getpid(), areas[:1])
    assert files_in_areas(2**22 + 1, areas) == {}
    assert files_mapped(address, MIB, "it")[identity] == "it"


def test_a_name_with_all_kinds_of_line_ends_is_one_line(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = tmp_path / "a\r\v\f\x1c\x1d\x1e\x85\u2028\n b"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    assert files_mapped(address, MIB, "it") == {FileId.of(path.stat()): "it"}


def test_a_process_that_has_ended_maps_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert files_in_areas(process.pid, [Area(0, MIB, "it")]) == {}


def test_memory_of_another_process_is_not_saved_over_the_file_that_it_is(precious: Path) -> None:
    """A process that maps the file: its memory is read from it, and is in the file."""
    script = (
        "import ctypes, mmap, os, sys\n"
        f"m = mmap.mmap(os.open({str(precious)!r}, os.O_RDWR), 0)\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        memory = ProcessMemory(process.pid, int(process.stdout.readline()), MIB)
        if memory.refusal() is not None:
            pytest.skip("this user may not read the memory of other processes")
        with pytest.raises(UsageError, match=r"the memory of block 'pc.ram'"):
            pyqmigrate.save(precious, [RamBlock("pc.ram", memory)])
        process.communicate()
    assert precious.read_bytes() == PRECIOUS
