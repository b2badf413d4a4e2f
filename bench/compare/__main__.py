"""This package, QEMU and fio side by side: the same memory, the same directory, taking turns.

    python bench/compare --dir /var/tmp --size 4GiB --json speed.json --plot speed.png

Every run is timed to its fsync. What counts is the ratio of medians within one run of this
program: disks and shared machines drift. A row of the last table says ``reached`` or ``missed``;
the exit status does not depend on it.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

# Last, so that an installed pyqmigrate comes before a tree whose core is not compiled.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.compare.arguments import parse_arguments
from bench.compare.measurements import Bench
from bench.compare.messages import say
from bench.compare.report import machine_facts, report
from bench.disk import Disk, NotADisk
from bench.results import GIB
from pyqmigrate.io.available_memory import available_memory
from tests.harness.machine import BINARY

_COPIES = 4  # of the guest's memory for saves: shared, two anonymous, libvirt's guest


def check_room(directory: Path, size: int, parts: Collection[str]) -> str | None:
    """Why there is not enough of something; None if there is."""
    need = 2 * max(size, GIB)
    if (free := shutil.disk_usage(directory).free) < need:
        return f"{directory} has {free / GIB:.1f} GiB free, {need / GIB:.1f} GiB are needed"
    if (free := shutil.disk_usage("/dev/shm").free) < need:
        return f"/dev/shm has {free / GIB:.1f} GiB free, {need / GIB:.1f} GiB are needed"
    need = _COPIES * size if "saves" in parts else 0
    if (free := available_memory() or need) < need:
        return f"{free / GIB:.1f} GiB of memory are available, saves need {need / GIB:.1f} GiB: choose a smaller --size"
    return None


def main() -> int:
    options = parse_arguments((__doc__ or "").splitlines()[0])
    # What is mounted and written is removed also when the run is ended early.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.dir.mkdir(parents=True, exist_ok=True)
    try:
        Disk(options.dir)
    except NotADisk as error:
        say(f"{error}: choose another directory with --dir")
        return 2
    if reason := check_room(options.dir, options.size, options.only):
        say(reason)
        return 3
    for program in (BINARY, "fio"):
        if shutil.which(program) is None:
            say(f"{program} is not on the PATH: what is measured against it is left out")
    with tempfile.TemporaryDirectory(prefix="compare-", dir=options.dir) as name:
        bench = Bench(options, Disk(Path(name)))
        facts = machine_facts(bench.disk)
        try:
            bench.run(options.only)
        finally:  # what was measured before a failure is kept
            report(bench, facts, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
