"""The program of the page on embedding runs, and is the one that the page shows."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"
PROGRAM = DOCS / "examples" / "vmm.py"
AWAITED = DOCS / "examples" / "await_save.py"


def test_the_program_saves_a_running_guest_and_loads_it_back(tmp_path, child_environment):
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["saved: completed", "loaded: completed", "equal: True"]
    assert done.stderr == ""


def test_the_second_program_awaits_a_save_and_cancels_one(tmp_path, child_environment):
    done = subprocess.run(
        [sys.executable, AWAITED, tmp_path],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "saved: 5 pages\ncancelled: True ['snapshot']\n"


def test_the_page_shows_exactly_the_programs():
    shown = re.findall(r"```python\n(.*?)```", (DOCS / "embedding.md").read_text(), re.DOTALL)
    assert shown == [PROGRAM.read_text(), AWAITED.read_text()]


def test_the_program_has_under_sixty_lines():
    assert len(PROGRAM.read_text().splitlines()) < 60
