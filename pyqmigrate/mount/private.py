"""A mount that nobody else sees: how a stored snapshot becomes a path for a moment.

::

    with open_private("/srv/store", names=("guest",)) as view:
        fd = os.open(view.path / "guest", os.O_RDONLY)
        view.hide()                      # no name is left; fd stays readable

The keeper ends by itself when the mount is hidden and its last file is closed, by a QEMU, for instance.
If this process ends without :meth:`PrivateMount.hide`, the keeper hides the mount.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit, urlunsplit

from pyqmigrate.errors import target_error
from pyqmigrate.mount.asking import KeeperClient
from pyqmigrate.mount.starting import MountRequest, WaitingKeeper

__all__ = ["FileRange", "PreparedMount", "PrivateMount", "open_private", "prepare_private"]

_FILES = "files"
_FUSE_CONFIGURATION = "/etc/fuse.conf"


class FileRange(NamedTuple):
    """Bytes of a file of a mount, by its name. ``offset`` and ``length`` in bytes."""

    name: str
    offset: int
    length: int


class PrivateMount:
    """A mount in a directory that only this user can enter. A context manager.

    ``path`` is the directory with the files: for each snapshot NAME and its companions (NAME.seal).
    """

    def __init__(self, client: KeeperClient, path: Path) -> None:
        self._client = client
        self._hidden = False
        self.path = path

    def push(self, ranges: Iterable[FileRange]) -> None:
        """Have ranges put into the page cache, in this order, and return at once.

        The files must have been opened. Reads of others go first. Raises UsageError if an earlier list
        is not done, TargetError if the keeper does not answer.
        """
        self._client.ask("push", ranges=[list(piece) for piece in ranges])

    def fetch_rest(self) -> None:
        """Have all of the open files read into the local cache, of a remote store, after what is pushed.
        Returns at once. Raises TargetError if the keeper does not answer."""
        self._client.ask("fetch")

    def requests(self) -> list[FileRange]:
        """Return the reads that came from the kernel so far, in their order, if they are recorded.

        It can be asked as long as a file is open. At most 131,072 reads are recorded. Raises
        TargetError if the keeper has ended.
        """
        answer = self._client.ask("reads")
        names = {int(number): name for number, name in answer["names"].items()}
        return [
            FileRange(names[number], offset, length)
            for number, offset, length in answer["reads"]
            if number in names
        ]

    def status(self) -> dict[str, Any]:
        """Return the status; its keys are those of ``mount --status`` (docs/json.md)."""
        return self._client.ask("status")

    def hide(self) -> None:
        """Take the name away. What is open stays readable. Idempotent."""
        if not self._hidden:
            self._hidden = True
            self._client.ask("hide")

    def close(self) -> None:
        """Hide the mount and let go of the keeper, which ends with its last file. Idempotent."""
        if not self._client.closed:
            with contextlib.suppress(OSError):  # it has ended; then the mount is gone
                self.hide()
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PreparedMount:
    """A private directory, and a keeper that waits for the order to mount ``place`` there. A context
    manager, whose end removes what was not used.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        """Raises TargetError if there is no room for it."""
        self.place = _absolute(place)
        try:
            self._outer = Path(tempfile.mkdtemp(prefix="pyqmigrate-", dir=_runtime_directory()))
        except OSError as error:
            raise target_error(error, "cannot make a private directory") from error
        self.path = self._outer / _FILES
        self._keeper: WaitingKeeper | None = None
        try:
            self.path.mkdir()
            self._keeper = WaitingKeeper(str(self.path), self.place)
        except BaseException:
            self._remove()
            raise

    def start(self, request: MountRequest) -> KeeperClient:
        """Mount. Raises as :func:`open_private`."""
        keeper, self._keeper = self._keeper, None
        assert keeper is not None
        try:
            return keeper.start(request)
        except BaseException:
            self._remove()
            raise

    def close(self) -> None:
        """End the keeper and remove the directory, if they were not used. Idempotent."""
        with _prepared_lock:
            if self in _prepared:
                _prepared.remove(self)
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
            self._remove()

    def _remove(self) -> None:
        for directory in (self.path, self._outer):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_prepared: list[PreparedMount] = []
_prepared_lock = threading.Lock()


def prepare_private(place: str | os.PathLike[str]) -> PreparedMount:
    """Start the keeper for the next :func:`open_private` of ``place``: that takes as long as the imports
    of a restore, which go on at the same time. Close the result. Raises TargetError."""
    prepared = PreparedMount(place)
    with _prepared_lock:
        _prepared.append(prepared)
    return prepared


def _take_prepared(place: str) -> PreparedMount:
    """Return what was prepared for a place, or a new one."""
    with _prepared_lock:
        for number, prepared in enumerate(_prepared):
            if prepared.place == place:
                return _prepared.pop(number)
    return PreparedMount(place)


def open_private(
    place: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    shown: str = "",
    record: bool = False,
    ahead: bool = False,
    remember: bool = False,
    cache: str = "",
) -> PrivateMount:
    """Mount the files of ``place`` in a new private directory.

    ``place`` is a store (a directory or a URL) or a single file; ``names`` restricts a store to these
    snapshots; ``shown`` names it in messages (default: the place). With ``record`` the reads are
    recorded (:meth:`PrivateMount.requests`). With ``ahead`` the working set of the one snapshot of
    ``names`` is pushed as soon as that is looked up. For root the files are readable for
    all users, because QEMU may run as another one: only who gets a descriptor reaches them. Blocks until the mount
    serves. Raises TargetError; NotSupported if this user cannot mount.
    """
    text = _absolute(place)
    prepared = _take_prepared(text)
    client = prepared.start(
        MountRequest(
            str(prepared.path),
            text,
            shown or _without_credentials(text),
            None if names is None else tuple(names),
            allow_other=_may_let_others_read(),
            private=True,
            record=record,
            ahead=names[0] if ahead and names is not None and len(names) == 1 else "",
            remember=remember,
            cache=cache,
        )
    )
    return PrivateMount(client, prepared.path)


def _absolute(place: str | os.PathLike[str]) -> str:
    text = os.fspath(place)
    return text if "://" in text else os.path.abspath(text)


def _without_credentials(place: str) -> str:
    """Return a place for messages and /proc/mounts: a URL without its user, password and query."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _may_let_others_read() -> bool:
    """Return whether this user may let others read a mount: root, and all where the system says so."""
    if os.geteuid() == 0:
        return True
    try:
        with open(_FUSE_CONFIGURATION, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def _runtime_directory() -> str | None:
    """Return the user's directory for such things; None for that of temporary files."""
    name = os.environ.get("XDG_RUNTIME_DIR", "")
    with contextlib.suppress(OSError):
        info = os.stat(name)
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and os.path.isabs(name):
            return name
    return None
