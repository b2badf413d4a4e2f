"""Redact the secrets in a QEMU command line.

QEMU takes secrets by name (``password-secret=``, ``key-secret=``, ``passwordid=``: the id of an
``-object secret``) or as text, and only text is redacted. The key decides whether a value is a
secret: in property lists, in JSON, in URLs and in texts passed to the guest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["REDACTED", "redact"]

REDACTED = "<redacted>"
# The last part of a key (of "file.password") whose value is a secret.
_KEYS = r"(?:password|passwd|passphrase|cookie|token)"
_SWITCH = r"(?:on|off|yes|no|true|false|y|n)"  # of -vnc and -spice
# key=value in a property list, where commas are doubled, or in a kernel command line.
_PROPERTY = re.compile(rf"(?i)((?:^|[,.:\s?&]){_KEYS}=)(?!{_SWITCH}(?:[,\s]|$))((?:,,|[^,\s&])+)")
_DATA = re.compile(r"((?:^|,)data=)((?:,,|[^,])+)")  # of -object secret
_RBD_KEY = re.compile(r"(:key=)((?:\\.|[^:,\\])+)")  # of rbd:POOL/IMAGE:key=...
_ADDRESS = re.compile(r"(\w+://[^/\s:@%]*[:%])([^/\s@]+)(?=@)")  # scheme://user:password@host
# systemd credentials (-smbios type=11, -fw_cfg).
_CREDENTIAL = re.compile(r"(io\.systemd\.credential[^=,]*[=,](?:string=)?)((?:,,|[^,\s])+)")
_IS_SECRET = re.compile(r"^secret(?:,|$)|(?:^|,)qom-type=secret(?:,|$)")


def redact(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the words without secrets, and the indexes of those that had one."""
    clean = tuple(_without_secrets(word) for word in words)
    changed = (number for number, word in enumerate(words) if clean[number] != word)
    return clean, tuple(changed)


def _without_secrets(word: str) -> str:
    if word.lstrip().startswith("{"):
        try:
            data = json.loads(word)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict):
            clean = _object(data)
            return word if clean == data else json.dumps(clean)
    return _text(word)


def _object(data: dict[str, Any]) -> dict[str, Any]:
    is_secret = data.get("qom-type") == "secret"
    return {
        key: REDACTED if isinstance(item, str) and _is_secret_key(key, is_secret) else _value(item)
        for key, item in data.items()
    }


def _value(item: Any) -> Any:
    if isinstance(item, dict):
        return _object(item)
    if isinstance(item, list):
        return [_value(inner) for inner in item]
    return _text(item) if isinstance(item, str) else item


def _is_secret_key(key: str, is_secret: bool) -> bool:
    last = key.rpartition(".")[2].lower()
    return re.fullmatch(_KEYS, last) is not None or (is_secret and last == "data")


def _text(text: str) -> str:
    if "json:{" in text:  # a node description in place of a file name: its keys are quoted
        text = re.sub(rf'(?i)("{_KEYS}"\s*:\s*")((?:\\.|[^"\\])+)', rf"\1{REDACTED}", text)
    if _IS_SECRET.search(text):
        text = _DATA.sub(rf"\1{REDACTED}", text)
    for pattern in (_PROPERTY, _RBD_KEY, _ADDRESS, _CREDENTIAL):
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text
