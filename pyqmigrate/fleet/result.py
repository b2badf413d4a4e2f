"""The result of a verb on one snapshot."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["FINAL", "Result", "Verdict"]


class Verdict(enum.StrEnum):
    """How it went: done and nothing is wrong; the snapshot is damaged; it could not be done (a
    later run tries again); the file is not a snapshot."""

    GOOD = "good"
    DAMAGED = "damaged"
    FAILED = "failed"
    SKIPPED = "skipped"


FINAL = frozenset((Verdict.GOOD, Verdict.DAMAGED, Verdict.SKIPPED))  # not done again


@dataclass(frozen=True)
class Result:
    """What was found of one snapshot.

    ``name`` and ``identity`` are those of the target. ``message`` is a sentence on anything that is
    wrong. ``data`` has the facts that the verb found, as values for JSON. ``depends`` has the
    identities of other files that the result is about too (the base of an increment), by path.
    ``seconds`` is how long it took, ``finished`` when it ended, in seconds since 1970. ``worker`` is
    the Dask worker, empty on this machine.
    """

    name: str
    identity: str
    verdict: Verdict
    message: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    depends: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finished: float = 0.0
    worker: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON, which :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        return cls(**{**values, "verdict": Verdict(values["verdict"])})
