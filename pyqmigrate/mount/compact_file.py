"""A compact file as the plain file that it contains, with what is beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pyqmigrate.format.working_set import SUFFIX
from pyqmigrate.io.seekable_file import SeekableFile

__all__ = ["CompactFile"]


class CompactFile(SeekableFile):
    """A :class:`~pyqmigrate.io.seekable_file.SeekableFile`; a working set beside the compact file, which
    was recorded since, comes before the one in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._beside = os.fspath(path) + SUFFIX

    @property
    def companions(self) -> Mapping[str, bytes]:
        try:
            with open(self._beside, "rb") as file:
                return {**super().companions, SUFFIX: file.read()}
        except OSError:
            return super().companions
