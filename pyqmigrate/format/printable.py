"""Text from untrusted files that is safe to show: on a terminal, in a page, in a picture."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    r"""Return ``text`` with unprintable characters and lone surrogates as ``\x1b`` escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
