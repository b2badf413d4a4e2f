"""Splitting the bytes of a QMP connection into JSON tokens, a slice at a time.

Tokens are those of JSON, and strings may have single quotes. A byte that cannot begin or continue a
token is a *stray*; after one, bytes are skipped up to the next bracket, comma, colon, control
character or byte 0xFE or 0xFF. The latter two are strays themselves: a client can always send 0xFF to
resynchronise. Every byte is examined a fixed number of times, independent of the slices.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

__all__ = ["JsonLexer", "Kind", "Token"]


class Kind(Enum):
    """The kind of a token."""

    PUNCTUATION = auto()
    STRING = auto()
    NUMBER = auto()
    KEYWORD = auto()
    STRAY = auto()
    OVERSIZED = auto()


class Token(NamedTuple):
    """One token: its bytes as sent (with quotes and escapes), and its position.

    ``end`` counts the bytes of the stream up to and including the one that completed the token:
    its last, or, for a number or a keyword, the one after it. ``start`` counts those before it, but
    never fewer than were needed to complete what came before.
    """

    kind: Kind
    text: bytes
    end: int
    start: int


_BLANK = re.compile(rb"[ \t\r\n]*")
_SKIP = re.compile(rb"[^\x00-\x08\x0a-\x1f\[\]{}:,\xfe\xff]*")
_WHOLE = re.compile(
    rb"[ \t\r\n]*(?:([{}\[\]:,])"
    rb'|("[^"\\\x00-\x1f\xfe\xff]*"|\'[^\'\\\x00-\x1f\xfe\xff]*\')'
    rb"|(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=[\s\]},])"
    rb"|([a-z]+)(?=[^a-z]))"
)
_KINDS = (Kind.STRAY, Kind.PUNCTUATION, Kind.STRING, Kind.NUMBER, Kind.KEYWORD)  # by group
_LAST_WITHOUT_AHEAD = 2
_INSIDE = {
    b'"': re.compile(rb'(?:[^"\\\x00-\x1f\xfe\xff]++|\\[\x20-\xfd])*+'),
    b"'": re.compile(rb"(?:[^'\\\x00-\x1f\xfe\xff]++|\\[\x20-\xfd])*+"),
}
_LETTERS = re.compile(rb"[a-z]*")

# What may follow in a number, from each point in it; the points in _FINAL may end one.
_DIGITS = b"0123456789"
_NUMBER: dict[str, dict[int, str]] = {
    "sign": {**dict.fromkeys(_DIGITS, "digits"), ord("0"): "zero"},
    "zero": {**dict.fromkeys(b".", "point"), **dict.fromkeys(b"eE", "exp")},
    "digits": {
        **dict.fromkeys(_DIGITS, "digits"),
        **dict.fromkeys(b".", "point"),
        **dict.fromkeys(b"eE", "exp"),
    },
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), **dict.fromkeys(b"eE", "exp")},
    "exp": {**dict.fromkeys(_DIGITS, "exponent"), **dict.fromkeys(b"+-", "exponent sign")},
    "exponent sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_FINAL = {"zero", "digits", "fraction", "exponent"}


class JsonLexer:
    """An incremental tokenizer; a token of more than ``limit`` bytes is truncated and OVERSIZED."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._position = 0  # of the slice being read, in the stream
        self._data = b""  # the slice being read
        self._lines = 0  # that ended in earlier slices
        self._line_start = 0  # position after the last of them
        self._begun = 0  # where the token being read begins
        self._known = 0  # the end of what came before it
        self._partial = bytearray()
        self._state = "start"  # or "skip", "string", "escape", "keyword", or a key of _NUMBER

    def feed(self, data: bytes) -> Iterator[Token]:
        """Read the next bytes of the stream and yield the tokens that they complete.

        The iterator must be run to its end before the next slice is fed.
        """
        self._data = data
        position = 0
        while position < len(data):
            token = None
            if self._state == "start":
                position, token = self._whole(data, position) or self._begin(data, position)
            elif self._state == "skip":
                position = _span(_SKIP, data, position)
                if position < len(data):
                    self._state = "start"
                    self._known = self._position + position + 1  # this byte ended the skipping
            else:
                position, token = self._go_on(data, position)
                if token is None and len(self._partial) > self._limit:
                    token = self._finish(Kind.OVERSIZED, position)
            if token is not None:
                yield token
        newline = data.rfind(b"\n")
        if newline >= 0:
            self._lines += data.count(b"\n")
            self._line_start = self._position + newline + 1
        self._position += len(data)
        self._data = b""

    def line_and_column(self, token: Token) -> tuple[int, int]:
        """Return the start of the token that was yielded last, both numbers counted from 1."""
        inside = max(token.start - self._position, 0)
        newline = self._data.rfind(b"\n", 0, inside)
        line_start = self._line_start if newline < 0 else self._position + newline + 1
        return (self._lines + self._data.count(b"\n", 0, inside) + 1, token.start - line_start + 1)

    def _whole(self, data: bytes, position: int) -> tuple[int, Token] | None:
        """Read a token that is complete in the slice: the usual case, optimised."""
        found = _WHOLE.match(data, position)
        if found is None:
            return None
        index = found.lastindex or 1
        text = found[index]
        if len(text) > self._limit:
            return None
        position = found.end()
        start = max(self._position + found.start(index), self._known)
        self._known = self._position + position + (index > _LAST_WITHOUT_AHEAD)
        return position, Token(_KINDS[index], text, self._known, start)

    def _begin(self, data: bytes, position: int) -> tuple[int, Token | None]:
        """Start a token that the slice may not complete, or report a stray byte."""
        position = _span(_BLANK, data, position)
        first = data[position : position + 1]
        if not first:
            return position, None
        self._partial += first
        self._begun = max(self._position + position, self._known)
        if first in _INSIDE:
            self._state = "string"
        elif first == b"-":
            self._state = "sign"
        elif first.isdigit():
            self._state = "zero" if first == b"0" else "digits"
        elif first.islower():
            self._state = "keyword"
        elif first in b"{}[]:,":
            return position + 1, self._finish(Kind.PUNCTUATION, position + 1)
        else:
            return position + 1, self._finish(Kind.STRAY, position + 1)
        return position + 1, None

    def _go_on(self, data: bytes, position: int) -> tuple[int, Token | None]:
        """Extend the current token by at least one byte, or end it before the next one."""
        most = min(len(data), position + self._limit + 1 - len(self._partial))
        if self._state == "keyword":
            stop = _span(_LETTERS, data, position, most)
            self._partial += data[position:stop]
            return stop, self._finish(Kind.KEYWORD, stop + 1) if stop < most else None
        if self._state == "string":
            return self._string(data, position, most)
        if self._state == "escape":
            self._state = "string"
            self._partial += data[position : position + 1]
            stray = _cannot_be_in_a_string(data[position])
            return position + 1, self._finish(Kind.STRAY, position + 1) if stray else None
        return self._number(data, position, most)

    def _string(self, data: bytes, position: int, most: int) -> tuple[int, Token | None]:
        quote = bytes(self._partial[:1])
        stop = _span(_INSIDE[quote], data, position, most)
        self._partial += data[position : min(stop + 1, most)]
        if stop == most:
            return stop, None
        if data[stop] == quote[0]:
            return stop + 1, self._finish(Kind.STRING, stop + 1)
        if _cannot_be_in_a_string(data[stop]):
            return stop + 1, self._finish(Kind.STRAY, stop + 1)
        self._state = "escape"
        return stop + 1, None

    def _number(self, data: bytes, position: int, most: int) -> tuple[int, Token | None]:
        state, start = self._state, position
        while position < most and (following := _NUMBER[state].get(data[position])) is not None:
            state = following
            position += 1
        self._state = state
        self._partial += data[start:position]
        if position == most:
            return position, None
        if state in _FINAL and not (state == "zero" and data[position] in _DIGITS):
            return position, self._finish(Kind.NUMBER, position + 1)
        self._partial += data[position : position + 1]
        return position + 1, self._finish(Kind.STRAY, position + 1)

    def _finish(self, kind: Kind, end: int) -> Token:
        self._known = self._position + end
        token = Token(kind, bytes(self._partial), self._known, self._begun)
        self._partial.clear()
        self._state = "skip" if kind is Kind.STRAY else "start"
        return token


def _span(pattern: re.Pattern[bytes], data: bytes, position: int, most: int = sys.maxsize) -> int:
    """Return the end of the match of ``pattern``, which may be empty, at ``position``."""
    found = pattern.match(data, position, most)
    return position if found is None else found.end()


def _cannot_be_in_a_string(byte: int) -> bool:
    return byte < 0x20 or byte > 0xFD
