"""What a verb found out about one snapshot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyqmigrate.fleet.result import Verdict

__all__ = ["Finding"]


@dataclass
class Finding:
    """A verdict, a sentence, values for JSON, and the identities of other files that it is about."""

    verdict: Verdict = Verdict.GOOD
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    depends: dict[str, str] = field(default_factory=dict)
