"""Many snapshots: deduplicated, compressed, in a directory or an object store::

    from pyqmigrate.store import Store, add, gc, get

    with Store.create("/srv/store") as store:
        add(store, "/snap/monday.mapped", "monday")     # only pages that are new are stored
        get(store, "monday", "/tmp/monday.mapped")      # a plain sparse file again
        with store.open_file("monday") as file:
            head = file.read(0, 4096)                   # or without a copy: every page verified
        gc(store)

A target is a directory or a URL (``s3://bucket/prefix``). It needs the extra ``store`` of this
package, for URLs ``remote``.
"""

from typing import TYPE_CHECKING

from pyqmigrate import lazy_names

if TYPE_CHECKING:
    from pyqmigrate.store.adding import AddReport, add
    from pyqmigrate.store.copying import CopyReport, copy
    from pyqmigrate.store.damage import DamagedPack
    from pyqmigrate.store.garbage import GcReport, gc
    from pyqmigrate.store.getting import GetReport, get
    from pyqmigrate.store.removing import RemoveReport, remove
    from pyqmigrate.store.store import NoSnapshot, SnapshotEntry, Store
    from pyqmigrate.store.stored_file import StoredFile
    from pyqmigrate.store.verifying import StoreDamage, VerifyReport, verify

__all__ = [
    # The store, and what it shows.
    "Store",
    "StoredFile",
    "SnapshotEntry",
    # Work on a store.
    "add",
    "get",
    "remove",
    "gc",
    "verify",
    "copy",
    # Reports.
    "AddReport",
    "GetReport",
    "RemoveReport",
    "GcReport",
    "VerifyReport",
    "StoreDamage",
    "CopyReport",
    # Errors.
    "NoSnapshot",
    "DamagedPack",
]

# Imported on first use, as in the package above.
_HOME = {
    "AddReport": "adding",
    "add": "adding",
    "CopyReport": "copying",
    "copy": "copying",
    "DamagedPack": "damage",
    "GcReport": "garbage",
    "gc": "garbage",
    "GetReport": "getting",
    "get": "getting",
    "RemoveReport": "removing",
    "remove": "removing",
    "NoSnapshot": "store",
    "SnapshotEntry": "store",
    "Store": "store",
    "StoredFile": "stored_file",
    "StoreDamage": "verifying",
    "VerifyReport": "verifying",
    "verify": "verifying",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME, globals())
