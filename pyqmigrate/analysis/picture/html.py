"""A map as one page: zoom from the whole guest to a page of memory, and look at its bytes.

The page loads nothing. It has the summaries of all cells, and the bytes of some pages; it says of which.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files

from pyqmigrate.analysis.areas import Extent, Part
from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.format.printable import printable
from pyqmigrate.io.page_map import SUMMARY
from pyqmigrate.io.picture_kinds import HTML_HEAD
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["BYTES_MAX", "html_of"]

FIRST_BYTES = 4 << 20  # of data, unless a range is given
BYTES_MAX = 64 << 20
_PIECE = 256 << 10  # bytes that the page unpacks at a time


def html_of(found: MemoryMap, snapshot: Snapshot, extent: Extent | None = None) -> Iterator[bytes]:
    """Yield the page in pieces.

    ``snapshot`` is the open one that was scanned: bytes of its pages with data are taken from it, of
    ``extent``, at most ``BYTES_MAX``, or else of the first ``FIRST_BYTES``. Raises the errors of reading.
    """
    template = _file("page.html")
    before, after = template.split("<!-- data -->")
    yield HTML_HEAD + before.replace("/* style */", _file("page.css")).encode()
    limit = FIRST_BYTES if extent is None else BYTES_MAX
    pieces: list[tuple[int, int, int]] = []
    complete = True
    for area, start, data in _pieces(found, snapshot, extent, limit):
        if data is None:
            complete = False
            break
        yield _script(f"bytes{len(pieces)}", zlib.compress(data, 6))
        pieces.append((area, start, len(data)))
    planes = b"".join(
        b"".join(mapped.cells[plane::SUMMARY] for mapped in found.areas) for plane in range(7)
    )
    yield _script("cells", zlib.compress(planes, 9))
    yield _json(_described(found, pieces, limit, complete, extent))
    yield after.replace("/* script */", _file("page.js")).encode()


def _file(name: str) -> str:
    return files("pyqmigrate.analysis.picture").joinpath(name).read_text("utf-8")


def _script(name: str, data: bytes) -> bytes:
    text = base64.b64encode(data)
    return b'<script type="text/plain" id="' + name.encode() + b'">' + text + b"</script>\n"


def _json(data: object) -> bytes:
    # Names come from files: no "<" may begin a tag, and lone surrogates are escapes already.
    text = json.dumps(data).replace("<", "\\u003c")
    return f'<script type="application/json" id="map">{text}</script>\n'.encode()


def _described(
    found: MemoryMap,
    pieces: list[tuple[int, int, int]],
    limit: int,
    complete: bool,
    extent: Extent | None,
) -> dict[str, object]:
    return {
        "snapshot": printable(found.snapshot),
        "against": None if found.against is None else printable(found.against),
        "machine": printable(found.machine),
        "cellSize": found.cell_size,
        "length": found.length,
        "pages": asdict(found.pages),
        "levels": found.levels,
        "workingSet": found.working_set,
        "notes": [*map(printable, found.notes)],
        "areas": [
            {
                "block": None if mapped.area.block is None else printable(mapped.area.block),
                # Numbers of 64 bits, which JSON's readers do not keep: hexadecimal.
                "start": hex(mapped.area.start),
                "end": hex(mapped.area.end),
                "cells": len(mapped),
                "parts": [
                    {
                        "block": printable(part.block),
                        "offset": hex(part.offset),
                        "start": hex(part.start),
                        "length": hex(part.length),
                        "pageSize": found.page_sizes[part.block],
                    }
                    for part in mapped.area.parts
                ],
            }
            for mapped in found.areas
        ],
        "bytes": {
            "pieces": [[area, hex(start), length] for area, start, length in pieces],
            "limit": limit,
            "complete": complete,
            "first": extent is None,
        },
    }


def _pieces(
    found: MemoryMap, snapshot: Snapshot, extent: Extent | None, limit: int
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield the number of an area, a place on its axis, and bytes that are stored; None for the bytes if
    there would be more than ``limit``."""
    left = limit
    for number, mapped in enumerate(found.areas):
        for part in mapped.area.parts:
            start, end = _wanted(part, mapped.area.block, extent)
            for first, stop in _stored(snapshot, part, start, end):
                while first < stop:
                    if left == 0:
                        yield number, 0, None
                        return
                    length = min(stop - first, _PIECE, left)
                    data = snapshot.blocks[part.block].read(first, length)
                    yield number, part.start + first - part.offset, data
                    first, left = first + length, left - length


def _wanted(part: Part, block: str | None, extent: Extent | None) -> tuple[int, int]:
    """Return the bytes of the part's block that are wanted."""
    first, last = part.offset, part.offset + part.length
    if extent is None:
        return first, last
    if extent.block != block:
        return first, first
    return (
        max(first, min(last, extent.start - part.start + part.offset)),
        max(first, min(last, extent.end - part.start + part.offset)),
    )


def _stored(snapshot: Snapshot, part: Part, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the stored ones of the bytes, whole pages."""
    block = snapshot.blocks[part.block]
    size = block.page_size
    for first, stop, data in block.runs(start // size, -(-end // size)):
        if data:
            yield first * size, stop * size
