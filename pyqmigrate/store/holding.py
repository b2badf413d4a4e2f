"""Who reads a snapshot of a local store: a lock on its document, so that it is not removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pyqmigrate.errors import TargetError, target_error
from pyqmigrate.io.lock import lock_file
from pyqmigrate.store.local_place import LocalPlace
from pyqmigrate.store.place import Place

__all__ = ["hold_snapshot", "remove_unheld"]

_PAUSE = 0.01  # seconds, while the document is being removed


def hold_snapshot(place: Place, key: str) -> Callable[[], None]:
    """Keep the document of a snapshot from being removed; return what ends that.

    Object stores have no such locks: nothing is done there. Raises TargetError, with ENOENT if there
    is no such document.
    """
    if not isinstance(place, LocalPlace):
        return _nothing
    while True:
        fd = place.open_fd(key)
        try:
            lock_file(fd, exclusive=False)
            if os.fstat(fd).st_nlink:
                return lambda: os.close(fd)
        except BlockingIOError:
            pass  # it is being removed
        except OSError as error:
            os.close(fd)
            raise target_error(error, "cannot lock", place.directory / key) from error
        os.close(fd)
        time.sleep(_PAUSE)


def remove_unheld(place: Place, key: str) -> bool:
    """Remove the document of a snapshot; return False if a process reads the snapshot.

    Raises TargetError, with ENOENT if there is no such document.
    """
    if not isinstance(place, LocalPlace):
        place.delete(key)
        return True
    fd = place.open_fd(key)
    try:
        lock_file(fd, exclusive=True)
        place.delete(key)
    except BlockingIOError:
        return False
    except OSError as error:
        if isinstance(error, TargetError):
            raise
        raise target_error(error, "cannot lock", place.directory / key) from error
    finally:
        os.close(fd)
    return True


def _nothing() -> None:
    pass
