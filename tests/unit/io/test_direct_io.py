"""Direct I/O on btrfs, whose kernel does not report the alignment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.file_systems import why_not

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
SAVES = """
import json, sys
from pathlib import Path
import pyqmigrate
from pyqmigrate import RamBlock
from pyqmigrate.io.page_cache import drop_cached
from tests.harness.snapshots import load, ram

directory, found = Path(sys.argv[1]), {}
memory = ram(4096)
for name in ("plain", "nocow"):
    path = directory / name / "snap"
    report = pyqmigrate.save(path, [RamBlock("ram", memory)], seal="xxh3-128")
    with path.open("rb") as file:
        drop_cached(file.fileno())
    check = pyqmigrate.verify_seal(path)
    equal = bool((load(path)["ram"] == memory).all())
    found[name] = [
        report.direct_io, report.direct_io_reason, check.direct_io, check.intact and equal
    ]
print(json.dumps(found))
"""


def test_on_btrfs_only_files_without_checksums_are_written_directly(
    disk: Path, child_environment: dict[str, str]
) -> None:
    if os.geteuid() != 0 or why_not():
        pytest.skip("only root can mount a loop device")
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed")
    image, place = disk / "image", disk / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    script = (
        'mount -o loop "$1" "$2" || exit 77; mkdir "$2/plain" "$2/nocow"; chattr +C "$2/nocow"; '
        'exec "$3" -c "$4" "$2"'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", image, place, sys.executable, SAVES],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    if done.returncode == 77:
        pytest.skip(f"btrfs cannot be mounted: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, nocow = found["plain"], found["nocow"]
    assert (plain[0], plain[2:]) == (False, [True, True])
    assert "checksums" in plain[1]
    assert (nocow[0], nocow[2:]) == (True, [True, True])
