"""The verb ``verify`` of a fleet run: the seal, and the structure."""

from __future__ import annotations

import contextlib
from typing import Any

from pyqmigrate.fleet.finding import Finding
from pyqmigrate.fleet.opening import Poll, open_copy
from pyqmigrate.fleet.partial_copy import PartialCopy
from pyqmigrate.fleet.result import Verdict
from pyqmigrate.fleet.target import file_identity
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.seal import SUFFIX, count_pieces
from pyqmigrate.integrity.manifest import decode_manifest
from pyqmigrate.integrity.verify import SealCheck, verify_plain, verify_seal
from pyqmigrate.io.job import Progress
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot

__all__ = ["verify_file", "verify_shown"]

_DAMAGES = 20  # that a result lists


def verify_file(path: str, poll: Poll) -> Finding:
    """Verify a local file, of an increment also the structure of its base.

    Raises SnapshotError for damage that the structure shows, NotSupported, TargetError, and what
    ``poll`` raises.
    """

    def progress(_: Progress) -> None:
        poll()

    check = verify_seal(path, channels=1, progress=progress)
    if check is not None and not check.intact:
        return _damaged(check)
    with open_snapshot(path) as snapshot:
        finding = _check_structure(snapshot, check, poll)
        if isinstance(snapshot, IncrementSnapshot):
            base = snapshot.base.source.name
            finding.data["base"] = base
            finding.depends[base] = file_identity(base)
    return finding


def verify_shown(plain: PlainFile, name: str, poll: Poll) -> Finding:
    """Verify an object or a stored snapshot. Of an increment the base is not looked for.

    Raises the errors of :func:`verify_file`.
    """
    with contextlib.ExitStack() as stack:
        copy = stack.enter_context(contextlib.closing(PartialCopy(plain, name)))
        check = None
        seal = plain.companions.get(SUFFIX)
        if seal is not None:
            manifest = decode_manifest(seal, count_pieces(plain.size) * DIGEST_SIZE)
            check = verify_plain(plain, manifest, name + SUFFIX, copy, poll)
            if not check.intact:
                return _damaged(check)
        snapshot, increment = open_copy(copy)
        with snapshot:
            finding = _check_structure(snapshot, check, poll)
        if increment:
            finding.data["kind"] = "increment"
        return finding


def _damaged(check: SealCheck) -> Finding:
    first, *others = check.damages
    more = f", and {len(others)} more" if others else ""
    finding = Finding(Verdict.DAMAGED, f"{first}{more}")
    finding.data["seal"] = _seal(check)
    return finding


def _seal(check: SealCheck) -> dict[str, Any]:
    return {
        "algorithm": str(check.algorithm),
        "intact": check.intact,
        "damage_count": len(check.damages),
        "damages": [damage.to_json() for damage in check.damages[:_DAMAGES]],
        "bytes_read": check.bytes_read,
    }


def _check_structure(snapshot: Snapshot, check: SealCheck | None, poll: Poll) -> Finding:
    snapshot.read_through(lambda _: poll())
    snapshot.verify()
    blocks = [block for block in snapshot.blocks.values() if not block.external]
    finding = Finding()
    finding.data |= {
        "kind": str(snapshot.format),
        "machine": snapshot.machine,
        "block_count": len(snapshot.blocks),
        "data_pages": sum(block.data_pages for block in blocks),
        "zero_pages": sum(block.zero_pages for block in blocks),
        "seal": None if check is None else _seal(check),
    }
    return finding
