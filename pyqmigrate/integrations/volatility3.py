"""volatility3 on a snapshot of any kind, without a conversion.

    vol -f guest.mapped linux.pslist
    vol -f pyqmigrate:/backups/store#monday linux.pslist

A stacker recognizes the files that are snapshots, and puts a layer on them that has the bytes of the
snapshot's ELF core, which volatility's own layers read. A URL ``pyqmigrate:SNAPSHOT`` is such a core
from the start: for ``STORE#NAME``, which is not a file.

volatility3 imports all modules in its folder ``plugins``. A wheel of this package has one there, which
imports this module; where it is installed in another way, use the folder of :func:`plugin_directory`
(``vol -p DIR``), or this module in place of ``vol``::

    python -m pyqmigrate.integrations.volatility3 -f guest.mapped linux.pslist

This module may be used under the Volatility Software License 1.0 as well as under this package's licence.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import physical, resources

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.export.elf_view import ElfView
from pyqmigrate.fleet.opening import is_snapshot_file
from pyqmigrate.integrations.opened import open_any, view_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "ElfFile",
    "SnapshotHandler",
    "SnapshotLayer",
    "SnapshotStacker",
    "main",
    "plugin_directory",
]

SCHEME = "pyqmigrate"

_logger = logging.getLogger(__name__)
_views: dict[str, ElfView] = {}  # by location, for the life of the process: layers are never closed
_lock = threading.Lock()


def plugin_directory() -> Path:
    """Return the folder for volatility's option ``-p``."""
    return Path(__file__).with_name("volatility3_plugins")


class ElfFile(io.RawIOBase):
    """The ELF core of a snapshot as a file, open for reading."""

    def __init__(self, view: ElfView) -> None:
        self._view = view
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._view.size}[whence]
        self._offset = max(start + offset, 0)
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer).cast("B") as target:
            try:
                data = self._view.read(self._offset, len(target))
            except PyqmigrateError as error:
                _logger.warning("%s: %s", self._view.snapshot.source.name, error)
                raise OSError(str(error)) from error
            target[: len(data)] = data
        self._offset += len(data)
        return len(data)


class SnapshotHandler(resources.VolatilityHandler):
    """Opens ``pyqmigrate:SNAPSHOT``."""

    @classmethod
    def non_cached_schemes(cls) -> list[str]:
        return [SCHEME]

    @staticmethod
    def default_open(req: urllib.request.Request) -> ElfFile | None:
        if req.type != SCHEME:
            return None
        try:
            return _open(req.full_url)
        except PyqmigrateError as error:
            raise ValueError(str(error)) from error


class SnapshotLayer(physical.FileLayer):
    """The ELF core of a snapshot; ``location`` is its URL, ``pyqmigrate:SNAPSHOT``."""

    @property
    def _file(self) -> IO[Any]:
        if self._file_ is None:
            self._file_: IO[Any] | None = cast("IO[Any]", _open(str(self._location)))
        return self._file_


class SnapshotStacker(interfaces.automagic.StackerLayerInterface):
    """Puts a :class:`SnapshotLayer` on a file that is a snapshot."""

    stack_order = 5  # before the layer of ELF files, which comes on top

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        below = context.layers[layer_name]
        if not isinstance(below, physical.FileLayer) or isinstance(below, SnapshotLayer):
            return None
        url = urllib.parse.urlparse(below.location)
        if url.scheme != "file":
            return None
        path = urllib.request.url2pathname(url.path)
        location = f"{SCHEME}:{path}"
        try:
            if not is_snapshot_file(path):
                return None
            _view(location)
        except PyqmigrateError as error:
            _logger.warning("%s: %s", path, error)
            return None
        name = context.layers.free_layer_name("SnapshotLayer")
        config_path = interfaces.configuration.path_join("SnapshotHelper", name)
        context.config[interfaces.configuration.path_join(config_path, "location")] = location
        return SnapshotLayer(context, config_path, name)


def _open(location: str) -> ElfFile:
    return ElfFile(_view(location))


def _view(location: str) -> ElfView:
    """Return the ELF core of the snapshot at a URL, the same one each time.

    Raises the errors of :func:`~pyqmigrate.integrations.opened.open_any` and
    :func:`~pyqmigrate.integrations.opened.view_of`.
    """
    with _lock:
        view = _views.get(location)
        if view is None:
            snapshot = open_any(location.removeprefix(f"{SCHEME}:"))
            try:
                view = view_of(snapshot)
            except BaseException:
                snapshot.close()
                raise
            _views[location] = view
        return view


def main() -> None:
    """Run volatility's command line, which knows snapshots now."""
    from volatility3 import cli

    sys.argv[0] = "vol"
    cli.main()


if __name__ == "__main__":
    # volatility finds classes by the name of their module.
    from pyqmigrate.integrations.volatility3 import main as run

    run()
