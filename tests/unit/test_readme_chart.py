"""README.md's chart shows the numbers of its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_chart_is_that_of_the_table(tmp_path: Path) -> None:
    drawn = tmp_path / "speed.svg"
    subprocess.run([sys.executable, ROOT / "bench" / "readme_chart.py", drawn], check=True)
    assert drawn.read_bytes() == (ROOT / "docs" / "pictures" / "speed.svg").read_bytes(), (
        "run python bench/readme_chart.py"
    )
