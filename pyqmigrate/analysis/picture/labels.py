"""The texts of a picture: title, legend, names of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import Painter, Rgb
from pyqmigrate.format.printable import printable

__all__ = ["Legend", "legend_of", "names_of", "show_bytes"]

Sample = Sequence[tuple[bytes, Rgb]]  # a cell that looks so, and its colour


def show_bytes(size: int) -> str:
    """Return a size in the largest unit that gives a whole number, or one digit behind the point."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            value = size / (1 << shift)
            return f"{value:.0f} {unit}" if value == round(value) else f"{value:.1f} {unit}"
    return f"{size} B"


def names_of(names: Sequence[str], room: int) -> str:
    """Return names of blocks in ``room`` characters."""
    text = ", ".join(map(printable, names))
    if len(text) <= room:
        return text
    return text[: max(room - 1, 0)] + "~" if room > 1 else ""


@dataclass(frozen=True)
class Legend:
    """``title`` is lines about the whole map."""

    title: tuple[str, ...]
    _found: MemoryMap

    def entries(self, painter: Painter) -> Iterator[tuple[str, Sample]]:
        """Yield a text and samples for each class; the first is the ramp of entropy."""
        pages, theme = self._found.pages, painter.theme
        ramp = [
            (bytes((1, 255, 0, 0, 16 + 32 * n, 0, 0, 0)), painter.by_entropy(n + 0.5))
            for n in range(8)
        ]
        yield f"data, 0 to 8 bits of entropy a byte: {self._part(pages.data)}", ramp
        filled = bytes((1, 0, 255, 0, 0, 0, 0, 0))
        yield f"one word again and again: {self._part(pages.filled)}", [(filled, theme.filled)]
        zero = bytes((1, 0, 0, 255, 0, 0, 0, 0))
        yield f"stored zeros: {self._part(pages.zero)}", [(zero, theme.zero)]
        hole = bytes((1, 0, 0, 0, 0, 0, 0, 0))
        yield f"not stored, zeros: {self._part(pages.hole)}", [(hole, theme.hole)]
        if self._found.against is not None:
            text = f"changed against {printable(self._found.against)}: {self._part(pages.changed)}"
            yield text, [(bytes((1, 255, 0, 0, 0, 255, 0, 0)), theme.changed)]
        if self._found.working_set:
            text = f"touched after a restore: {self._part(pages.touched)}"
            yield text, [(bytes((1, 255, 0, 0, 0, 0, 255, 0)), theme.touched)]

    def _part(self, pages: int) -> str:
        total = self._found.pages.all
        share = 100 * pages / total if total else 0.0
        digits = 0 if share >= 10 or not pages else 1
        sizes = {*self._found.page_sizes.values()}
        size = f"{show_bytes(pages * sizes.pop())}, " if len(sizes) == 1 else ""
        return f"{size}{pages} pages, {share:.{digits}f} %"


def legend_of(found: MemoryMap) -> Legend:
    """Return the texts of a map."""
    machine = f", {printable(found.machine)}" if found.machine else ""
    order = "guest-physical addresses" if found.by == "address" else "blocks"
    return Legend(
        (
            f"{printable(found.snapshot)}: {show_bytes(found.length)}{machine}; by {order}, "
            f"a cell is {show_bytes(found.cell_size)}",
        ),
        found,
    )
