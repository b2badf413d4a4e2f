"""The verb ``seal`` of a fleet run."""

from __future__ import annotations

from pyqmigrate.fleet.finding import Finding
from pyqmigrate.fleet.opening import Poll
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.integrity.seal import seal
from pyqmigrate.integrity.verify import current_seal

__all__ = ["seal_file"]


def seal_file(path: str, algorithm: Algorithm, poll: Poll) -> Finding:
    """Seal a local file, unless it has a seal of this algorithm that fits its size and time.

    Raises the errors of :func:`pyqmigrate.integrity.seal.seal`, and what ``poll`` raises.
    """
    finding = Finding()
    before = current_seal(path)
    if before is not None and before.algorithm is algorithm:
        finding.data |= {"sealed_before": True, "bytes_read": 0, "cleared_pages": 0}
        return finding
    report = seal(path, algorithm=algorithm, channels=1, progress=lambda _: poll())
    finding.data |= {
        "sealed_before": False,
        "bytes_read": report.bytes_read,
        "cleared_pages": report.cleared_pages,
    }
    return finding
