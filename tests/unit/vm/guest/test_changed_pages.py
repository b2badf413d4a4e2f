"""The pages that a process changed in a private mapping of a file: exactly those."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import GuestMemoryError, UsageError
from pyqmigrate._core import lib
from pyqmigrate.vm.guest.changed_pages import (
    ChangedPages,
    Mapping,
    RestoredBlock,
    RestoredRam,
    list_mappings,
)
from tests.harness.examples import few
from tests.harness.processes import PAGE, Holder

NPAGES = 1500
PRIVATE = mmap.MAP_PRIVATE
LIBC = ctypes.CDLL(None, use_errno=True)
MADV_PAGEOUT = 21


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.mapped"
    path.write_bytes(b"".join(bytes([n % 251 + 1]) * PAGE for n in range(NPAGES + 8)))
    return path


def block_of(holder: Holder, offset: int = 0, page_size: int = PAGE) -> RestoredBlock:
    return RestoredBlock("pc.ram", holder.address, holder.length, offset, page_size)


def pages_of(found: ChangedPages) -> list[int]:
    pages = [page for first, n in found.runs() for page in range(first, first + n)]
    assert len(pages) == found.count
    assert found.nbytes == found.count * found.page_size
    return pages


def changed(holder: Holder, *, scan: bool | None = None, channels: int = 1) -> list[int]:
    with RestoredRam(holder.pid, [block_of(holder)], scan=scan) as ram:
        return pages_of(ram.find_changed(channels=channels)["pc.ram"])


def changed_twin(holder: Holder) -> list[int]:
    """PAGEMAP_SCAN by fcntl.ioctl, a range of the kernel's own at a time."""
    regions = (ctypes.c_uint64 * (3 * 64))()
    found: list[int] = []
    start, end = holder.address, holder.address + holder.length
    file, present, swapped = 4, 8, 16
    with Path(f"/proc/{holder.pid}/pagemap").open("rb", buffering=0) as pagemap:
        while start < end:
            request = bytearray(
                struct.pack(
                    "<12Q",
                    96,
                    0,
                    start,
                    end,
                    0,
                    ctypes.addressof(regions),
                    64,
                    0,
                    file,
                    file,
                    present | swapped,
                    0,
                )
            )
            n = fcntl.ioctl(pagemap.fileno(), 0xC0606610, request, True)
            for k in range(n):
                found += range(
                    (regions[3 * k] - holder.address) // PAGE,
                    (regions[3 * k + 1] - holder.address) // PAGE,
                )
            start = struct.unpack_from("<Q", request, 32)[0]
    return found


def can_scan() -> bool:
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        return bool(lib.qm_process_can_scan(pagemap.fileno()))


WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not can_scan(), reason="Linux < 6.7"))]


@few
@given(touched=st.sets(st.integers(0, NPAGES - 1), max_size=300))
@pytest.mark.parametrize("scan", WAYS)
def test_exactly_the_written_pages_are_found(base: Path, scan: bool, touched: set[int]) -> None:
    with Holder(NPAGES, sorted(touched), flags=PRIVATE, path=base) as holder:
        for channels in (1, 3):
            assert changed(holder, scan=scan, channels=channels) == sorted(touched)
        if scan:
            assert changed_twin(holder) == sorted(touched)


@pytest.mark.parametrize("scan", WAYS)
def test_pages_that_are_read_are_not_changed(tmp_path: Path, scan: bool) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(NPAGES * PAGE))
    with Holder(NPAGES, [9], flags=PRIVATE, path=path, looked_at=range(100, 200)) as holder:
        assert changed(holder, scan=scan) == [9]
        Path(f"/proc/{holder.pid}/mem")
        with RestoredRam(holder.pid, [block_of(holder)], scan=scan) as ram:
            present = pages_of(ram.find_present()["pc.ram"])
        assert {9, *range(100, 200)} <= set(present)


@pytest.mark.parametrize("scan", WAYS)
@pytest.mark.parametrize("page_size", [1024, 2048, 8192, 65536])
def test_pages_of_another_size_are_all_that_a_copy_covers(
    base: Path, scan: bool, page_size: int
) -> None:
    touched = [0, 33, 34, 700]
    with Holder(1024, touched, flags=PRIVATE, path=base) as holder:
        block = block_of(holder, page_size=page_size)
        found = pages_of(RestoredRam(holder.pid, [block], scan=scan).find_changed()["pc.ram"])
    expected = {
        byte // page_size
        for page in touched
        for byte in range(page * PAGE, (page + 1) * PAGE, min(page_size, PAGE))
    }
    assert found == sorted(expected)


def page_out(holder: Holder) -> None:
    """Have the kernel move all of the holder's memory to swap."""
    pidfd = os.pidfd_open(holder.pid)
    area = (ctypes.c_uint64 * 2)(holder.address, holder.length)
    moved = LIBC.syscall(440, pidfd, area, ctypes.c_size_t(1), MADV_PAGEOUT, 0)
    os.close(pidfd)
    if moved < 0:
        pytest.skip(f"process_madvise: {os.strerror(ctypes.get_errno())}")


@contextmanager
def swap(disk: Path) -> Iterator[None]:
    """A swap file for a moment; skips where none can be had."""
    file = disk / "swap"
    file.write_bytes(bytes(32 << 20))
    file.chmod(0o600)
    header = bytearray(PAGE)
    struct.pack_into("<3I", header, 1024, 1, (32 << 20) // PAGE - 1, 0)
    header[-10:] = b"SWAPSPACE2"
    with file.open("r+b") as out:
        out.write(header)
        out.flush()
        os.fsync(out.fileno())
    if LIBC.swapon(os.fsencode(file), 0):
        pytest.skip(f"swapon: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        assert LIBC.swapoff(os.fsencode(file)) == 0


@pytest.mark.parametrize("scan", WAYS)
def test_changed_pages_in_swap_are_found(base: Path, disk: Path, scan: bool) -> None:
    touched = [*range(0, 1000, 7)]
    with swap(disk), Holder(NPAGES, touched, flags=PRIVATE, path=base) as holder:
        page_out(holder)
        swapped = Path(f"/proc/{holder.pid}/status").read_text().partition("VmSwap:")[2].split()
        if int(swapped[0]) < 300:
            pytest.skip("the kernel swapped hardly anything")
        assert changed(holder, scan=scan) == touched


def test_the_private_mapping_of_the_base_is_recognised(base: Path) -> None:
    with (
        Holder(NPAGES, [1], flags=PRIVATE, path=base) as holder,
        RestoredRam(holder.pid, [block_of(holder)]) as ram,
        base.open("rb") as file,
    ):
        ram.check(file.fileno())
        mapped = ram.mapped_file(ram.blocks[0])
        assert mapped is not None
        assert (mapped.path, mapped.offset, mapped.private) == (str(base), 0, True)


def test_a_mapping_in_pieces_is_recognised(base: Path) -> None:
    holding = Holder(NPAGES, [1], flags=PRIVATE, path=base)
    with holding as holder, RestoredRam(holder.pid, [block_of(holder)]) as ram:
        pidfd = os.pidfd_open(holder.pid)
        os.close(pidfd)
        with base.open("rb") as file:
            ram.check(file.fileno())
            whole = ram.mappings
            ram.mappings = lambda: [  # type: ignore[method-assign]
                piece for mapping in whole() for piece in in_two(mapping, holder.address)
            ]
            ram.check(file.fileno())


def in_two(mapping: Mapping, address: int) -> list[Mapping]:
    if mapping.start != address:
        return [mapping]
    middle = mapping.start + 100 * PAGE
    first = Mapping(mapping.start, middle, *list(vars(mapping).values())[2:])
    offset = mapping.offset + 100 * PAGE
    rest = list(vars(mapping).values())[4:]
    return [first, Mapping(middle, mapping.end, mapping.private, offset, *rest)]


def fault_of(holder: Holder, base: Path, **options: int) -> str:
    ram = RestoredRam(holder.pid, [block_of(holder, **options)])
    with base.open("rb") as file, pytest.raises(UsageError, match=r"RAM block 'pc\.ram'") as raised:
        ram.check(file.fileno())
    return str(raised.value)


def test_other_mappings_are_refused_with_the_reason(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(base.read_bytes())
    with Holder(NPAGES, [1], flags=PRIVATE, path=other) as holder:
        assert f"another file, '{other}', is mapped" in fault_of(holder, base)
    with Holder(NPAGES, [1], flags=mmap.MAP_SHARED, path=other) as holder:
        assert f"'{other}' is mapped shared" in fault_of(holder, other)
    with Holder(NPAGES, [1], flags=PRIVATE) as holder:
        assert "anonymous memory" in fault_of(holder, base)
        assert RestoredRam(holder.pid, [block_of(holder)]).mapped_file(block_of(holder)) is None
    with Holder(NPAGES, [1], flags=PRIVATE, path=base) as holder:
        found = fault_of(holder, base, offset=PAGE)
        assert (
            f"file offset 0x0 is mapped in place of 0x1000 at address {holder.address:#x}" in found
        )
    with Holder(NPAGES, [1], flags=PRIVATE, path=base, unmapped=40 * PAGE) as holder:
        at = holder.address + 40 * PAGE
        assert f"nothing is mapped at address {at:#x}" in fault_of(holder, base)


def test_a_process_that_ended_is_noticed(base: Path) -> None:
    with Holder(NPAGES, [1], flags=PRIVATE, path=base) as holder:
        ram = RestoredRam(holder.pid, [block_of(holder)])
        holder.end()
        for question in (ram.find_changed, ram.find_present, ram.mappings):
            ask: Callable[[], object] = question
            with pytest.raises(GuestMemoryError) as raised:
                ask()
            assert raised.value.errno == errno.ESRCH
        ram.close()
        ram.close()
        with pytest.raises(GuestMemoryError):
            RestoredRam(holder.pid, [block_of(holder)])


@pytest.mark.parametrize(
    ("address", "length", "offset", "page_size"),
    [(4097, 4096, 0, 4096), (4096, 4096, 7, 4096), (4096, 4097, 0, 4096), (4096, 4096, 0, 5000)],
)
def test_blocks_that_cannot_be_are_refused(
    address: int, length: int, offset: int, page_size: int
) -> None:
    with pytest.raises(UsageError, match=r"pc\.ram"):
        RestoredRam(os.getpid(), [RestoredBlock("pc.ram", address, length, offset, page_size)])


def test_lines_of_maps_are_read() -> None:
    text = (
        "7f00-7f01 r--p 00001000 fe:00 12 /a b/c (deleted)\n"
        "7f01-7f02 rw-s 00000000 00:01 13 /memfd:x\n"
        "what is this\n"
        "zz-qq rw-p 0 0 0\n"
        "7f02-7f03 rw-p 00000000 00:00 0 \n"
    )
    assert list_mappings(text) == [
        Mapping(0x7F00, 0x7F01, True, 4096, "fe:00", "12", "/a b/c (deleted)"),
        Mapping(0x7F01, 0x7F02, False, 0, "00:01", "13", "/memfd:x"),
        Mapping(0x7F02, 0x7F03, True, 0, "00:00", "0", ""),
    ]
