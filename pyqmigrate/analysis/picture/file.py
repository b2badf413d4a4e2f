"""A picture in a file of its own, written whole."""

from __future__ import annotations

import enum
import os
from pathlib import Path

from pyqmigrate.analysis.areas import Extent
from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import ThemeName
from pyqmigrate.io.own_files import check_replaceable, write_whole
from pyqmigrate.io.picture_kinds import PICTURES
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["PictureForm", "check_place", "write_picture"]


class PictureForm(enum.StrEnum):
    PNG = "png"
    SVG = "svg"
    HTML = "html"


def check_place(name: str | os.PathLike[str], form: PictureForm) -> Path:
    """Return the absolute path for a picture.

    Raises UsageError if another kind of file is there, TargetError, and NotSupported for a PNG without
    Pillow.
    """
    if form is PictureForm.PNG:
        from pyqmigrate.analysis.picture.png import check_available

        check_available()
    return check_replaceable(name, PICTURES[f".{form}"])


def write_picture(
    place: Path,
    form: PictureForm,
    found: MemoryMap,
    snapshot: Snapshot,
    *,
    theme: ThemeName = ThemeName.LIGHT,
    extent: Extent | None = None,
) -> None:
    """Write a map to ``place``, which :func:`check_place` returned.

    ``snapshot`` is the open one that was scanned, ``extent`` the bytes of it for a page of HTML, which
    has the theme of its reader. Raises as ``write_whole`` does, and the errors of reading.
    """
    if form is PictureForm.HTML:
        from pyqmigrate.analysis.picture.html import html_of

        pieces = html_of(found, snapshot, extent)
        write_whole(
            place, PICTURES[f".{form}"], lambda file: file.writelines(pieces), sync_name=False
        )
        return
    if form is PictureForm.SVG:
        from pyqmigrate.analysis.picture.svg import svg_of

        data = svg_of(found, theme)
    else:
        from pyqmigrate.analysis.picture.png import png_of

        data = png_of(found, theme)
    write_whole(place, PICTURES[f".{form}"], lambda file: file.write(data), sync_name=False)
