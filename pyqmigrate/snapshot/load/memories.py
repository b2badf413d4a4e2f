"""The memories that a caller gives for the blocks of a snapshot."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pyqmigrate.errors import BlockMismatch
from pyqmigrate.io.memory import Memory, OpenMemory

__all__ = ["check_known", "match_memories", "open_memory"]


def check_known(names: Collection[str], blocks: Collection[str]) -> None:
    """Raise BlockMismatch unless a snapshot of these blocks has all of these names."""
    unknown = next((name for name in names if name not in blocks), None)
    if unknown is not None:
        raise BlockMismatch(f"the snapshot has no block {unknown!r}; it has {[*blocks]}")


def match_memories(
    blocks: Collection[str], memories: Mapping[str, Memory], *, skip_missing: bool = False
) -> None:
    """Raise BlockMismatch for a memory without a block, and unless ``skip_missing`` for a block
    without a memory."""
    missing = next((name for name in blocks if name not in memories), None)
    if missing is not None and not skip_missing:
        raise BlockMismatch(
            f"no memory is given for block {missing!r}; the snapshot has {[*blocks]}"
        )
    check_known(memories, blocks)


def open_memory(
    name: str, memory: Memory, length: int, *, writable: bool, source_fd: int | None = None
) -> OpenMemory:
    """Open the memory of a block of ``length`` bytes; the caller closes it.

    ``source_fd`` is the file that is read: it cannot be its own memory. Raises BlockMismatch for
    another length, UsageError, GuestMemoryError.
    """
    opened = OpenMemory(name, memory, writable=writable)
    try:
        if source_fd is not None:
            opened.refuse_as_source(source_fd)
        if opened.length != length:
            raise BlockMismatch(
                f"memory of block {name!r} has {opened.length} bytes, but {length} in the snapshot"
            )
    except BaseException:
        opened.close()
        raise
    return opened
