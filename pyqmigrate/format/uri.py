"""The grammar of ``file:PATH[,offset=SIZE]``, and of the SIZE in it.

Text to values; nothing is opened. The grammar is exactly QEMU's: a URI that QEMU accepts gives the
same path and number here, and one that it refuses is refused with its text
(docs/internals/qemu-management.md, "URIs").

    >>> parse_file_uri("file:/snap/guest.mapped,offset=4k")
    FileUri(path='/snap/guest.mapped', offset=4096)
"""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from pyqmigrate.errors import UsageError

__all__ = ["FileUri", "parse_file_uri", "parse_size"]

_SCHEME = "file:"
_OFFSET = ",offset="
_MAX = 2**64 - 1
_DIGITS = 1 + len(str(_MAX))
_SHIFT = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(
    r"[ \t\n\v\f\r]*(?:(?P<negative>-(?:[0-9]+|\.[0-9]+))"
    r"|\+?(?:0[xX](?P<hex>[0-9a-fA-F]+)"
    r"|(?P<whole>[0-9]*)(?P<fraction>\.[0-9]*)?(?P<suffix>[bkmgtpe]?)))",
    re.ASCII | re.IGNORECASE,
)


class FileUri(NamedTuple):
    """The path of a ``file:`` URI, as written, and the offset at which the stream begins."""

    path: str
    """As written: relative to the current directory, perhaps empty, perhaps ``/dev/fdset/N``."""
    offset: int
    """In bytes, 0 to 2**64 - 1; 0 when the URI has none."""


def parse_file_uri(text: str) -> FileUri:
    """Split ``file:PATH[,offset=SIZE]``.

    The first ``,offset=`` ends the path; there is no escaping, and every other comma belongs to
    the path. The scheme is case-sensitive.

    Raises UsageError, with QEMU's text, for another scheme or an offset that is not a SIZE.
    """
    if not text.startswith(_SCHEME):
        raise UsageError(f"unknown migration protocol: {text}")
    path, comma, size = text.removeprefix(_SCHEME).partition(_OFFSET)
    return FileUri(path, _size(size, f"file URI has bad offset {size}") if comma else 0)


def parse_size(text: str) -> int:
    """Return the number of bytes of a SIZE, 0 to 2**64 - 1.

    Decimal with at most one suffix of b, k, m, g, t, p, e (either case, powers of 1024), or
    ``0x`` and hex digits without a suffix. A fraction needs a suffix above b and is rounded to
    the nearest byte. A leading zero does not mean octal.

    Raises UsageError if the text is anything else, negative, or too large. As in QEMU the
    reason is "Numerical result out of range" for a bare negative number and for one that is too
    large; a negative number with a suffix is an "Invalid argument", like any other bad text, and
    so is a suffix after digits that alone are too large.
    """
    return _size(text, f"bad size {text!r}")


def _size(text: str, complaint: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise _refusal(complaint, errno.EINVAL)
    if found["negative"]:
        raise _refusal(complaint, errno.ERANGE)
    if found["hex"]:
        value = int(found["hex"], 16)
    else:
        fraction = found["fraction"] or ""
        digits = fraction.removeprefix(".")
        shift = _SHIFT[found["suffix"].lower()]
        if not (found["whole"] or digits) or (digits.strip("0") and not shift):
            raise _refusal(complaint, errno.EINVAL)
        whole = int(found["whole"].lstrip("0")[:_DIGITS] or "0")  # int() refuses long texts
        if whole > _MAX and (fraction or found["suffix"]):
            raise _refusal(complaint, errno.EINVAL)
        # QEMU rounds the fraction as a double, half upward.
        value = (whole << shift) + int(float(f"0.{digits}0") * 2**shift + 0.5)
    if value > _MAX:
        raise _refusal(complaint, errno.ERANGE)
    return value


def _refusal(complaint: str, number: int) -> UsageError:
    return UsageError(f"{complaint}: {os.strerror(number)}")
