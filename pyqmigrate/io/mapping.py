"""Closing memory that is mapped."""

from __future__ import annotations

import mmap

__all__ = ["unmap"]


def unmap(memory: mmap.mmap) -> None:
    """Close a mapping, idempotently; raises nothing.

    After a failure the traceback may still hold a view of it, which keeps Python from closing it.
    What is raised then must be the failure, not this: the memory goes with its last view.
    """
    try:
        memory.close()
    except BufferError:
        return
