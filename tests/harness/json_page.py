"""What docs/json.md promises of each verb's JSON, and whether an object keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "Key", "assert_as_documented", "documented"]

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
_ROW = re.compile(r"\| `(\[)?([\w.*\[\]]+?)(\])?` \| ([^|]+) \| ([^|]+) \|")
_KINDS = {
    "text": (str,),
    "number": (int, float),
    "bytes": (int,),
    "seconds": (int, float),
    "bytes a second": (int, float),
    "bool": (bool,),
    "object": (dict,),
    "any": (object,),
}


@dataclass(frozen=True)
class Key:
    """A line of a table: ``path`` as written there, its type without ``or null``."""

    path: str
    optional: bool
    kind: str
    nullable: bool

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.nullable or self.kind == "any"
        if self.kind.startswith("list of "):
            kinds = _KINDS[{"objects": "object"}.get(self.kind[8:], self.kind[8:])]
            return isinstance(value, list) and all(isinstance(item, kinds) for item in value)
        if isinstance(value, bool):
            return self.kind in ("bool", "any")
        return isinstance(value, _KINDS[self.kind])


def documented() -> dict[str, dict[str, Key]]:
    """The keys of each heading of the page, by path."""
    page: dict[str, dict[str, Key]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            keys = page[line[3:]] = {}
        elif line.startswith("| `"):
            row = _ROW.fullmatch(line)
            assert row is not None, f"not a row of the table: {line}"
            optional = row[1] is not None
            path = row[2] if optional or row[3] is None else row[2] + row[3]
            kind, null, _ = row[4].partition(" or null")
            keys[path] = Key(path, optional, kind, bool(null))
    return page


def assert_as_documented(verb: str, data: dict[str, Any]) -> None:
    """Every key of ``data`` is on the page and of its type, and every key that must be is there."""
    page = documented()
    keys = page["Every verb"] | page[verb]
    found = dict(_paths(data, "", keys))
    unknown = [path for path in found if path not in keys]
    assert not unknown, f"{verb}: not in docs/json.md: {unknown}"
    wrong = [(path, found[path]) for path in found if not keys[path].takes(found[path])]
    assert not wrong, f"{verb}: of another type than docs/json.md says: {wrong}"
    missing = [
        key.path
        for key in keys.values()
        if not key.optional and key.path not in found and (not key.parent or _filled(key, found))
    ]
    assert not missing, f"{verb}: in docs/json.md and not there: {missing}"


def _filled(key: Key, found: dict[str, Any]) -> bool:
    """Whether an object is there in which the key would be."""
    return bool(found.get(key.parent.removesuffix(".*").removesuffix("[]")))


def _paths(value: Any, path: str, keys: dict[str, Key]) -> Iterator[tuple[str, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        if path and f"{path}.*" in {key.parent for key in keys.values()}:
            for item in value.values():
                for name, inner in item.items():
                    yield from _paths(inner, f"{path}.*.{name}", keys)
        elif not path or any(key.parent == path for key in keys.values()):
            for name, inner in value.items():
                yield from _paths(inner, f"{path}.{name}" if path else name, keys)
    elif isinstance(value, list) and any(key.parent == f"{path}[]" for key in keys.values()):
        for item in value:
            for name, inner in item.items():
                yield from _paths(inner, f"{path}[].{name}", keys)
