"""The binding to the compiled core: its structures and the errors of its calls.

Only this module and ``pyqmigrate/io`` use cffi. ``csrc/qmigrate.h`` documents what the functions
do. Classes here own a structure of the core as ``core``, and keep alive what it points to.
``_core.lib`` is looked up at each call, since a benchmark replaces it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyqmigrate._core as _core
from pyqmigrate.errors import Cancelled, GuestMemoryError, NoSpace, PyqmigrateError, TargetError
from pyqmigrate.format.stream.mapped_ram import BlockLayout

__all__ = [
    "CHUNK",
    "Block",
    "Channel",
    "CopyTarget",
    "Fault",
    "File",
    "JobState",
    "MemorySource",
    "PatternSearch",
    "Policy",
    "Totals",
    "Transfer",
    "error_from_fault",
    "file_error_from_fault",
]

CHUNK: int = _core.lib.QM_CHUNK  # bytes; a transfer starts at a multiple of it
_NOT_FOUND = (1 << 64) - 1


if TYPE_CHECKING:  # the class of a Protocol or a dataclass takes time to make
    from typing import Protocol

    class _Wrapper(Protocol):
        """An object that owns a structure of the core."""

        @property
        def core(self) -> Any: ...

    class _Direct(Protocol):
        """A descriptor for direct I/O, and what it requires."""

        @property
        def fd(self) -> int: ...
        @property
        def mem_align(self) -> int: ...
        @property
        def off_align(self) -> int: ...


class Totals:
    """The running totals of a job: see ``struct qm_totals``."""

    def __init__(self, core: Any) -> None:
        self.bytes_done = int(core.bytes_done)
        self.data_pages = int(core.data_pages)
        self.zero_pages = int(core.zero_pages)
        self.bytes_moved = int(core.bytes_moved)
        self.calls = int(core.calls)


class JobState:
    """The atomics that all channels of one job share. Its methods are thread-safe."""

    def __init__(self) -> None:
        self.core = _owned(_core.lib.qm_job_create(), _core.lib.qm_job_destroy)

    def cancel(self) -> None:
        """Stop all calls of the job; they poll at least every 4 MiB."""
        _core.lib.qm_job_cancel(self.core)

    @property
    def cancelled(self) -> bool:
        return bool(_core.lib.qm_job_cancelled(self.core))

    def set_rate(self, bytes_per_second: int) -> None:
        """Limit the bytes moved per second; 0 is unlimited."""
        _core.lib.qm_job_set_rate(self.core, bytes_per_second)

    def totals(self) -> Totals:
        totals = _core.ffi.new("struct qm_totals *")
        _core.lib.qm_job_totals(self.core, totals)
        return Totals(totals)

    def count_io(self, length: int) -> None:
        """Count bytes that were moved to or from the file outside of the core."""
        _core.lib.qm_job_count_io(self.core, length, 0)

    def count_pages(self, length: int, data_pages: int = 0, zero_pages: int = 0) -> None:
        """Count guest bytes and pages that were processed outside of the core."""
        _core.lib.qm_job_count_pages(self.core, length, data_pages, zero_pages)


class Fault:
    """Where a call failed: byte ``at`` of block number ``block`` if ``in_memory``, else position
    ``at`` of the file."""

    def __init__(self) -> None:
        self.core = _core.ffi.new("struct qm_fault *")

    def clear(self) -> None:
        """Make the fault one of a file, for an error that Python found."""
        self.core.in_memory = 0

    @property
    def in_memory(self) -> bool:
        return bool(self.core.in_memory)

    @property
    def at(self) -> int:
        return int(self.core.at)

    @property
    def block(self) -> int:
        return int(self.core.block)


class Channel:
    """The private state of a thread that moves pages: bounce buffers, and the fault of its last
    call. MemoryError when there is not enough memory. Close it when its thread is done."""

    def __init__(self) -> None:
        self.core = _owned(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        self.fault = Fault()

    def close(self) -> None:
        _core.ffi.release(self.core)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Block:
    """The length of a block, and the place of its pages in the file: ``struct qm_block``."""

    def __init__(self, length: int, page_size: int, pages_offset: int = 0) -> None:
        self.core = _core.ffi.new("struct qm_block *")
        self.core.len, self.core.page_size = length, page_size
        self.core.pages_offset = pages_offset

    @classmethod
    def of(cls, layout: BlockLayout) -> Block:
        return cls(layout.length, layout.page_size, layout.pages_offset)


class File:
    """The descriptors of a file, which are borrowed: ``struct qm_file``.

    ``fd`` is buffered; with -1, the default, pages are only counted. ``direct`` bypasses the page
    cache.
    """

    def __init__(self, fd: int = -1, direct: _Direct | None = None) -> None:
        self.core = _core.ffi.new("struct qm_file *")
        self.core.fd = fd
        self.core.fd_direct = direct.fd if direct else -1
        self.core.mem_align = direct.mem_align if direct else 1
        self.core.off_align = direct.off_align if direct else 1
        self._hook: Any = None
        self._digests: Any = None

    def set_write_hook(self, hook: Callable[[int, memoryview | None, int], object]) -> None:
        """Have ``hook(offset, data, length)`` called before pages are written, by the thread that
        writes them. ``data`` is what the file will contain there if it was a hole before, or None
        if only selected pages are written; it is valid during the call."""
        self._hook = _core.ffi.new_handle(hook)
        self.core.hook, self.core.hook_arg = _write_hook, self._hook

    def digest_pages(self, blocks: Sequence[tuple[BlockLayout, _Wrapper]]) -> None:
        """Have the digests of pages entered into the table of their block as they are written.

        All pages are written, in one pass. Before it starts, each table has the digests of zero
        pages. Call it after :meth:`set_write_hook`, whose hook is called too.
        """
        places = _core.ffi.new("struct qm_digested_block[]", len(blocks))
        for place, (layout, table) in zip(places, blocks, strict=True):
            place.pages_offset, place.len = layout.pages_offset, layout.length
            place.page_size, place.table = layout.page_size, table.core
        digests = _core.ffi.new("struct qm_written_digests *")
        digests.blocks, digests.nblocks = places, len(blocks)
        digests.next, digests.next_arg = self.core.hook, self.core.hook_arg
        self.core.hook, self.core.hook_arg = _function("qm_digest_written"), digests
        self._digests = digests, places, blocks


@_core.ffi.def_extern(error=-errno.EIO)  # type: ignore[untyped-decorator]
def qm_call_write_hook(handle: Any, offset: int, data: Any, length: int) -> int:
    hook = _core.ffi.from_handle(handle)
    try:
        if data == _core.ffi.NULL:
            hook(offset, None, length)
        else:
            hook(offset, memoryview(_core.ffi.buffer(data, length)), length)
    except MemoryError:
        return -errno.ENOMEM
    return 0


_write_hook = _core.lib.qm_call_write_hook  # bound once: a replaced lib has no such pointer


class Policy:
    """How zero pages and gaps between data pages are treated: ``struct qm_policy``."""

    def __init__(
        self,
        *,
        max_gap: int = 0,
        gap_share: int = 0,
        everything: bool = False,
        mark_zero: bool = False,
        zero_clear: bool = False,
    ) -> None:
        self.everything = everything
        self.core = _core.ffi.new("struct qm_policy *")
        self.core.max_gap, self.core.gap_share = max_gap, gap_share
        self.core.everything, self.core.mark_zero = everything, mark_zero
        self.core.zero_clear = zero_clear


class Transfer:
    """One pass over one block: ``struct qm_transfer``.

    Methods that take a channel can be called from several threads, each with its own channel. They
    return 0 or a count, or a negative errno: see :func:`error_from_fault`. UsageError when a bitmap
    was closed.
    """

    def __init__(
        self,
        job: JobState,
        block: Block,
        *,
        file: File | None = None,
        memory: _Wrapper | None = None,
        policy: Policy | None = None,
        data: _Wrapper | None = None,
        selection: _Wrapper | None = None,
    ) -> None:
        self._kept = job, block, file, memory, policy
        self._bitmaps = [bitmap for bitmap in (data, selection) if bitmap is not None]
        self._core = _core.ffi.new("struct qm_transfer *")
        self._core.job, self._core.block = job.core, block.core
        if file is not None:
            self._core.file = file.core
        if memory is not None:
            self._core.memory = memory.core
        if policy is not None:
            self._core.policy = policy.core
        if data is not None:
            self._core.data = data.core
        if selection is not None:
            self._core.selection = selection.core

    @property
    def core(self) -> Any:
        for bitmap in self._bitmaps:
            bitmap.core  # noqa: B018 - raises UsageError when the bitmap was closed
        return self._core

    def write(self, channel: Channel, first: int, npages: int) -> int:
        return int(_core.lib.qm_write(self.core, channel.core, first, npages, channel.fault.core))

    def write_tail(self, channel: Channel) -> int:
        return int(_core.lib.qm_write_tail(self.core, channel.core, channel.fault.core))

    def read(self, channel: Channel, first: int, npages: int) -> int:
        return int(_core.lib.qm_read(self.core, channel.core, first, npages, channel.fault.core))

    def copy_changed(self, channel: Channel, target: CopyTarget, first: int, npages: int) -> int:
        fault = channel.fault.core
        fault.in_memory, fault.at = 1, 0
        return int(
            _core.lib.qm_copy_changed(self.core, channel.core, target.core, first, npages, fault)
        )

    def punch_stale(self, channel: Channel, first: int, npages: int) -> int:
        return int(
            _core.lib.qm_stale_punch(self.core, channel.core, first, npages, channel.fault.core)
        )

    def find_stale(self, channel: Channel, stale: _Wrapper, first: int, npages: int) -> int:
        return int(
            _core.lib.qm_find_stale(
                self.core, channel.core, stale.core, first, npages, channel.fault.core
            )
        )

    def zero_clear(self, fault: Fault) -> int:
        return int(_core.lib.qm_zero_clear(self.core, fault.core))


class CopyTarget:
    """Where the changed pages of a block are copied to: ``struct qm_copies``. ``room`` is an
    ``int64_t *``."""

    def __init__(self, table: _Wrapper, memory: object, copied: _Wrapper, room: Any) -> None:
        self.core = _core.ffi.new("struct qm_copies *")
        self._memory = _core.ffi.from_buffer("unsigned char[]", memory, require_writable=True)
        self.core.table, self.core.base = table.core, self._memory
        self.core.copied, self.core.room = copied.core, room
        self._kept = table, copied, room

    def close(self) -> None:
        """Release the buffer."""
        _core.ffi.release(self._memory)


class MemorySource:
    """Memory without an address: functions of the core that read it, and their argument.

    ``fill`` is a ``qm_fill_fn`` for whole pages, ``next`` a ``qm_next_fn``; ``kept`` is what the
    argument points to. What it reads from must stay open.
    """

    def __init__(self, fill: Any, next: Any, argument: Any, kept: object) -> None:
        self.fill = fill
        self.next = next
        self.argument = argument
        self._kept = kept

    @classmethod
    def mapped_ram(
        cls, data: _Wrapper, npages: int, pages_offset: int, page_size: int, fd: int
    ) -> MemorySource:
        """A block of a mapped-ram file; clear pages are zeros."""
        argument = _core.ffi.new("struct qm_mapped *")
        argument.data, argument.npages = data.core, npages
        argument.pages_offset, argument.page_size, argument.fd = pages_offset, page_size, fd
        return cls(_function("qm_mapped_fill"), _function("qm_mapped_next"), argument, data)

    @classmethod
    def sequential(cls, index: _Wrapper, fd: int) -> MemorySource:
        """A block of a sequential stream, by its index."""
        argument = _core.ffi.new("struct qm_indexed *")
        argument.index, argument.fd = index.core, fd
        return cls(_function("qm_indexed_fill"), _function("qm_indexed_next"), argument, index)

    @classmethod
    def buffer(cls, buffer: object) -> tuple[MemorySource, int]:
        """A buffer, which stays exported, and its length in bytes."""
        view = _core.ffi.from_buffer("unsigned char[]", buffer)
        source = cls(_function("qm_buffer_fill"), _function("qm_buffer_next"), view, buffer)
        return source, len(view)

    @classmethod
    def layered(
        cls,
        upper: MemorySource,
        lower: MemorySource,
        in_upper: _Wrapper,
        npages: int,
        page_size: int,
    ) -> MemorySource:
        """Pages of ``upper`` where ``in_upper`` has bits set, of ``lower`` elsewhere."""
        argument = _core.ffi.new("struct qm_layered *")
        argument.upper, argument.npages, argument.page_size = in_upper.core, npages, page_size
        argument.upper_fill, argument.upper_next = upper.fill, upper.next
        argument.upper_arg = upper.argument
        argument.lower_fill, argument.lower_next = lower.fill, lower.next
        argument.lower_arg = lower.argument
        kept = (upper, lower, in_upper)
        return cls(_function("qm_layered_fill"), _function("qm_layered_next"), argument, kept)

    def slice(self, offset: int) -> MemorySource:
        """The same memory from byte ``offset`` on, the start of a page."""
        argument = _core.ffi.new("struct qm_slice *")
        argument.fill, argument.next, argument.arg = self.fill, self.next, self.argument
        argument.offset = offset
        return MemorySource(_function("qm_slice_fill"), _function("qm_slice_next"), argument, self)

    def read(self, offset: int, length: int) -> bytes:
        """Return whole pages. OSError with the core's errno."""
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Read whole pages, until the buffer is full. OSError with the core's errno."""
        with _core.ffi.from_buffer(buffer) as memory:
            got = self.fill(self.argument, memory, offset, len(buffer))
        if got < 0:
            raise OSError(-got, os.strerror(-got))


class PatternSearch:
    """A search in everything that is read through :attr:`source`.

    A match is ``head`` where ``mask`` has bits set, at a multiple of ``step`` bytes.
    """

    def __init__(self, source: MemorySource, head: bytes, mask: bytes, step: int) -> None:
        self._core = _core.ffi.new("struct qm_search *")
        self._core.fill, self._core.next = source.fill, source.next
        self._core.arg = source.argument
        pattern = _core.ffi.new("unsigned char[]", head), _core.ffi.new("unsigned char[]", mask)
        self._core.head, self._core.mask = pattern
        self._core.len, self._core.step, self._core.found = len(head), step, _NOT_FOUND
        self.source = MemorySource(
            _function("qm_search_fill"), _function("qm_search_next"), self._core, (source, pattern)
        )

    @property
    def found(self) -> int | None:
        """The lowest offset of a match so far."""
        found = int(self._core.found)
        return None if found == _NOT_FOUND else found


def error_from_fault(rc: int, fault: Fault, target: str, block: str) -> PyqmigrateError:
    """Return the exception for a negative return of the core, in a transfer of ``block``."""
    number = -rc
    if number == errno.ECANCELED:
        return Cancelled("cancelled")
    what = f"cannot transfer pages of block {block!r}"
    if number in (errno.ENOMEM, errno.EINVAL) and not fault.at:
        return TargetError(number, what, target)
    if fault.in_memory:
        gone = "went away" if number == errno.EFAULT else "cannot be used"
        return GuestMemoryError(number, f"guest memory {gone} at byte {fault.at:#x}", block=block)
    return file_error_from_fault(rc, fault, what, target)


def file_error_from_fault(rc: int, fault: Fault, what: str, target: str) -> PyqmigrateError:
    """Return the exception for a negative return of the core, in a call on ``target``."""
    number = -rc
    if number == errno.ECANCELED:
        return Cancelled("cancelled")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(what, target, errno=number, position=fault.at)
    return TargetError(number, what, target, position=fault.at)


def _owned(core: Any, destroy: Any) -> Any:
    """``core``, destroyed with its last reference. MemoryError for NULL."""
    if core == _core.ffi.NULL:
        raise MemoryError
    return _core.ffi.gc(core, destroy)


def _function(name: str) -> Any:
    return _core.ffi.addressof(_core.lib, name)
