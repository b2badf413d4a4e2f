r"""A regular expression over bytes, in the syntax of Python's ``re``.

google-re2, if it is installed (``pip install google-re2``), searches instead of ``re``: several
times as fast, and by all channels at once, since it needs no lock of the interpreter. It gets only
expressions that mean the same to both; the result is the same with and without it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyqmigrate.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LONGEST_MATCH", "RegularExpression"]

LONGEST_MATCH = 64 << 10  # bytes
_MOST = 1 << 14  # matches of one call

# What both engines read alike. Left out, among others: anchors, lookarounds, flags, references,
# possessive quantifiers, POSIX classes, and \s, to which a vertical tab belongs for re only.
_COMMON = re.compile(
    rb"""(?: [^\\\[\](){}^$*+?|\n]                        # a byte
           | \\ (?: x[0-9A-Fa-f]{2} | [dDwWnrtf] | [^0-9A-Za-z] )
           | \[ \^? (?: [^\\\[\]^-] | \\ (?: x[0-9A-Fa-f]{2} | [dDwWnrtf] | [^0-9A-Za-z] ) )
                (?: [^\\\[\]&~|-] | -(?!-) | \\ (?: x[0-9A-Fa-f]{2} | [dDwWnrtf] | [^0-9A-Za-z] ) )* \]
           | \( \?: | \( (?!\?) | \) | \|
           | [*+?] \?? (?![*+?{]) | \{ [0-9]{1,3} (?: , [0-9]{0,3} )? \} \?? (?![*+?{])
         )*""",
    re.VERBOSE | re.DOTALL,
)


class RegularExpression:
    """A compiled expression. UsageError for one that is wrong, or that matches no bytes at all.

    ``engine`` is ``re2`` or ``re``. Of matches that overlap the first counts; empty ones do not.
    """

    def __init__(self, pattern: bytes) -> None:
        try:
            self._compiled: Any = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"the regular expression is wrong: {error}") from None
        if self._compiled.match(b"") is not None:
            raise UsageError("the regular expression matches at every byte: it accepts no bytes")
        self.engine = "re"
        if _COMMON.fullmatch(pattern):
            fast = _compiled_by_re2(pattern)
            if fast is not None:
                self._compiled, self.engine = fast, "re2"
        self.matches_zeros = self._finds_zeros(pattern)

    def _finds_zeros(self, pattern: bytes) -> bool:
        """Return whether a match can lie in zeros, far from data or just behind some."""
        if any(looking_back in pattern for looking_back in (b"(?<", rb"\b", rb"\B")):
            return True
        zeros = bytes(2 * LONGEST_MATCH)
        # All positions in zeros are alike, but for the first one: a search would take its time at each.
        return any(self._compiled.match(zeros, start) is not None for start in (0, LONGEST_MATCH))

    def find(self, data: Buffer, start: int, end: int) -> tuple[array[int], array[int], int]:
        """Return the starts and ends of matches that start in ``[start, end)``, and where to go on.

        That is ``end``, unless there were too many for one call. Bytes before ``start`` are context.
        """
        starts: array[int] = array("I")
        ends: array[int] = array("I")
        for first, last in self._spans(data, start, end):
            starts.append(first)
            ends.append(last)
            if len(starts) == _MOST:
                return starts, ends, min(last, end)
        return starts, ends, end

    def _spans(self, data: Buffer, start: int, end: int) -> Iterator[tuple[int, int]]:
        for found in self._compiled.finditer(data, start):
            first, last = found.span()
            if first >= end:
                return
            if last > first:
                yield first, last


def _compiled_by_re2(pattern: bytes) -> Any:
    """Return the expression of google-re2; None if it is not installed or refuses it."""
    try:
        import re2
    except ImportError:
        return None
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1  # bytes, not UTF-8
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error:
        return None
