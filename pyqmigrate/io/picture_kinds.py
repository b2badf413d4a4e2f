"""Pictures that this package writes, each of which replaces only one of this package."""

from __future__ import annotations

from pyqmigrate.format.png import is_marked
from pyqmigrate.format.svg import is_svg
from pyqmigrate.io.own_files import FileKind

__all__ = ["HTML_HEAD", "PICTURES"]

HTML_HEAD = b"<!DOCTYPE html>\n<!-- pyqmigrate map -->\n"

# By the suffix of the file.
PICTURES = {
    ".png": FileKind("picture", is_marked),
    ".svg": FileKind("picture", is_svg),
    ".html": FileKind("page", lambda head: head.startswith(HTML_HEAD)),
}
