"""A reader that knows nothing but a description, as QEMU's analyze-migration.py."""

from __future__ import annotations

from typing import Any

__all__ = ["DescribedReader"]


class DescribedReader:
    """Reads ``data`` from its start, as a description says; ``at`` is how far it came."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        assert len(piece) == size
        self.at += size
        return piece

    def text(self) -> str:
        return self.take(self.take(1)[0]).decode()

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in state["fields"]:
            for _ in range(field.get("array_len", 1)):
                value: Any = self.take(field["size"])
                if field["type"] == "capability":
                    assert value[0] == len(value) - 1
                    value = value[1:].decode()
                found.setdefault(field["name"], []).append(value)
        for subsection in state.get("subsections", ()):
            assert self.take(1) == b"\x05"
            assert self.text() == subsection["vmsd_name"]
            assert self.take(4) == b"\0\0\0\1"
            found[subsection["vmsd_name"]] = self.state(subsection)
        return found
