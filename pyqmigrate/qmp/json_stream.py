"""QMP's input as a stream of JSON values, and its output as lines.

A QMP client may put several messages into one packet, split one anywhere, and end none with a
newline; the standard json module needs complete texts. :class:`JsonStream` takes slices of any size
and yields each value, or error, as soon as its last byte has arrived::

    stream = JsonStream()
    for item in stream.feed(sock.recv(65536)):
        if isinstance(item, JsonError):
            ...

The accepted input, the place where reading continues after an error, and the texts of errors are
QEMU's (checked against 10.0.2 and, with positions, 11.1.3 on random input), except that ``0e1``, which
JSON allows and QEMU takes for two tokens, is a number. Work is linear in the bytes fed; memory is
bounded by ``message_limit`` bytes of tokens, ``token_limit`` of them, and ``depth_limit`` open brackets.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import NamedTuple

from pyqmigrate.qmp.json_lexer import JsonLexer, Kind, Token

__all__ = ["JsonError", "JsonStream", "JsonValue", "encode_line"]

MESSAGE_LIMIT = 64 << 20
TOKEN_LIMIT = 2 << 20
DEPTH_LIMIT = 1024
_TEXT_LIMIT = 1023  # of the text about a malformed value; QEMU's limit


class JsonValue(NamedTuple):
    """A value, and the position in the stream (bytes) after it.

    Numbers are int if they fit 64 bits, signed or unsigned, and float otherwise; one too
    large for a float is the largest float.
    """

    value: object
    end: int


class JsonError(NamedTuple):
    """An error, in QEMU's words, and the position (bytes) after the token that caused it."""

    text: str
    end: int


class _Expect(Enum):
    VALUE = auto()
    KEY = auto()
    FIRST_KEY = auto()
    COLON = auto()
    MEMBER_END = auto()
    FIRST_ITEM = auto()
    ITEM_END = auto()


class _MalformedValue(Exception):
    """The value being read is not JSON; the text is the reason."""


class _Wording(NamedTuple):
    """The texts for malformed values; an empty one means that the token itself is described."""

    colon: str
    member_end: str
    item_end: str
    key: str


_PLAIN_WORDING = _Wording(
    "missing : in object pair", "expected separator in dict", "expected separator in list", ""
)
_POSITIONS_WORDING = _Wording(
    "expecting ':'", "expected ',' or '}'", "expected ',' or ']'", "expecting key"
)


class JsonStream:
    """An incremental reader of JSON values; the limits are QEMU's unless given.

    With ``positions`` errors are those of QEMU 11.1: they begin with line and column, the first one
    in a value counts, and after a limit the rest of the value is skipped. Without, those of 10.0.
    """

    def __init__(
        self,
        *,
        positions: bool = False,
        message_limit: int = MESSAGE_LIMIT,
        token_limit: int = TOKEN_LIMIT,
        depth_limit: int = DEPTH_LIMIT,
    ) -> None:
        self._message_limit = message_limit
        self._token_limit = token_limit
        self._depth_limit = depth_limit
        self._lexer = JsonLexer(message_limit)
        self._positions = positions
        self._wording = _POSITIONS_WORDING if positions else _PLAIN_WORDING
        self._reset()

    def feed(self, data: bytes) -> Iterator[JsonValue | JsonError]:
        """Read the next bytes and yield every value and error that they complete.

        The iterator must be run to its end before the next slice is fed.
        """
        for token in self._lexer.feed(data):
            if self._skipping:
                self._skip(token)
            elif (item := self._take(token)) is not None:
                yield item

    def _reset(self) -> None:
        self._builder = _Builder(self._wording)
        self._error = ""
        self._skipping = False  # the rest of a value that exceeded a limit
        self._size = 0
        self._tokens = 0
        self._braces = 0
        self._brackets = 0

    def _take(self, token: Token) -> JsonValue | JsonError | None:
        kind, text, end, _ = token
        if kind is Kind.STRAY:
            return self._end_with(
                self._first() or self._located(f"stray '{_shown(text)}'", token), end
            )
        self._count(token)
        over = self._over_a_limit(token)
        if over:
            error = JsonError(self._first() or f"JSON {over} limit exceeded", end)
            if self._positions and self._open:
                self._builder = _Builder(self._wording)
                self._skipping = True
            else:
                self._reset()
            return error
        self._size += len(text) + 1
        self._tokens += 1
        if not self._error:
            try:
                self._builder.take(token)
            except _MalformedValue as malformed:
                self._error = self._located(str(malformed)[:_TEXT_LIMIT], token)
                self._builder = _Builder(self._wording)  # release the parts of the value
        if self._open:
            return None  # even a malformed message ends where they close
        if self._error:
            return self._end_with(self._error, end)
        value = JsonValue(self._builder.root, end)
        self._reset()
        return value

    def _skip(self, token: Token) -> None:
        self._count(token)
        if token.kind is Kind.STRAY or not self._open:
            self._reset()

    def _count(self, token: Token) -> None:
        if token.kind is Kind.PUNCTUATION:
            self._braces += (token.text == b"{") - (token.text == b"}")
            self._brackets += (token.text == b"[") - (token.text == b"]")

    @property
    def _open(self) -> bool:
        """Return whether brackets are open, and none was closed that was not open."""
        return (self._braces > 0 or self._brackets > 0) and min(self._braces, self._brackets) >= 0

    def _first(self) -> str:
        """Return the first error of the value, if that one counts."""
        return self._error if self._positions else ""

    def _located(self, complaint: str, token: Token) -> str:
        text = f"JSON parse error, {complaint}"
        if not self._positions:
            return text
        line, column = self._lexer.line_and_column(token)
        return f"{line}:{column}: {text}"

    def _end_with(self, text: str, end: int) -> JsonError:
        self._reset()
        return JsonError(text, end)

    def _over_a_limit(self, token: Token) -> str:
        if token.kind is Kind.OVERSIZED or self._size + len(token.text) + 1 > self._message_limit:
            return "token size"
        if self._tokens + 1 > self._token_limit:
            return "token count"
        if self._braces + self._brackets > self._depth_limit:
            return "nesting depth"
        return ""


class _Builder:
    """Builds one value, token by token, with an explicit stack for the nesting."""

    def __init__(self, wording: _Wording) -> None:
        self._wording = wording
        self.root: object = None
        self._expect = _Expect.VALUE
        self._open: list[tuple[dict[str, object] | list[object], bool]] = []
        self._keys: list[str] = []  # of the members being read in the open objects

    def take(self, token: Token) -> None:
        text = token.text
        expect = self._expect
        if expect is _Expect.COLON:
            if text != b":":
                raise _MalformedValue(self._wording.colon)
            self._expect = _Expect.VALUE
        elif expect is _Expect.MEMBER_END:
            self._separate(text, b"}", _Expect.KEY, self._wording.member_end)
        elif expect is _Expect.ITEM_END:
            self._separate(text, b"]", _Expect.VALUE, self._wording.item_end)
        elif (expect is _Expect.FIRST_KEY and text == b"}") or (
            expect is _Expect.FIRST_ITEM and text == b"]"
        ):
            self._close()
        elif self._is_key() and token.kind is not Kind.STRING and self._wording.key:
            raise _MalformedValue(self._wording.key)
        elif text == b"{":
            self._enter({}, _Expect.FIRST_KEY)
        elif text == b"[":
            self._enter([], _Expect.FIRST_ITEM)
        elif token.kind is Kind.PUNCTUATION:
            raise _MalformedValue("expecting value")
        else:
            self._place(_scalar(token), self._is_key())

    def _is_key(self) -> bool:
        return self._expect in (_Expect.KEY, _Expect.FIRST_KEY)

    def _enter(self, container: dict[str, object] | list[object], inside: _Expect) -> None:
        self._open.append((container, self._is_key()))
        self._expect = inside

    def _separate(self, text: bytes, closing: bytes, following: _Expect, complaint: str) -> None:
        if text == closing:
            self._close()
        elif text == b",":
            self._expect = following
        else:
            raise _MalformedValue(complaint)

    def _close(self) -> None:
        container, is_key = self._open.pop()
        self._place(container, is_key)

    def _place(self, value: object, is_key: bool) -> None:
        if is_key:
            if not isinstance(value, str):
                raise _MalformedValue("key is not a string in object")
            self._keys.append(value)
            self._expect = _Expect.COLON
        elif not self._open:
            self.root = value
        elif isinstance(container := self._open[-1][0], dict):
            key = self._keys.pop()
            if key in container:
                raise _MalformedValue("duplicate key")
            container[key] = value
            self._expect = _Expect.MEMBER_END
        else:
            container.append(value)
            self._expect = _Expect.ITEM_END


_KEYWORDS = {b"true": True, b"false": False, b"null": None}
_LARGEST = sys.float_info.max


def _scalar(token: Token) -> object:
    if token.kind is Kind.STRING:
        return _string(token.text)
    if token.kind is Kind.NUMBER:
        return _number(token.text)
    if token.text not in _KEYWORDS:
        raise _MalformedValue(f"invalid keyword '{token.text.decode('ascii')}'")
    return _KEYWORDS[token.text]


def _number(text: bytes) -> int | float:
    if len(text) <= 20 and not any(mark in text for mark in b".eE"):
        value = int(text)
        if -(2**63) <= value < 2**64:
            return value
    return max(-_LARGEST, min(_LARGEST, float(text)))


_PLAIN = re.compile(rb"[\x20-\x5b\x5d-\x7f]*")
_NONCHARACTER = re.compile(
    "[\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17))
    + "]"
)
# As far as every escape is good: no lone surrogate, no noncharacter, alone or as a pair.
_GOOD_ESCAPES = re.compile(
    rb"""(?:[^\\]++
        |\\[bfnrt\\/"']
        |\\u(?i:(?!d[89a-f]|fff[ef]|fd[de])[0-9a-f]{4})
        |\\u(?!(?i:d[89ab][37bf]f)\\u(?i:dff[ef]))
         (?i:d[89ab][0-9a-f]{2})\\u(?i:d[c-f][0-9a-f]{2})
        )*+""",
    re.VERBOSE,
)


def _string(token: bytes) -> str:
    """Decode a string token. QEMU's UTF-8 has a two-byte NUL, and no noncharacters."""
    body = token[1:-1]
    if _PLAIN.fullmatch(body):
        return body.decode("ascii")
    found = _GOOD_ESCAPES.match(body)
    good = found.end() if found else 0
    text = _decoded(body[:good])
    if good < len(body):
        if body[good + 1 : good + 2] != b"u":
            raise _MalformedValue("invalid escape sequence in string")
        shown = token[good + 1 : good + 7].decode("utf-8", "replace")
        raise _MalformedValue(f"{shown} is not a valid Unicode character")
    if "\\" not in text:
        return text
    # The standard module decodes escapes, but needs double quotes.
    parts = (part.replace("\\'", "'").replace('\\"', '"') for part in text.split("\\\\"))
    quoted = "\\\\".join(part.replace('"', '\\"') for part in parts)
    return str(json.loads(f'"{quoted}"', strict=False))


def _decoded(raw: bytes) -> str:
    try:
        text = "\0".join(part.decode() for part in raw.split(b"\xc0\x80"))
    except UnicodeDecodeError:
        raise _MalformedValue("invalid UTF-8 sequence in string") from None
    if _NONCHARACTER.search(text):
        raise _MalformedValue("invalid UTF-8 sequence in string")
    return text


def _shown(stray: bytes) -> str:
    """Return text for an error; as in QEMU it ends at a NUL, unless that is the two-byte one."""
    parts = stray.partition(b"\0")[0].split(b"\xc0\x80")
    return _NONCHARACTER.sub("\ufffd", "\0".join(p.decode("utf-8", "replace") for p in parts))


# Text to leave alone, then escapes as far as they go, a pair of surrogates never cut; not all
# of them at once, since a long text may consist of nothing else. It matches wherever the last match
# ended: a search that moved on could begin in the middle of an escaped backslash.
_LINE_ESCAPES = re.compile(
    r"((?:[^\\]++|\\[^u])*+)"
    r"((?:\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|\\u[0-9a-f]{4}){1,4096}+|\Z)"
)
_HALF = re.compile(r"(\\uD[89AB]..\\uD[C-F]..)|\\uD[89A-F]..")


def encode_line(value: object) -> bytes:
    """Return ``value`` as one line of ASCII JSON that ends with CRLF, as QEMU writes it.

    Anything but printable ASCII is escaped, with upper-case hex digits; half a surrogate pair
    (an undecodable byte in a file name, say) becomes U+FFFD. Raises ValueError for an infinity
    or NaN, and TypeError for a value that JSON cannot represent.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except RecursionError:  # as deep as a client may nest what it wants back
        text = _deep_text(value)
    if "\\u" in text:
        text = _LINE_ESCAPES.sub(_upper_case, text)
    if "\x7f" in text:
        text = text.replace("\x7f", "\\u007F")
    return text.encode("ascii") + b"\r\n"


class _Text(str):
    """Encoded JSON among values that are not yet encoded."""


def _deep_text(value: object) -> str:
    parts: list[str] = []
    rest: list[object] = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, _Text):
            parts.append(item)
        elif isinstance(item, dict):
            members = ((_Text(f"{json.dumps(key)}: "), inner) for key, inner in item.items())
            rest += reversed(_enclosed("{", members, "}"))
        elif isinstance(item, list | tuple):
            rest += reversed(_enclosed("[", ((inner,) for inner in item), "]"))
        else:
            parts.append(json.dumps(item, allow_nan=False))
    return "".join(parts)


def _enclosed(first: str, groups: Iterable[tuple[object, ...]], last: str) -> list[object]:
    items: list[object] = [_Text(first)]
    for number, group in enumerate(groups):
        items += [_Text(", "), *group] if number else group
    return [*items, _Text(last)]


def _upper_case(found: re.Match[str]) -> str:
    text, escapes = found.groups()
    escapes = escapes.upper().replace("\\U", "\\u")
    if "\\uD" in escapes:
        escapes = _HALF.sub(lambda half: half[1] or "\\uFFFD", escapes)
    return text + escapes
