"""Find the snapshots that the user's words mean: files, patterns, directories, stores, objects.

    listing = list_targets(["/snap", "/more/*.mapped", "/srv/store", "s3://bucket/saves/"])
    print(len(listing.targets), listing.skipped)

Nothing is opened: whether a file in a directory is a snapshot is found out by the task that looks at
it. Seals and other companions of a listed file belong to it.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import TargetError, UsageError, target_error
from pyqmigrate.fleet.result import Result, Verdict
from pyqmigrate.fleet.target import Kind, Target, companion_of, file_identity_of
from pyqmigrate.format.seal import SUFFIX
from pyqmigrate.io.place import absolute

__all__ = ["Listing", "list_targets"]

_CONFIG = "store.json"
_PATTERN = frozenset("*?[")
_UNFINISHED = re.compile(r"\..*\.partial", re.DOTALL)  # pyqmigrate.io.place.partial_name


@dataclass(frozen=True)
class Listing:
    """``targets`` in the order of the words, each once; ``skipped`` are the entries of directories
    that cannot be snapshots (links, devices)."""

    targets: tuple[Target, ...]
    skipped: tuple[Result, ...]


def list_targets(words: Iterable[str]) -> Listing:
    """Return the snapshots that ``words`` mean.

    A word is a file; a pattern with ``*``, ``?`` or ``[`` (``**`` for any depth); a directory, with
    all below it; a store, or ``STORE#PATTERN`` for some of its snapshots; the URL of an object, of
    a prefix (with a slash at the end), or of a store. A file or directory of exactly that name wins.

    Raises UsageError for a word that nothing fits, TargetError, SnapshotError for a damaged store.
    """
    found: dict[str, Target] = {}
    skipped: dict[str, Result] = {}
    for word in words:
        items = list(_meant_by(word))
        if not items and not os.path.isfile(word):  # which is the companion of another
            raise UsageError(f"no snapshot fits {word!r}")
        for item in items:
            if isinstance(item, Result):
                skipped.setdefault(item.name, item)
            elif item.name not in found or item.named:
                found[item.name] = item
    return Listing(tuple(found.values()), tuple(skipped.values()))


def _meant_by(word: str) -> Iterator[Target | Result]:
    if "://" in word:
        return _in_object_store(word)
    if os.path.isdir(word):
        return _in_directory(absolute(word), absolute(word))
    if os.path.lexists(word):
        return _named_file(absolute(word))
    store, mark, pattern = word.rpartition("#")
    if mark and os.path.isdir(store):
        return _in_store(os.fspath(absolute(store)), pattern)
    if _PATTERN.intersection(word):
        return _matching(word)
    raise TargetError(errno.ENOENT, "cannot find", word)


def _named_file(path: Path) -> Iterator[Target]:
    """Yield a file that the user named, unless a shell's pattern named it: the companion of another."""
    if companion_of(path.name, _Present(path.parent)) is None:
        yield _file(path, path.parent, named=True)


class _Present:
    """The names in a directory, for ``in``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._directory / name).exists()


def _matching(pattern: str) -> Iterator[Target | Result]:
    parts = absolute(pattern).parts
    fixed = next(n for n, part in enumerate(parts) if _PATTERN.intersection(part))
    top = Path(*parts[:fixed])
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = absolute(name)
        if path.is_dir():
            if "**" not in pattern:  # which lists what is in it, too
                yield from _in_directory(path, top)
        elif companion_of(path.name, _Present(path.parent)) is None:
            yield _entry(path, top)


def _in_directory(directory: Path, top: Path) -> Iterator[Target | Result]:
    """Yield everything below a directory, itself below ``top``. Links are not followed, so that nothing
    is met twice."""
    waiting = [directory]
    while waiting:
        directory = waiting.pop()
        if (directory / _CONFIG).is_file():
            yield from _in_store(os.fspath(directory), "*")
            continue
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise target_error(error, "cannot list", directory) from error
        names = {entry.name for entry in entries}
        for entry in entries:
            path = directory / entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif companion_of(entry.name, names) is None:
                yield _entry(path, top)


def _entry(path: Path, top: Path) -> Target | Result:
    """Return the target of a directory's entry, or why it is not one."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise target_error(error, "cannot look at", path) from error
    if _UNFINISHED.fullmatch(path.name):
        why = "a file that is being written"
    elif stat.S_ISREG(mode):
        return _file(path, top)
    else:
        why = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
    return Result(os.fspath(path), "", Verdict.SKIPPED, why)


def _file(path: Path, top: Path, *, named: bool = False) -> Target:
    try:
        info = path.stat()
    except OSError as error:
        raise target_error(error, "cannot look at", path) from error
    try:
        seal = os.stat(f"{path}{SUFFIX}")
    except OSError:
        seal = None
    name = os.fspath(path)
    below = os.fspath(path.relative_to(top))
    identity = file_identity_of(info, seal)
    return Target(name, Kind.FILE, name, "", info.st_size, below, identity, seal is not None, named)


def _in_store(text: str, pattern: str) -> Iterator[Target]:
    from pyqmigrate.fleet.stored import list_store

    return list_store(text, pattern or "*")


def _in_object_store(word: str) -> Iterator[Target | Result]:
    from pyqmigrate.fleet.objects import list_objects

    url, mark, pattern = word.partition("#")
    if mark:
        return _in_store(url, pattern)
    return list_objects(url)
