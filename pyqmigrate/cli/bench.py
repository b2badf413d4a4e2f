"""Measure which channel count and direct I/O setting is best on a disk.

Saves a synthetic guest memory to a new file and loads it from a cold cache, with every setting in
turn, three times. The results are medians, and ranges from the slowest to the fastest run; saves are
timed up to the fsync. Settings whose ranges overlap with the fastest one's do not clearly differ from
it. All files are removed at the end.

JSON: ``directory``; ``total_ram``, and how much of it is data, ``data_bytes``;
``direct_io_reason``; ``results``, a list of ``channels``, ``direct_io``, ``save_runs`` and
``load_runs`` (the seconds of each), ``save_rate`` and ``load_rate`` (bytes of data per second, from
the medians); ``best``, an object of ``save`` and ``load``, each the ``channels`` and ``direct_io``
of the fastest, and ``no_clear_difference``, a list of the ``channels`` and ``direct_io`` of those whose
ranges overlap with its; ``plot``, the picture's path or null.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqmigrate.api import save
from pyqmigrate.cli import plot
from pyqmigrate.cli.arguments import Verbs, add_verb, read_channels
from pyqmigrate.cli.contents import PAGE, fill, guest_memory
from pyqmigrate.cli.outcome import Outcome, counted, printable, table
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.scratch import DEFAULT_DIRECTORY, fitting_size, scratch
from pyqmigrate.cli.sizes import MIB, read_size, show_size
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.page_cache import drop_cached
from pyqmigrate.snapshot.detect import open_snapshot

__all__ = ["add_parser"]

_DEFAULT_SIZE = 1024 * MIB
_DEFAULT_CHANNELS = "1,2,4,8"
_REPEAT = 3
_WORKS = ("save", "load")
_BLOCK = "pc.ram"


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "bench", _run, __doc__)
    parser.add_argument(
        "--dir",
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help="a directory on the disk to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--size", type=read_size, metavar="SIZE", help="size of the guest (default: 1GiB)"
    )
    parser.add_argument(
        "--channels",
        type=_read_list,
        metavar="N,N...",
        default=_DEFAULT_CHANNELS,
        help="channel counts to compare (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also draw a chart of the results: FILE.svg, or FILE.png, which needs matplotlib",
    )


def _read_list(text: str) -> list[int]:
    return sorted({read_channels(part) for part in text.split(",")})


@dataclass
class _Setting:
    """A setting, and the seconds that each run with it took."""

    channels: int
    direct_io: bool
    save_seconds: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)


def _run(args: argparse.Namespace) -> Outcome:
    picture = None
    if args.plot is not None:
        picture = plot.check_place(args.plot)
    with scratch(args.dir) as directory:
        size = fitting_size(args.size, _DEFAULT_SIZE, directory, memories=2)
        path = directory / "guest.mapped"
        with guest_memory(size) as memory, guest_memory(size) as copy:
            fill(memory)
            fill(copy)  # resident, like a guest's memory
            # A warm-up that is not counted; its report says whether direct I/O works here.
            first = save(path, [RamBlock(_BLOCK, memory)], direct_io=DirectIO.AUTO)
            direct_io = (True, False) if first.direct_io else (False,)
            settings = [_Setting(*pair) for pair in itertools.product(args.channels, direct_io)]
            for _ in range(_REPEAT):
                for setting in settings:
                    _measure(setting, path, memory, copy)
    data_bytes = first.data_pages * PAGE
    data = _data(args, size, data_bytes, settings, first.direct_io_reason)
    if picture is not None and args.plot is not None:
        title = f"{show_size(size)} guest in {printable(args.dir)}"
        conclusions = {work: _conclusion(data["best"], work) for work in _WORKS}
        plot.draw(picture, args.plot, data["results"], data_bytes, title, conclusions)
    return Outcome(data, _lines(data))


def _measure(setting: _Setting, path: Path, memory: mmap.mmap, copy: mmap.mmap) -> None:
    direct_io = DirectIO.ON if setting.direct_io else DirectIO.OFF
    name = f"{counted(setting.channels, 'channel')}, {_io(setting.direct_io)}"
    path.unlink()
    with shown(f"save, {name}") as show:
        saved = save(
            path,
            [RamBlock(_BLOCK, memory)],
            channels=setting.channels,
            direct_io=direct_io,
            progress=show,
        )
    with path.open("rb") as file:
        drop_cached(file.fileno())
    with open_snapshot(path) as snapshot, shown(f"load, {name}") as show:
        loaded = snapshot.load(
            {_BLOCK: copy}, channels=setting.channels, direct_io=direct_io, progress=show
        )
    setting.save_seconds.append(saved.seconds)
    setting.load_seconds.append(loaded.seconds)


def _data(
    args: argparse.Namespace, size: int, data_bytes: int, settings: list[_Setting], reason: str
) -> dict[str, Any]:
    def rate(seconds: list[float]) -> float:
        return data_bytes / statistics.median(seconds)

    results: list[dict[str, Any]] = [
        {
            "channels": setting.channels,
            "direct_io": setting.direct_io,
            "save_runs": setting.save_seconds,
            "load_runs": setting.load_seconds,
            "save_rate": rate(setting.save_seconds),
            "load_rate": rate(setting.load_seconds),
        }
        for setting in settings
    ]
    return {
        "directory": args.dir,
        "total_ram": size,
        "data_bytes": data_bytes,
        "direct_io_reason": reason,
        "results": results,
        "best": {work: _fastest(results, work) for work in _WORKS},
        "plot": args.plot,
    }


def _fastest(results: list[dict[str, Any]], work: str) -> dict[str, Any]:
    fastest = max(results, key=lambda result: float(result[f"{work}_rate"]))
    runs = f"{work}_runs"
    return {
        **_named(fastest),
        "no_clear_difference": [
            _named(result)
            for result in results
            if result is not fastest
            and min(result[runs]) <= max(fastest[runs])
            and min(fastest[runs]) <= max(result[runs])
        ],
    }


def _named(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("channels", "direct_io")}


def _conclusion(best: dict[str, Any], work: str) -> str:
    """Return a sentence on the fastest setting, and those that may be as fast."""
    fastest = best[work]
    alone = (
        f"fastest {work}: {counted(fastest['channels'], 'channel')}, {_io(fastest['direct_io'])}"
    )
    equal = [
        f"{_io(direct_io)} with {', '.join(channels)}"
        for direct_io in (True, False)
        if (
            channels := [
                str(named["channels"])
                for named in fastest["no_clear_difference"]
                if named["direct_io"] is direct_io
            ]
        )
    ]
    return f"{alone}; no clear difference: {', '.join(equal)}" if equal else alone


def _lines(data: dict[str, Any]) -> list[str]:
    best = data["best"]
    rows = [
        (
            r["channels"],
            _io(r["direct_io"]),
            *(cell for work in _WORKS for cell in _cells(data, r, work)),
        )
        for r in data["results"]
    ]
    return [
        f"guest of {show_size(data['total_ram'])}, {show_size(data['data_bytes'])} of it data, "
        f"in {printable(data['directory'])}; medians of {_REPEAT}",
        f"direct I/O: {data['direct_io_reason']}",
        "",
        *table(("channels", "I/O", "save MiB/s", "range", "load MiB/s", "range"), rows, left=2),
        "",
        *(_conclusion(best, work) for work in _WORKS),
        *([f"picture: {printable(data['plot'])}"] if data["plot"] else []),
    ]


def _cells(data: dict[str, Any], result: dict[str, Any], work: str) -> tuple[str, str]:
    """Return the median and the range of a setting, in MiB/s."""
    mark = "*" if _named(result) == _named(data["best"][work]) else " "
    slowest, fastest = (
        data["data_bytes"] / end(result[f"{work}_runs"]) / MIB for end in (max, min)
    )
    return f"{result[f'{work}_rate'] / MIB:.0f} {mark}", f"{slowest:.0f}-{fastest:.0f}"


def _io(direct_io: bool) -> str:
    return "direct" if direct_io else "buffered"
