"""Show the main job on a synthetic guest memory.

Saves a guest memory with dense, fragmented and speckled parts with and without direct I/O, verifies the
file, loads it back from a cold cache and compares the memory. If a QEMU >= 9.0 is on the PATH, it
loads the file too. Without ``--size`` the guest has 1 GiB, or less if that does not fit. All files are
removed at the end. The exit code is 1 if a loaded memory differs.

JSON: ``directory``; ``total_ram``; ``data_pages``, ``zero_pages``; ``equal``
(true: every loaded memory was equal to the saved one); ``direct_io_reason``; ``steps``, a list of
``step`` (save, load, qemu-load), ``direct_io``, ``seconds``, ``rate`` (bytes of data per
second), ``file_size``, ``bytes_allocated`` and ``bytes_cached`` (left in the page cache),
``difference`` (null, or the byte offset of the first page that differs); ``qemu``, the
version or null, and ``qemu_reason``, why no QEMU was used, or null.
"""

from __future__ import annotations

import argparse
import mmap
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pyqmigrate.api import save
from pyqmigrate.cli import demo_qemu
from pyqmigrate.cli.arguments import Verbs, add_channels, add_verb
from pyqmigrate.cli.contents import PAGE, fill, first_difference, guest_memory
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome, counted, printable, table
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.scratch import DEFAULT_DIRECTORY, fitting_size, scratch
from pyqmigrate.cli.sizes import MIB, read_size, show_rate, show_size
from pyqmigrate.errors import SnapshotError
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.page_cache import cached_bytes, drop_cached
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.save.writer import SaveReport

__all__ = ["add_parser"]

_DEFAULT_SIZE = 1024 * MIB
_FILE = "guest.mapped"
_STALE = b"\xa5" * MIB


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "demo", _run, __doc__)
    parser.add_argument(
        "--size", type=read_size, metavar="SIZE", help="size of the guest (default: 1GiB)"
    )
    parser.add_argument(
        "--dir",
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help="where to save (default: %(default)s)",
    )
    add_channels(parser)


@dataclass(frozen=True)
class _Step:
    """One measured transfer, and the state of the file after it. Sizes are in bytes."""

    step: str
    direct_io: bool
    seconds: float
    data_bytes: int
    file_size: int
    bytes_allocated: int
    bytes_cached: int
    difference: int | None = None


def _run(args: argparse.Namespace) -> Outcome:
    qemu = demo_qemu.find_qemu()
    with scratch(args.dir) as directory:
        size = fitting_size(args.size, _DEFAULT_SIZE, directory, memories=2)
        with guest_memory(size) as memory:
            fill(memory)
            guest = _Guest(memory, directory / _FILE, args.channels)
            steps = list(guest.save_and_load(DirectIO.AUTO))
            reason = guest.report.direct_io_reason
            if isinstance(qemu, demo_qemu.Qemu):
                steps.append(guest.load_in(qemu))
            if guest.report.direct_io:
                steps += guest.save_and_load(DirectIO.OFF)
            return _outcome(args, size, guest.report, steps, reason, qemu)


class _Guest:
    """A memory, and the file that it is saved to. ``report`` is that of the last save."""

    report: SaveReport

    def __init__(self, memory: mmap.mmap, path: Path, channels: int) -> None:
        self._memory = memory
        self._path = path
        self._channels = channels

    def save_and_load(self, direct_io: DirectIO) -> Iterator[_Step]:
        """Save to a new file, verify it, and load it back."""
        self._path.unlink(missing_ok=True)
        with shown("save") as show:
            self.report = save(
                self._path,
                [RamBlock(demo_qemu.BLOCK, self._memory)],
                channels=self._channels,
                direct_io=direct_io,
                progress=show,
            )
        yield self._step("save", self.report.direct_io, self.report.seconds)
        with open_snapshot(self._path) as snapshot, guest_memory(len(self._memory)) as copy:
            snapshot.verify()
            block = snapshot.blocks[demo_qemu.BLOCK]
            if block.data_pages != self.report.data_pages:
                raise SnapshotError("the bitmap differs from the saved pages", block=block.name)
            # The comparison then finds every page that the load does not write, zero pages included.
            for offset in range(0, len(copy), MIB):
                copy[offset : offset + MIB] = _STALE
            self._drop_cached()
            with shown("load") as show:
                loaded = snapshot.load(
                    {block.name: copy}, channels=self._channels, direct_io=direct_io, progress=show
                )
            difference = first_difference(self._memory, copy)
        yield self._step("load", loaded.direct_io, loaded.seconds, difference)

    def load_in(self, qemu: demo_qemu.Qemu) -> _Step:
        """Let a QEMU load the file of the last save."""
        direct_io = self.report.direct_io
        size = len(self._memory)
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._drop_cached()
            seconds = demo_qemu.load(
                qemu, self._path, fd, size, channels=self._channels, direct_io=direct_io
            )
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as loaded:
                difference = first_difference(self._memory, loaded)
        finally:
            os.close(fd)
        return self._step("qemu-load", direct_io, seconds, difference)

    def _drop_cached(self) -> None:
        with self._path.open("rb") as file:
            drop_cached(file.fileno())

    def _step(
        self, step: str, direct_io: bool, seconds: float, difference: int | None = None
    ) -> _Step:
        with self._path.open("rb") as file:
            info = os.fstat(file.fileno())
            return _Step(
                step,
                direct_io,
                seconds,
                self.report.data_pages * PAGE,
                info.st_size,
                info.st_blocks * 512,
                cached_bytes(file.fileno()),
                difference,
            )


def _outcome(
    args: argparse.Namespace,
    size: int,
    report: SaveReport,
    steps: list[_Step],
    reason: str,
    qemu: demo_qemu.Qemu | str,
) -> Outcome:
    equal = all(step.difference is None for step in steps)
    found = isinstance(qemu, demo_qemu.Qemu)
    data = {
        "directory": args.dir,
        "total_ram": size,
        "data_pages": report.data_pages,
        "zero_pages": report.zero_pages,
        "equal": equal,
        "direct_io_reason": reason,
        "steps": [_step_data(step) for step in steps],
        "qemu": str(qemu).removeprefix("QEMU ") if found else None,
        "qemu_reason": None if found else qemu,
    }
    names = {"save": "save", "load": "load back", "qemu-load": f"{qemu} loads"}
    rows = [
        (
            names[step.step],
            "direct" if step.direct_io else "buffered",
            f"{step.seconds:.2f}",
            show_rate(step.data_bytes, step.seconds),
            report.data_pages,
            report.zero_pages,
            show_size(step.file_size),
            show_size(step.bytes_allocated),
            show_size(step.bytes_cached),
        )
        for step in steps
    ]
    head = (
        "",
        "I/O",
        "seconds",
        "MiB/s",
        "data pages",
        "zero pages",
        "apparent",
        "allocated",
        "page cache",
    )
    lines = [
        f"guest of {show_size(size)} in {printable(args.dir)}, {counted(args.channels, 'channel')}",
        f"direct I/O: {reason}",
        "",
        *table(head, rows, left=2),
        "",
        *(f"{names[step.step]}: {_verdict(step)}" for step in steps if step.step != "save"),
        *([] if found else [printable(f"not loaded by QEMU: {qemu}")]),
    ]
    return Outcome(data, lines, ExitCode.DONE if equal else ExitCode.BAD)


def _step_data(step: _Step) -> dict[str, object]:
    data = asdict(step)
    data["rate"] = data.pop("data_bytes") / step.seconds
    return data


def _verdict(step: _Step) -> str:
    how = "direct" if step.direct_io else "buffered"
    if step.difference is None:
        return f"memory is equal ({how})"
    return f"MEMORY DIFFERS from byte {step.difference:#x} on ({how})"
