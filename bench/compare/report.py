"""What was measured: printed, written as JSON, drawn."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.compare.growth import draw_growth
from bench.compare.measurements import Bench
from bench.compare.messages import say
from bench.compare.picture import draw
from bench.compare.verdicts import verdicts
from bench.disk import Disk
from bench.results import GIB, table, verdict_table
from tests.harness.machine import BINARY

__all__ = ["machine_facts", "report"]


def machine_facts(disk: Disk) -> dict[str, Any]:
    """What the numbers depend on besides the programs."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "processor": model[1] if model else platform.machine(),
        "memory_gib": round(memory / GIB, 1),
        "kernel": platform.release(),
        "filesystem": disk.filesystem,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "qemu": _version(BINARY),
        "fio": _version("fio"),
    }


def _version(program: str) -> str | None:
    if shutil.which(program) is None:
        return None
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()[0]


def report(bench: Bench, facts: dict[str, Any], options: argparse.Namespace) -> None:
    results = bench.results
    results.drop_expected()
    data = {
        "machine": facts,
        "size": bench.size,
        "channels": bench.channels,
        "repeat": bench.repeat,
        "restless": bench.disk.restless,
        "results": results.as_json(),
    }
    # Before the targets: where a run was cut off, the peer of one may be missing.
    if options.json:
        options.json.write_text(json.dumps(data, indent=1))
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n")
    head = ["work", "side", "who", "median s", "range s", "runs", "processor s"]
    print(table(head, results.lines()), end="\n\n", flush=True)
    found = verdicts(results)
    print(verdict_table(found))
    if bench.disk.restless:
        print(f"\nthe disk did not become quiet before {bench.disk.restless} of the runs")
    if options.json:
        targets = [{**vars(verdict), "reached": verdict.reached} for verdict in found]
        options.json.write_text(json.dumps(data | {"targets": targets}, indent=1))
    if options.growth_plot and not draw_growth(results, options.growth_plot):
        say("growth was not measured, so there is nothing to draw")
    if options.plot:
        title = (
            f"{bench.size / GIB:g} GiB of guest memory, {facts['cores']} cores, "
            f"{facts['filesystem']}, {facts['qemu'] or 'no QEMU'}"
        )
        if not draw(results, title, options.plot):
            say("no saves or loads were measured, so there is nothing to draw")
