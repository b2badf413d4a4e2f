"""README.md's table has the numbers of a run, and its chart those of the table."""

from __future__ import annotations

from typing import Any

from bench.readme_chart import Bar, read_table
from bench.readme_table import speed


def test_table_has_the_median_and_the_range_of_the_fastest_contender() -> None:
    run = {
        "machine": {
            "kernel": "6.18.44-x",
            "filesystem": "ext4",
            "cores": 2,
            "qemu": "QEMU emulator version 10.0.2 (Debian)",
            "fio": None,
        },
        "size": 4 << 30,
        "channels": 2,
        "repeat": 3,
        "results": [
            _result("save dense", "pyqmigrate", "file memory", 1.25, 1.0, 1.5),
            _result("save dense", "qemu", "defaults", 2.0, 2.5, 2.25),
            _result("save dense", "qemu", "buffered", 9.0),
            _result("save runs", "qemu", "defaults", 9.0),
            _result("save runs", "qemu", "buffered", 3.0, 4.0),
            _result("load dense", "pyqmigrate", "file memory", 1.0),
        ],
    }
    method, _, table = speed(run).partition("\n\n")
    assert "Linux 6.18,\nQEMU 10.0.2 (" in method and "medians of 1 to 3 runs" in method
    best, defaults = "QEMU, the best of its settings for each", "QEMU with multifd and direct I/O"
    assert read_table(f"{table}\n") == {
        "dense": [
            Bar("pyqmigrate, memory as a file", 1.25, 1.0, 1.5),
            Bar(f"{defaults}, its defaults", 2.25, 2.0, 2.5),
            Bar(best, 2.25, 2.0, 2.5),
        ],
        "runs: half zero, random 64 KiB": [
            Bar(f"{defaults}, its defaults", 9.0, 9.0, 9.0),
            Bar(best, 3.5, 3.0, 4.0),
        ],
        "speckled: 30 % single pages zero": [],
    }


def _result(work: str, side: str, name: str, *seconds: float) -> dict[str, Any]:
    samples = [{"seconds": one, "facts": {}} for one in seconds]
    return {"work": work, "side": side, "name": name, "samples": samples}
