"""What a fleet run does with each snapshot."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

from pyqmigrate.format.digest import Algorithm

__all__ = ["Verb", "Work"]


class Verb(enum.StrEnum):
    """What is done with each snapshot."""

    VERIFY = "verify"
    INFO = "info"
    ADD = "add"
    SEAL = "seal"


@dataclass(frozen=True)
class Work:
    """A verb with its options.

    store: of ``add``: the store, as ``open_place`` takes it, a directory as an absolute path.
    algorithm: of ``seal``.
    """

    verb: Verb
    store: str = ""
    algorithm: Algorithm = Algorithm.XXH3_128

    @property
    def options(self) -> str:
        """The options that make another result of the same verb."""
        return {Verb.ADD: self.store, Verb.SEAL: str(self.algorithm)}.get(self.verb, "")

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON, which :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Work:
        return cls(Verb(values["verb"]), values["store"], Algorithm(values["algorithm"]))
