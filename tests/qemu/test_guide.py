"""The programs of the guide's section on any snapshot run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyqmigrate import convert, open_snapshot
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.saved import RAM, Saved, save_guest

pytestmark = pytest.mark.qemu

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
SECTION = "Any snapshot: open, inspect, convert"


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, ["-M", "pc", "-m", str(RAM >> 20)])


@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
def test_programs_run_on_either_kind(
    form: str, saved: Saved, disk: Path, child_environment: dict[str, str]
) -> None:
    convert(saved.path, disk / "guest.snapshot", to=form)
    text = GUIDE.read_text().split(f"\n## {SECTION}\n")[1].split("\n## ")[0]
    programs = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    printed = subprocess.run(
        [sys.executable, "-c", "".join(programs)],
        cwd=disk,
        env=child_environment,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    assert printed[0].startswith(f"{form} pc-i440fx-")
    assert f"pc.ram {RAM} 4096" in " ".join(printed)
    assert any(line.startswith("True () ") and line.endswith(" running") for line in printed)
    assert (disk / "raw" / "pc.ram.raw").read_bytes() == saved.memory["pc.ram"]
    with open_snapshot(disk / "guest.mapped") as one, open_snapshot(disk / "guest.stream") as other:
        for snapshot in (one, other):
            read = {n: b.read(0, b.length) for n, b in snapshot.blocks.items()}
            assert_same_blocks(read, saved.memory)
