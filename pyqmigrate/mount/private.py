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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit, urlunsplit

from pyqmigrate.errors import target_error
from pyqmigrate.mount.asking import KeeperClient
from pyqmigrate.mount.starting import MountRequest, start_keeper

__all__ = ["FileRange", "PrivateMount", "open_private"]

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
    text = os.fspath(place)
    if "://" not in text:
        text = os.path.abspath(text)
    try:
        outer = Path(tempfile.mkdtemp(prefix="pyqmigrate-", dir=_runtime_directory()))
    except OSError as error:
        raise target_error(error, "cannot make a private directory") from error
    path = outer / _FILES
    try:
        path.mkdir()
        client = start_keeper(
            MountRequest(
                str(path),
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
    except BaseException:
        for directory in (path, outer):
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise
    return PrivateMount(client, path)


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
