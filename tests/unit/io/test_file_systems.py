"""Small and odd file systems, mounted for a child in a mount namespace of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from tests.harness.file_systems import _unshare, why_not
from tests.harness.snapshots import ram

ROOT = Path(__file__).parents[3]
PRELUDE = """
import json, sys, os
from pathlib import Path
import numpy as np
import pyqmigrate
from pyqmigrate import RamBlock
from tests.harness.faulty import outcome
from tests.harness.snapshots import load, ram

directory = Path(sys.argv[1])
def save(memory, name="snap", **options):
    def work():
        save.report = pyqmigrate.save(directory / name, [RamBlock("ram", memory)], **options)
    save.report = None
    result = outcome(work)
    result["names"] = [p.name for p in directory.iterdir()]
    if save.report:
        result["direct_io"] = save.report.direct_io
        result["reason"] = save.report.direct_io_reason
        result["equal"] = bool((load(directory / name)["ram"] == memory).all())
    return result
"""


def mounted(
    directory: Path, kind: str, options: str, script: str, environment: dict[str, str]
) -> Any:
    """Run a script with ``directory`` mounted for it alone; what it prints as JSON."""
    if reason := why_not():
        pytest.skip(reason)
    done = subprocess.run(
        [
            *_unshare(),
            "sh",
            "-ec",
            'mount -t "$1" -o "$2" none "$3"; exec "$4" -c "$5" "$3"',
            "sh",
            kind,
            options,
            str(directory),
            sys.executable,
            PRELUDE + script,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def mount_point(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("sparse", ["auto", "exact", "dense"])
def test_lack_of_space_is_found_before_the_first_page(
    mount_point: Path, child_environment: dict[str, str], sparse: str
) -> None:
    result = mounted(
        mount_point,
        "tmpfs",
        "size=4m",
        f"""
memory = ram(2048, density=1.0)
result = save(memory, sparse={sparse!r})
print(json.dumps(result))
""",
        child_environment,
    )
    assert result["error"] == "NoSpace"
    assert result["errno"] == 28
    assert "8 MiB" in result["text"], "the message does not tell what is needed"
    assert result["names"] == []


def test_zero_pages_need_no_space(mount_point: Path, child_environment: dict[str, str]) -> None:
    result = mounted(
        mount_point,
        "tmpfs",
        "size=4m",
        """
memory = ram(8192, density=0.02)
print(json.dumps(save(memory, sparse="exact")))
""",
        child_environment,
    )
    assert result["error"] is None, result
    assert result["equal"]


def test_space_that_goes_away_meanwhile_is_a_clear_error(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    result = mounted(
        mount_point,
        "tmpfs",
        "size=4m",
        """
from pyqmigrate.io.output import OutputFile
OutputFile.free_bytes = lambda self: 1 << 40
(directory / "snap").write_bytes(b"old")
result = save(ram(2048, density=1.0))
result["old"] = (directory / "snap").read_bytes() == b"old"
print(json.dumps(result))
""",
        child_environment,
    )
    assert result["error"] == "NoSpace"
    assert result["position"] >= 1 << 20
    assert result["names"] == ["snap"]
    assert result["old"]


def test_a_full_file_system_frees_its_space_after_the_failure(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    free = mounted(
        mount_point,
        "tmpfs",
        "size=4m",
        """
from pyqmigrate.io.output import OutputFile
OutputFile.free_bytes = lambda self: 1 << 40
save(ram(2048, density=1.0))
info = os.statvfs(directory)
print(json.dumps(info.f_bfree * info.f_frsize))
""",
        child_environment,
    )
    assert free >= (4 << 20) - 65536


def test_ramfs_refuses_direct_io_and_works_without(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    auto, demanded = mounted(
        mount_point,
        "ramfs",
        "mode=755",
        """
memory = ram(512)
print(json.dumps([save(memory), save(memory, name="other", direct_io="on")]))
""",
        child_environment,
    )
    assert auto["error"] is None, auto
    assert not auto["direct_io"]
    assert auto["equal"]
    assert demanded["error"] == "DirectIORefused"
    assert demanded["names"] == ["snap"]


def test_a_read_only_file_system_is_a_target_error(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    result = mounted(
        mount_point,
        "tmpfs",
        "ro,size=4m",
        """
print(json.dumps([save(ram(16)), save(ram(16), reuse=True)]))
""",
        child_environment,
    )
    assert [part["errno"] for part in result] == [30, 30]


def test_a_limit_on_the_size_of_files_is_a_target_error(disk: Path) -> None:
    memory = ram(2048, density=1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        with pytest.raises(pyqmigrate.TargetError) as caught:
            pyqmigrate.save(disk / "snap", [pyqmigrate.RamBlock("ram", memory)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == 27
    assert list(disk.iterdir()) == []


SEALING = """
from pyqmigrate.integrity.seal import seal
from pyqmigrate.integrity.verify import verify_seal
path = directory / "snap"
def sealed():
    return outcome(lambda: seal(path)) | {"names": sorted(p.name for p in directory.iterdir())}
def filled():
    with (directory / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
"""


def test_a_seal_that_has_no_space_leaves_the_old_one_and_the_snapshot(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    first, full, intact = mounted(
        mount_point,
        "tmpfs",
        "size=8m",
        SEALING
        + """
memory = ram(512)
save(memory)
first = sealed()
filled()
print(json.dumps([first, sealed(), verify_seal(path).intact]))
""",
        child_environment,
    )
    assert (first["error"], first["names"]) == (None, ["snap", "snap.seal"])
    assert (full["error"], full["errno"]) == ("NoSpace", 28)
    assert full["names"] == ["ballast", "snap", "snap.seal"]
    assert intact


def test_a_save_whose_seal_has_no_space_leaves_the_snapshot(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    result = mounted(
        mount_point,
        "tmpfs",
        "size=8m",
        SEALING
        + """
from pyqmigrate import save as plain
from pyqmigrate.io.output import OutputFile
publish = OutputFile.publish
def then_full(self, magic, check):
    publish(self, magic, check)
    if magic == b"QEVM":
        filled()
OutputFile.publish = then_full
memory = ram(512)
result = outcome(lambda: plain(path, [RamBlock("ram", memory)], seal="xxh3-128"))
result["names"] = sorted(p.name for p in directory.iterdir())
result["equal"] = bool((load(path)["ram"] == memory).all())
print(json.dumps(result))
""",
        child_environment,
    )
    assert result["error"] == "NoSpace"
    assert result["names"] == ["ballast", "snap"]
    assert result["equal"]


def test_a_read_only_directory_has_no_seal_written(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    result = mounted(
        mount_point,
        "tmpfs",
        "size=8m",
        SEALING
        + """
import subprocess
save(ram(512))
subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
print(json.dumps(sealed()))
""",
        child_environment,
    )
    assert (result["error"], result["errno"]) == ("TargetError", 30)
    assert result["names"] == ["snap"]


def test_a_file_system_without_direct_io_or_holes_is_sealed(
    mount_point: Path, child_environment: dict[str, str]
) -> None:
    result, intact = mounted(
        mount_point,
        "ramfs",
        "mode=755",
        SEALING
        + """
save(ram(512))
print(json.dumps([sealed(), verify_seal(path).intact]))
""",
        child_environment,
    )
    assert result["error"] is None, result
    assert intact
