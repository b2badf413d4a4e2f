"""The chart of a bench: MiB/s over channels, for saves and for loads."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyqmigrate.cli.sizes import MIB
from pyqmigrate.errors import NotSupported, TargetError
from pyqmigrate.io.own_files import FileKind, check_replaceable, write_whole

__all__ = ["check_available", "check_place", "draw"]

_PICTURE = FileKind("picture", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"))


def check_available() -> None:
    """Raise NotSupported, with the command to run, if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NotSupported(
            "a picture needs matplotlib, which is not installed: pip install matplotlib"
        ) from error


def check_place(path: str) -> Path:
    """Return the absolute path for the picture.

    Raises UsageError if another kind of file is there, TargetError if no file can be created.
    """
    place = check_replaceable(path, _PICTURE)
    if not os.access(place.parent, os.W_OK):
        number = errno.EACCES if place.parent.exists() else errno.ENOENT
        raise TargetError(number, "cannot write the picture", path)
    return place


def draw(path: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Write the ``results`` of a bench to ``path`` as a PNG. Needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    channels = sorted({result["channels"] for result in results})
    for axis, work in zip(axes, ("save", "load"), strict=True):
        for direct_io, name in ((True, "direct"), (False, "buffered")):
            points = {
                r["channels"]: r[f"{work}_rate"] / MIB
                for r in results
                if r["direct_io"] is direct_io
            }
            if points:
                axis.plot(list(points), list(points.values()), marker="o", label=name)
        axis.set_title(work if work == "save" else "load, cold cache")
        axis.set_xscale("log", base=2)
        axis.set_xticks(channels, [str(n) for n in channels])
        axis.set_xlabel("channels")
        axis.grid(alpha=0.3)
    fastest = max(max(r["save_rate"], r["load_rate"]) for r in results) / MIB
    axes[0].set_ylim(0, fastest * 1.05)  # shared with the other
    axes[0].set_ylabel("MiB/s of data")
    axes[0].legend()
    write_whole(
        path, _PICTURE, lambda file: figure.savefig(file, format="png", dpi=120), sync_name=False
    )
