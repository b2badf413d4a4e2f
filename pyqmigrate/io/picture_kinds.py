"""Pictures that this package writes, each of which replaces only a file of its own kind."""

from __future__ import annotations

from pyqmigrate.format.svg import is_svg
from pyqmigrate.io.own_files import FileKind

__all__ = ["HTML_HEAD", "PICTURES"]

HTML_HEAD = b"<!DOCTYPE html>\n<!-- pyqmigrate map -->\n"  # other pages are not ours

# By the suffix of the file.
PICTURES = {
    ".png": FileKind("picture", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n")),
    ".svg": FileKind("picture", is_svg),
    ".html": FileKind("page", lambda head: head.startswith(HTML_HEAD)),
}
