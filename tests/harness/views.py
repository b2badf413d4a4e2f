"""A maker of views without a store: it shows the files of a directory, as a private mount does."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.io.view import ViewOptions

__all__ = ["Shown", "Views", "make_store"]

MAKER = "pyqmigrate.mount.view"


def make_store(directory: Path) -> Path:
    """Make what is recognized as a store."""
    directory.mkdir()
    (directory / "store.json").write_text("{}")
    return directory


@dataclass
class Shown:
    """A view of a file of ``views``. Its path leads through a descriptor, and ends with it."""

    views: Views
    name: str
    options: ViewOptions
    pushes: bool = False
    pushed: list[tuple[int, int]] = field(default_factory=list)
    closed: bool = False
    fetched: bool = False

    def __post_init__(self) -> None:
        self._fd = os.open(self.views.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = Path(f"/proc/self/fd/{self._fd}") / self.name

    def push(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.pushed.extend(ranges)

    def fetch_rest(self) -> None:
        self.fetched = True

    def requests(self) -> Sequence[tuple[int, int]]:
        return self.views.requests

    def messages(self) -> Sequence[str]:
        return self.views.messages

    def check_recordable(self) -> str:
        return f"{self.views.directory}/{self.name}.workingset"

    def write_working_set(self, content: bytes) -> None:
        (self.views.directory / f"{self.name}.workingset").write_bytes(content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        self.closed = True


@dataclass
class Views:
    """Makes views of the files in ``directory``; ``made`` are all of them. Put it in place with
    :meth:`install`."""

    directory: Path
    made: list[Shown] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    requests: list[tuple[int, int]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    pushes: bool = False

    def make_view(self, place: str, name: str | None, options: ViewOptions) -> Shown:
        self.places.append(place)
        shown = name or Path(place).name + ".shown"
        if not (self.directory / shown).exists():
            raise TargetError(2, "there is no snapshot of this name", f"{place}#{name}")
        self.made.append(Shown(self, shown, options, self.pushes))
        return self.made[-1]

    def install(self, patch: pytest.MonkeyPatch) -> Views:
        module = types.ModuleType(MAKER)
        module.make_view = self.make_view  # type: ignore[attr-defined]
        patch.setitem(sys.modules, MAKER, module)
        return self
