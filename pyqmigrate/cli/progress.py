"""Progress of a job on a terminal: a bar with rich, lines without it.

It is shown on standard error if that is a terminal, unless it is :func:`hidden`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO, TypeAlias

from pyqmigrate.cli.sizes import MIB, show_size

if TYPE_CHECKING:
    from pyqmigrate.io.job import Progress

__all__ = ["Show", "hidden", "shown"]

Show: TypeAlias = "Callable[[Progress], object]"

_LINE_EVERY = 1.0  # seconds


_hidden = False


@contextlib.contextmanager
def hidden(hide: bool) -> Iterator[None]:
    """Hide progress within the block if ``hide`` is true."""
    global _hidden
    before, _hidden = _hidden, hide or _hidden
    try:
        yield
    finally:
        _hidden = before


@contextlib.contextmanager
def shown(title: str) -> Iterator[Show | None]:
    """Return a progress callback for one job, None if progress is not shown."""
    stream = sys.stderr
    if _hidden or not stream.isatty():
        yield None
        return
    try:
        import rich  # noqa: F401
    except ImportError:
        yield _lines(title, stream)
        return
    with _bar(title, stream) as show:
        yield show


def _lines(title: str, stream: TextIO) -> Show:
    last = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_EVERY:
            return
        last = now
        share = progress.bytes_done * 100 // max(progress.bytes_total, 1)
        print(
            f"{title}: {share}% of {show_size(progress.bytes_total)}, "
            f"{progress.rate / MIB:.0f} MiB/s",
            file=stream,
            flush=True,
        )

    return show


@contextlib.contextmanager
def _bar(title: str, stream: TextIO) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(title, total=None, rate="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.bytes_done,
                total=progress.bytes_total,
                rate=f"{progress.rate / MIB:.0f} MiB/s",
            )

        yield show
