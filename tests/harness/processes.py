"""Processes that hold memory for others to read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Self

import numpy as np

from pyqmigrate import ProcessMemory
from tests.harness.kernel import Bits, Bytes

__all__ = ["PAGE", "Holder", "as_nobody"]

PAGE = 4096

_CHILD = """
import ctypes, json, mmap, os, sys
order = json.loads(sys.stdin.readline())
length = order["length"]
if order["path"]:
    fd = os.open(order["path"], os.O_RDWR)
    memory = mmap.mmap(fd, length, order["flags"])
else:
    memory = mmap.mmap(-1, length, flags=order["flags"] | mmap.MAP_ANONYMOUS)
if hasattr(memory, "madvise"):
    memory.madvise(mmap.MADV_NOHUGEPAGE)
for page, value in order["pages"]:
    memory[page * 4096 : page * 4096 + 4096] = bytes([value]) * 4096
for page in order["looked_at"]:
    assert memory[page * 4096] == 0
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if order["unmapped"]:
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address + order["unmapped"]), ctypes.c_size_t(4096))
print(address, flush=True)
sys.stdin.read()
os._exit(0)
"""


class Holder:
    """A Python that has ``npages`` of memory, the ``touched`` ones full of a byte of their own.

    ``flags`` and ``path`` are what it maps; ``looked_at`` pages it has only read; the page at byte
    ``unmapped`` is taken away. ``content`` is what it all holds. Ends on exit.
    """

    def __init__(
        self,
        npages: int,
        touched: Collection[int],
        *,
        flags: int,
        path: Path | None = None,
        looked_at: Collection[int] = (),
        unmapped: int = 0,
    ) -> None:
        self.length = npages * PAGE
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pages = [(page, page % 255 + 1) for page in touched]
        self.content: Bytes = np.zeros(self.length, dtype=np.uint8)
        if path is not None:
            stored = path.read_bytes()[: self.length]
            self.content[: len(stored)] = np.frombuffer(stored, dtype=np.uint8)
        for page, value in pages:
            self.content[page * PAGE : (page + 1) * PAGE] = value
        order = {
            "length": self.length,
            "pages": pages,
            "path": path and str(path),
            "flags": flags,
            "looked_at": [*looked_at],
            "unmapped": unmapped,
        }
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        self.address = int(self.process.stdout.readline())

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def memory(self) -> ProcessMemory:
        return ProcessMemory(self.pid, self.address, self.length)

    def present(self) -> Bits:
        """Which pages are there, by /proc/PID/pagemap."""
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            raw = os.pread(pagemap.fileno(), self.length // PAGE * 8, self.address // PAGE * 8)
        words = np.frombuffer(raw, dtype="<u8")
        present: Bits = (words >> np.uint64(63)).astype(np.bool_)
        return present

    def page_tables(self) -> int:
        """KiB of page tables."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmPTE:\s+(\d+)", status)
        assert found is not None
        return int(found[1])

    def end(self) -> None:
        """Kill it, and reap it: from now on its number is nobody's."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def as_nobody(memory: ProcessMemory) -> int:
    """The errno with which another user is refused ``memory``; 0 when it is not. Root only."""
    child = os.fork()
    if child == 0:
        number = 255
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            refusal = memory.refusal()
            number = 0 if refusal is None else refusal.errno or 255
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
