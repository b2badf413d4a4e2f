"""The verb ``add`` of a fleet run: into one store, under names made of paths."""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict

from pyqmigrate.errors import UsageError
from pyqmigrate.fleet.finding import Finding
from pyqmigrate.fleet.opening import Poll
from pyqmigrate.fleet.partial_copy import PartialCopy
from pyqmigrate.fleet.target import Target
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.io.target import Target as Opened
from pyqmigrate.store.adding import add
from pyqmigrate.store.store import NoSnapshot, Store

__all__ = ["add_file", "add_shown", "stored_name"]

# Labels of what is stored: a run that is repeated knows by them what it has added before.
_SOURCE = "source"
_IDENTITY = "source-identity"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._+@:-]")


def stored_name(target: Target) -> str:
    """Return the name that a target has in a store: its path below what was listed, with ``+`` for
    slashes and ``_`` for what is not possible in a name."""
    name = _NOT_IN_NAMES.sub("_", target.below.replace("/", "+"))
    return re.sub(r"^[.:]", "_", name)


def add_file(target: Target, store: str, poll: Poll) -> Finding:
    """Add a local file to the store, unless it is there.

    Raises SnapshotError for a damaged file, NotSupported, UsageError, TargetError, and what ``poll``
    raises.
    """
    return _add(target.place, target, store, poll)


def add_shown(plain: PlainFile, target: Target, store: str, poll: Poll) -> Finding:
    """Add an object to the store, by way of a file without a name, unless it is there. Raises the
    errors of :func:`add_file`."""
    with contextlib.closing(PartialCopy(plain, target.name)) as copy:
        copy.fetch_all()
        return _add(Descriptors(copy.fd), target, store, poll)


def _add(opened: Opened, target: Target, text: str, poll: Poll) -> Finding:
    name = stored_name(target)
    content = target.identity.partition("+")[0]  # without that of the seal
    labels = {_SOURCE: target.name, _IDENTITY: content}
    finding = Finding()
    finding.data["stored_as"] = name
    with Store.open(text) as store:
        if _is_there(store, name, content):
            finding.data |= {"added": False, "new_bytes": 0}
            return finding
        report = add(store, opened, name, labels=labels, progress=lambda _: poll())
    facts = asdict(report)
    finding.data |= {"added": True} | {key: facts[key] for key in ("parent", "new_bytes", "pages")}
    return finding


def _is_there(store: Store, name: str, content: str) -> bool:
    """Return whether an earlier run has added it. Raises UsageError for another snapshot of the name."""
    try:
        head = store.head(name)
    except NoSnapshot:
        return False
    if head.labels.get(_IDENTITY) == content:
        return True
    raise UsageError(
        f"{store.name} has another snapshot {name!r}: remove that, or rename this file"
    )
