"""The table of RAM blocks, and memory found in an address space: this process's own."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import QemuError
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.io.process_memory import ProcessMemory
from pyqmigrate.vm.guest.memory import Backend, GuestBlock, find_memory, fits
from pyqmigrate.vm.guest.process import Mapping, covering, open_mapped, read_mappings
from pyqmigrate.vm.guest.ramblock import RamLine, parse_ramblock

MIB = 1 << 20
HEAD_10 = (
    "              Block Name    PSize              Offset               Used              Total"
    "                HVA  RO\r\n"
)
HEAD_9 = (
    "              Block Name    PSize              Offset               Used              Total"
    "                HVA\n"
)
HEAD_8 = (
    "              Block Name    PSize              Offset               Used              Total\n"
)


def row(
    name: str, *, page: str = "4 KiB", used: int = MIB, host: int | None = 0x7F00, tail: str = ""
) -> str:
    numbers = f"0x{0:016x} 0x{used:016x} 0x{2 * used:016x}"
    address = "" if host is None else f" 0x{host:016x}"
    return f"{name:>24}  {page:>7}  {numbers}{address}{tail}\n"


@pytest.mark.parametrize(
    ("head", "host", "tail"),
    [
        (HEAD_10, 0x7F00, "  rw"),
        (HEAD_10, 0x7F00, "  ro\r"),
        (HEAD_9, 0x7F00, ""),
        (HEAD_8, None, ""),
    ],
)
def test_tables_of_several_versions_are_read(head: str, host: int | None, tail: str) -> None:
    (line,) = parse_ramblock(head + row("pc.ram", host=host, tail=tail))
    assert line == RamLine("pc.ram", 4096, MIB, host or 0, 2 * MIB)


@pytest.mark.parametrize(
    "name",
    [
        "pc.ram",
        "/rom@etc/acpi/tables",
        "0000:00:02.0/vga.vram",
        "a name with  spaces",
        "4 KiB  0x1",
        "x" * 200,
        "0000:00:04.0/virtio-net-pci.rom",
        "ram\u00e9",
    ],
)
def test_any_name_is_kept_as_it_is(name: str) -> None:
    assert parse_ramblock(HEAD_10 + row(name, tail="  rw"))[0].name == name


@pytest.mark.parametrize(
    ("page", "size"), [("4 KiB", 4096), ("64 KiB", 65536), ("2 MiB", 2 * MIB), ("1 GiB", 1 << 30)]
)
def test_page_size_is_in_bytes(page: str, size: int) -> None:
    assert parse_ramblock(HEAD_10 + row("ram", page=page, tail="  rw"))[0].page_size == size


def test_length_is_what_is_used_and_not_what_could_be() -> None:
    assert parse_ramblock(HEAD_10 + row("ram", used=8192))[0].length == 8192


def test_block_without_a_name_is_in_no_stream() -> None:
    table = HEAD_10 + row("", tail="  rw") + row("ram", tail="  rw")
    assert [line.name for line in parse_ramblock(table)] == ["ram"]


def test_order_is_kept() -> None:
    table = HEAD_10 + row("z") + row("a") + row("m")
    assert [line.name for line in parse_ramblock(table)] == ["z", "a", "m"]


@pytest.mark.parametrize(
    "table", ["", "unknown command: 'info ramblock'\r\n", row("ram"), HEAD_10 + "ram 4 KiB 5 6\n"]
)
def test_table_of_another_form_is_refused(table: str) -> None:
    with pytest.raises(QemuError, match="info ramblock"):
        parse_ramblock(table)


def mapping(start: int, end: int, offset: int = 0, inode: int = 0) -> Mapping:
    return Mapping(start, end, True, False, offset, 0, inode, "")


def test_range_in_several_mappings_is_covered() -> None:
    space = [mapping(0, 4), mapping(4, 8), mapping(8, 12), mapping(20, 24)]
    assert covering(space, 5, 5) == space[1:3]
    assert covering(space, 4, 4) == space[1:2]


@pytest.mark.parametrize(
    ("block", "backends", "possible"),
    [
        (RamLine("ram", 4096, 8, 4), {}, True),
        (RamLine("ram", 4096, 16, 4), {}, False),
        (RamLine("ram", 4096, 8, 40), {}, False),
        (RamLine("ram", 4096, 8, 0), {}, True),
        (RamLine("ram", 4096, 8, 4), {"ram": Backend("memory-backend-ram", 8, False)}, True),
        (RamLine("ram", 4096, 8, 4), {"ram": Backend("memory-backend-memfd", 8, True)}, False),
    ],
    ids=["fits", "too-short", "elsewhere", "no-address", "private", "is-to-be-shared"],
)
def test_address_space_fits_blocks(
    block: RamLine, backends: dict[str, Backend], possible: bool
) -> None:
    assert fits([block], backends, [mapping(4, 8), mapping(8, 12)]) is possible


@pytest.mark.parametrize(("start", "length"), [(10, 12), (12, 4), (22, 4), (100, 1), (18, 4)])
def test_range_with_a_gap_is_not_covered(start: int, length: int) -> None:
    assert covering([mapping(0, 4), mapping(4, 12), mapping(20, 24)], start, length) == []


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory with spaces", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def found(address: int, length: int, backends: dict[str, Backend] | None = None) -> GuestBlock:
    line = RamLine("ram", 4096, length, address)
    (block,) = find_memory([line], backends or {}, os.getpid())
    return block


def read_of(block: GuestBlock) -> bytes:
    assert isinstance(block.memory, FileMemory)
    try:
        return os.pread(block.memory.fd, 6, block.memory.offset)
    finally:
        os.close(block.memory.fd)


def test_part_of_a_shared_mapping_is_found_in_its_file(memfd: int) -> None:
    memory = mmap.mmap(memfd, 2 * MIB, offset=MIB)
    memory[MIB : MIB + 6] = b"needle"
    block = found(address_of(memory) + MIB, MIB)
    assert block.memory is not None and block.shared and not block.file_backed
    assert isinstance(block.memory, FileMemory) and block.memory.offset == 2 * MIB
    assert read_of(block) == b"needle"


def test_a_name_with_all_kinds_of_line_ends_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\r\v\f\x1c\x1d\x1e\x85\u2028 b"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), MIB)
    (mapping,) = covering(read_mappings(os.getpid()), address_of(memory), MIB)
    assert mapping.path == str(path)
    memory.close()


def test_mapping_in_pieces_of_different_rights_is_one_block(memfd: int) -> None:
    memory = mmap.mmap(memfd, 4 * MIB)
    memory[:6] = b"needle"
    address = address_of(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + MIB), ctypes.c_size_t(MIB), mmap.PROT_READ) == 0
    assert len(covering(read_mappings(os.getpid()), address, 4 * MIB)) == 3
    assert read_of(found(address, 4 * MIB)) == b"needle"


def test_private_memory_is_read_from_the_process() -> None:
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = found(address_of(memory), MIB)
    assert block.memory == ProcessMemory(os.getpid(), block.host_address, MIB)
    assert not block.shared


def test_shared_memory_in_pieces_of_two_files_is_read_from_the_process(memfd: int) -> None:
    """Two files side by side: no descriptor shows both."""
    memory = mmap.mmap(-1, 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = address_of(memory)
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    os.ftruncate(other, MIB)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    fixed, both = 0x10, mmap.PROT_READ | mmap.PROT_WRITE
    for at, fd in ((address, memfd), (address + MIB, other)):
        assert libc.mmap(at, MIB, both, mmap.MAP_SHARED | fixed, fd, 0) == at
    block = found(address, 2 * MIB)
    os.close(other)
    assert block.shared and isinstance(block.memory, ProcessMemory)


def test_address_that_is_not_mapped_is_reported() -> None:
    memory = mmap.mmap(-1, MIB)
    address = address_of(memory)
    block = found(address, 1 << 46)
    assert block.memory is None and "is not mapped" in block.why_not


def test_shared_file_backend_is_what_is_left_out(memfd: int) -> None:
    memory = mmap.mmap(memfd, 4 * MIB)
    address = address_of(memory)
    for kind, left_out in (("memory-backend-file", True), ("memory-backend-memfd", False)):
        block = found(address, 4 * MIB, {"ram": Backend(kind, 4 * MIB, True)})
        assert (block.backend, block.file_backed) == (kind, left_out)
        read_of(block)


@pytest.mark.parametrize("name", ["ram", "/objects/ram", "0000:00:02.0/ram"])
def test_backend_is_found_by_any_name_of_its_block(name: str) -> None:
    backends = {"ram": Backend("memory-backend-file", MIB, True)}
    (block,) = find_memory([RamLine(name, 4096, MIB, 0)], backends, None)
    assert block.file_backed


@pytest.mark.parametrize(("name", "size"), [("ram2", MIB), ("ram", 2 * MIB), ("vga.ram", MIB)])
def test_block_of_another_name_or_size_has_no_backend(name: str, size: int) -> None:
    backends = {"ram": Backend("memory-backend-file", MIB, True)}
    (block,) = find_memory([RamLine(name, 4096, size, 0)], backends, None)
    assert (block.backend, block.file_backed) == ("", False)


def test_unknown_process_is_the_reason() -> None:
    (block,) = find_memory([RamLine("ram", 4096, MIB, 0)], {}, None, "it is far away")
    assert (block.memory, block.why_not) == (None, "it is far away")


def test_mapped_file_is_found_under_its_path_when_no_descriptor_is_open(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"needle" + bytes(MIB))
    program = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "memory = mmap.mmap(os.dup(fd), 1 << 20)\n"
        "os.closerange(3, 100)\n"
        "print(flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        mapped = next(m for m in read_mappings(child.pid) if m.path == str(path))
        fd = open_mapped(child.pid, mapped)
        assert os.read(fd, 6) == b"needle"
        os.close(fd)
        child.stdin.close()


def test_only_blocks_with_room_to_grow_take_another_length() -> None:
    tables = RamLine("/rom@etc/acpi/tables", 4096, 0x20000, 0, 0x200000)
    assert tables.takes(0x20000)
    assert tables.takes(0x1000)
    assert tables.takes(0x200000)
    assert not tables.takes(0x201000)
    ram = RamLine("pc.ram", 4096, 0x20000, 0, 0x20000)
    assert ram.takes(0x20000)
    assert not ram.takes(0x10000)
    assert not ram.takes(0x40000)
