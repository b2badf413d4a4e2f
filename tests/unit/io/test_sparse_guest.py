"""A guest that is mostly holes costs what its data costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.snapshots import ram

ROOT = Path(__file__).parents[3]
SCRIPT = """
import fcntl, json, os, sys, time
import numpy as np
import pyqmigrate
from tests.harness.snapshots import ram

size, data = 1 << 40, int(sys.argv[2]) << 20
piece = ram(256, density=1.0).tobytes()

def peak():
    lines = open("/proc/self/status").read().splitlines()
    fields = dict(line.split(":") for line in lines)
    return {k: int(fields[k].split()[0]) << 10 for k in ("VmHWM", "RssAnon", "RssShmem")}

def guest(seal):
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd

source = guest(sys.argv[3] == "sealed")
places = [n * (size // (data >> 20)) // 4096 * 4096 for n in range(data >> 20)]
for at in places:
    os.pwrite(source, piece, at)
allocated = os.fstat(source).st_blocks
before = peak()
started = time.monotonic()
report = pyqmigrate.save(sys.argv[1], [pyqmigrate.RamBlock("ram", pyqmigrate.FileMemory(source))])
saved = time.monotonic() - started
assert os.fstat(source).st_blocks == allocated, "the guest grew"
target = guest(False)
started = time.monotonic()
with pyqmigrate.open_snapshot(sys.argv[1]) as snapshot:
    snapshot.load({"ram": pyqmigrate.FileMemory(target)})
loaded = time.monotonic() - started
assert os.fstat(target).st_blocks == allocated, "holes of the target were filled"
assert all(os.pread(target, len(piece), at) == piece for at in places)
print(json.dumps({"before": before, "after": peak(), "saved": saved, "loaded": loaded,
                  "data_pages": report.data_pages, "zero_pages": report.zero_pages,
                  "allocated": report.bytes_allocated}))
"""


@pytest.mark.parametrize("seal", ["sealed", "shrinkable"])
@pytest.mark.parametrize("mib", [16, pytest.param(256, marks=pytest.mark.long)])
def test_a_tebibyte_of_holes_is_saved_and_loaded_in_little_memory(
    disk: Path, child_environment: dict[str, str], seal: str, mib: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(disk / "snap"), str(mib), seal],
        env=child_environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["data_pages"] == mib * 256
    assert result["zero_pages"] == (1 << 40) // 4096 - mib * 256
    data = mib << 20
    assert result["allocated"] <= data * 1.5 + (2 << 20) + mib * 4096
    # What the kernel reads into a mapping is the guest's, not ours.
    extra = result["after"]["VmHWM"] - result["before"]["VmHWM"] - data
    assert extra <= 96 << 20, f"{extra >> 20} MiB more than before"
    assert result["saved"] < 20
    assert result["loaded"] < 20


def test_the_piece_that_is_written_holds_no_zero_page() -> None:
    assert ram(256, density=1.0).reshape(256, -1).any(axis=1).all()
