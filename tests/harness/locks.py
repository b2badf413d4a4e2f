"""Files that another process holds locked."""

from __future__ import annotations

__all__ = ["HOLD"]

HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_SH)
print(flush=True)
sys.stdin.read()
"""
