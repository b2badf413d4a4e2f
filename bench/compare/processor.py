"""What the processor is used for: the zero scan against plain reading, and Python's share."""

from __future__ import annotations

import contextlib
import mmap
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyqmigrate
from bench.results import OURS, Results, Sample
from bench.vector_read import vector_read
from pyqmigrate import _core

__all__ = ["PYTHON_WORK", "measure_scan", "save_with_core_clock"]

PYTHON_WORK = "python's share"
PAGE = 4096
PIECE = 1 << 20
_CHANNEL = re.compile(r"pyqmigrate-save-\d+")  # the names of a save's channels' threads


def measure_scan(length: int, repeat: int, results: Results) -> None:
    """Scan, sum and widest reads of the same ``length`` bytes of zeros, one thread, taking turns."""
    ffi, lib = _core.ffi, _core.lib
    with contextlib.closing(mmap.mmap(-1, length)) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        # Written, so that it is real memory and not one zero page mapped again and again.
        for at in range(0, length, PIECE):
            memory[at : at + PIECE] = bytes(PIECE)
        bits = ffi.new("uint64_t[]", length // PAGE // 64)
        with ffi.from_buffer(memory) as data:
            address, widest = int(ffi.cast("uintptr_t", data)), vector_read()
            for _ in range(repeat):
                for name in ("sum", "scan", "vectors"):
                    start = time.perf_counter()
                    if name == "scan":
                        found = lib.qm_scan(data, length // PAGE, PAGE, bits)
                    elif name == "vectors":
                        found = widest(address, length)
                    else:
                        found = lib.qm_sum(data, length)
                    seconds = time.perf_counter() - start
                    if found:
                        raise AssertionError(f"the {name} of zeros is {found}")
                    results.add("scan", OURS, name, Sample(seconds, facts={"bytes": length}))


class _TimedLib:
    """The core, with a clock on the processor time that each thread spends inside it."""

    def __init__(self, lib: Any) -> None:
        self.lib = lib
        self.seconds: defaultdict[int, float] = defaultdict(float)  # by the thread's identifier

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.lib, name)
        if not callable(function):
            return function

        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.seconds[threading.get_ident()] += time.thread_time() - start

        setattr(self, name, timed)
        return timed


@contextlib.contextmanager
def _core_clock() -> Iterator[_TimedLib]:
    """While it lasts, ``seconds`` of what it gives counts the processor time inside the core."""
    timed = _TimedLib(_core.lib)
    _core.lib = timed  # type: ignore[assignment]
    try:
        yield timed
    finally:
        _core.lib = timed.lib


@contextlib.contextmanager
def _python_of_threads(core: _TimedLib) -> Iterator[dict[str, float]]:
    """While it lasts, what it gives counts the processor time outside the core, by name, of threads that end."""
    spent: defaultdict[str, float] = defaultdict(float)
    run = threading.Thread.run

    def timed(thread: threading.Thread) -> None:
        core.seconds[threading.get_ident()] = 0.0  # identifiers are used again
        try:
            run(thread)
        finally:
            spent[thread.name] += time.thread_time() - core.seconds[threading.get_ident()]

    threading.Thread.run = timed  # type: ignore[assignment, method-assign]
    try:
        yield spent
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]


def save_with_core_clock(path: Path, memory: Any, channels: int) -> Sample:
    """One save. The fact ``python_seconds`` is the processor time of its threads outside the core: the interpreter, and
    the system calls that it makes itself (the fsync among them). ``fixed_seconds`` is the same without the channels'
    threads, so it does not grow with the memory."""
    with _core_clock() as core, _python_of_threads(core) as ended:
        cpu, own, start = time.process_time(), time.thread_time(), time.perf_counter()
        pyqmigrate.save(path, [pyqmigrate.RamBlock("pc.ram", memory)], channels=channels)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        own = time.thread_time() - own - core.seconds[threading.get_ident()]
    fixed = own + sum(spent for name, spent in ended.items() if not _CHANNEL.fullmatch(name))
    return Sample(
        seconds, cpu, {"python_seconds": own + sum(ended.values()), "fixed_seconds": fixed}
    )
