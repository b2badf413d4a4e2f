"""Saves and loads in children whose vectored reads and writes are made to fail.

Run as a program with ``odd_transfers.c`` preloaded. Each line of standard input is a trial as JSON
(``directory``, ``direct_io``, ``page_size``, and in ``environment`` what the shim reads); each is
done in a child, forked from a process that has imported everything. Prints what happened as a line
of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pyqmigrate
from tests.harness.snapshots import Bytes, ram


def outcome(work: Any) -> dict[str, Any]:
    """``error``: the class of what ``work`` raised, or None."""
    try:
        work()
    except pyqmigrate.PyqmigrateError as error:
        return {
            "error": type(error).__name__,
            "errno": getattr(error, "errno", None),
            "position": getattr(error, "position", getattr(error, "offset", None)),
            "text": str(error),
        }
    return {"error": None}


def guests(page_size: int) -> dict[str, Bytes]:
    """An aligned block with gaps, and an unaligned one with a partial last unit."""
    npages = (6 << 20) // page_size
    return {
        "even": ram(npages, density=0.7, page_size=page_size),
        "odd": ram(npages // 3 + 1, density=0.7, page_size=page_size, shift=8),
    }


def tried(directory: Path, direct_io: str, page_size: int) -> dict[str, Any]:
    """What a save and a load of what it saved ended with."""
    memories = guests(page_size)
    blocks = [pyqmigrate.RamBlock(n, m, page_size) for n, m in memories.items()]
    path = directory / "snap"
    saved = outcome(lambda: pyqmigrate.save(path, blocks, direct_io=direct_io, channels=2))
    result: dict[str, Any] = {"save": saved, "names": [p.name for p in directory.iterdir()]}
    if saved["error"] is None:
        with pyqmigrate.open_snapshot(path) as snapshot:
            loaded = {name: bytearray(len(m)) for name, m in memories.items()}
            result["load"] = outcome(lambda: snapshot.load(loaded, direct_io=direct_io))
        result["equal"] = all(loaded[n] == m.tobytes() for n, m in memories.items())
    return result


def in_child(trial: dict[str, Any]) -> None:
    """Print the result of a trial, or how the child ended that did not print one."""
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(trial["environment"])
            result = tried(Path(trial["directory"]), trial["direct_io"], trial["page_size"])
            print(json.dumps(result), flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(json.dumps({"code": code}), flush=True)


def main() -> None:
    _ = pyqmigrate.save, pyqmigrate.open_snapshot  # imported on first use
    for line in sys.stdin:
        in_child(json.loads(line))


if __name__ == "__main__":
    main()
