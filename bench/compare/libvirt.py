"""libvirt's recommended fast save, of the same memory: sparse, in parallel, past the page cache."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.compare.contenders import Contender, SharedRam, sync_file
from bench.compare.vm import memfd_of
from bench.results import LIBVIRT, Sample
from tests.harness.libvirt import Libvirt
from tests.harness.machine import BINARY

__all__ = ["SPARSE_PARALLEL_DIRECT", "libvirt_savers"]

SPARSE_PARALLEL_DIRECT = "sparse, parallel, bypass-cache"
_COPIED = 64 << 20  # bytes at a time
_NUMBERS = itertools.count(1)
_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='b'>{length}</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><emulator>{emulator}</emulator></devices>
</domain>
"""


@contextlib.contextmanager
def libvirt_savers(ram: SharedRam, path: Path, channels: int) -> Iterator[list[Contender]]:
    """Return None if libvirt is not available (``.ci/ensure-system qemu`` unpacks it)."""
    with contextlib.ExitStack() as stack:
        try:
            # Socket paths are short, so its directory is not among ours.
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="lv-"))
            libvirt = stack.enter_context(Libvirt(Path(name)))
        except (pytest.skip.Exception, pytest.fail.Exception):
            yield []
            return
        run = partial(_save, libvirt, ram, path, channels)
        yield [Contender(LIBVIRT, SPARSE_PARALLEL_DIRECT, run)]


def _save(libvirt: Libvirt, ram: SharedRam, path: Path, channels: int) -> Sample:
    """Of a guest that holds a copy of ``ram``; a save ends it."""
    name = f"bench-{next(_NUMBERS)}"
    xml = _DOMAIN.format(name=name, length=ram.length, emulator=shutil.which(BINARY))
    domain = libvirt.create(name, xml, "--paused")
    fd = os.open(memfd_of(domain.pid, ram.length), os.O_RDWR | os.O_CLOEXEC)
    try:
        with memoryview(ram.memory) as memory:
            for at in range(0, ram.length, _COPIED):
                os.pwrite(fd, memory[at : at + _COPIED], at)
    finally:
        os.close(fd)
    start = time.perf_counter()
    libvirt.virsh(
        "save",
        name,
        path,
        "--image-format",
        "sparse",
        "--parallel-channels",
        str(channels),
        "--bypass-cache",
    )
    sync_file(path)
    seconds = time.perf_counter() - start
    return Sample(seconds, facts={"version": libvirt.virsh("--version").strip()})
