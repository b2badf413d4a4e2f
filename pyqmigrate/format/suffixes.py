"""Suffixes of files beside a snapshot: to look for one takes no more than its name."""

from __future__ import annotations

__all__ = ["SEAL", "WORKING_SET"]

SEAL = ".seal"
WORKING_SET = ".workingset"
