"""A save and a load in a child whose vectored reads and writes are made to fail.

Arguments: directory, direct_io, page size. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import sys
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


def main() -> None:
    directory, direct_io, page_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
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
    print(json.dumps(result))


if __name__ == "__main__":
    main()
