"""README.md's table of saves, and the sentence above it, from the samples of one run of ``make bench``.

python bench/readme_table.py build/bench/samples.json          (then draw it: bench/readme_chart.py)
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Last, so that an installed pyqmigrate comes before a tree whose core is not compiled.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.compare.libvirt import SPARSE_PARALLEL_DIRECT
from bench.compare.vm import VM_DIRECT, VM_QEMU
from bench.results import FIO, LIBVIRT, OURS, QEMU

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- speed: bench/readme_table.py -->\n", "<!-- end of speed -->\n"

_COLUMNS = {
    "save dense": "dense",
    "save runs": "runs: half zero, random 64 KiB",
    "save speckled": "speckled: 30 % single pages zero",
}
# The label of a row, and which contenders of a side it is about: the fastest of them.
_ROWS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "**pyqmigrate**, memory as a file": (OURS, lambda name: name == "file memory"),
    "**pyqmigrate**, memory as a buffer": (OURS, lambda name: name == "buffer"),
    "**pyqmigrate vm save**, engine direct": (OURS, lambda name: name == VM_DIRECT),
    "**pyqmigrate vm save**, engine qemu": (OURS, lambda name: name == VM_QEMU),
    "QEMU with multifd and direct I/O, its defaults": (QEMU, lambda name: name == "defaults"),
    "QEMU, the best of its settings for each": (QEMU, lambda _: True),
    "libvirt, sparse + parallel + bypass-cache": (
        LIBVIRT,
        lambda name: name == SPARSE_PARALLEL_DIRECT,
    ),
    "fio, fresh file, 1 MiB direct writes": (FIO, lambda _: True),
}


def speed(run: Mapping[str, Any]) -> str:
    """Return the sentence and the table of a run (what ``bench/compare --json`` writes)."""
    times: dict[tuple[str, str], list[list[float]]] = {}
    for result in run["results"]:
        seconds = [sample["seconds"] for sample in result["samples"]]
        for label, (side, chosen) in _ROWS.items():
            if result["side"] == side and chosen(result["name"]):
                times.setdefault((result["work"], label), []).append(seconds)
    lines = [
        f"| seconds (fastest to slowest run) | {' | '.join(_COLUMNS.values())} |",
        f"|---|{'---|' * len(_COLUMNS)}",
    ]
    for label in _ROWS:
        cells = [_cell(times.get((work, label), []), label) for work in _COLUMNS]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*_method(run), "", *lines, ""])


def _cell(contenders: list[list[float]], label: str) -> str:
    if not contenders:
        return ""
    seconds = min(contenders, key=statistics.median)
    median = f"{statistics.median(seconds):.2f}"
    if label.startswith("**"):
        median = f"**{median}**"
    return median if len(seconds) == 1 else f"{median} ({min(seconds):.2f} to {max(seconds):.2f})"


def _method(run: Mapping[str, Any]) -> Iterator[str]:
    facts = run["machine"]
    version = re.compile(r"\d+(?:\.\d+)+")
    programs = [
        f"{name} {found[0]}"
        for name, line in (
            ("QEMU", facts["qemu"]),
            ("libvirt", _libvirt(run["results"])),
            ("fio", facts["fio"]),
        )
        if line and (found := version.search(line))
    ]
    kernel = ".".join(facts["kernel"].split(".")[:2])
    runs = [len(r["samples"]) for r in run["results"] if r["work"] in _COLUMNS]
    yield f"Measured in one run, interleaved, medians of {min(runs)} to {max(runs)} runs each,"
    yield f"up to and including the fsync: {run['size'] / (1 << 30):g} GiB of guest RAM in a file on tmpfs,"
    yield f"{run['channels']} channels, {facts['filesystem']}, {facts['cores']} cores, Linux {kernel},"
    yield f"{', '.join(programs)} (`make bench`; [method](bench/README.md)):"


def _libvirt(results: list[dict[str, Any]]) -> str | None:
    samples = [
        sample for result in results if result["side"] == LIBVIRT for sample in result["samples"]
    ]
    return samples[0]["facts"].get("version") if samples else None


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    head, rest = README.read_text().split(START)
    picture = rest[rest.index("![") :].partition("\n")[0]
    method, _, table = speed(run).partition("\n\n")
    README.write_text(f"{head}{START}{method}\n\n{picture}\n\n{table}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
